"""The evaluation stage on real tars: what reaches the probes, in which order, and what is kept.

N = images, S = view size, D = channels, P = patch tokens.
"""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import webdataset as wds
from conftest import SIZE, encoded, write_encoder
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

import evaluate.encoder as evaluate_encoder
import extract.run as extract_run
from evaluate.config import EvalConfig
from evaluate.encoder import EvaluationError, Split, extract_split
from evaluate.knn import knn
from evaluate.run import evaluate, split
from evaluate.table import read_results
from extract.cache.dataset import CachedViews
from extract.cache.errors import UserError
from extract.cache.images import decode, index_tar


def tar_of(path: Path, samples: list[tuple[str, dict[str, bytes | str]]]) -> Path:
    with wds.TarWriter(str(path), mtime=0) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
    return path


def sample(rng: np.random.Generator, label: int | str, **members: bytes) -> dict[str, bytes | str]:
    image = rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)
    return {"png": encoded(image, "PNG"), "cls": str(label), **members}


@pytest.fixture
def config(tars: list[Path], test_tar: Path, encoders: dict[str, Path], tmp_path: Path):
    return EvalConfig(
        task="knn",
        encoders=(f"alpha={encoders['alpha']}",),
        train=tuple(map(str, tars)),
        test=(str(test_tar),),
        cache=tmp_path / "feats",
        results=tmp_path / "results.json",
        size=SIZE,
        device="cpu",
    )


@pytest.fixture(scope="module")
def backwards(tars: list[Path], encoders: dict[str, Path], tmp_path_factory) -> Split:
    """The training tars, given in the wrong order."""
    return extract_split(
        [str(encoders["alpha"])],
        [str(path) for path in reversed(tars)],
        tmp_path_factory.mktemp("backwards"),
        name="boxes",
        split="train",
        size=SIZE,
        batch_size=16,
        workers=2,
        device="cpu",
    )


def images_of(tars: list[Path]) -> list[torch.Tensor]:
    found = []
    for index in map(index_tar, tars):
        found += [decode(index.read(s, "jpg"), s.key) for s in index.samples]
    return found


def plain_views(tars: list[Path]) -> torch.Tensor:
    """The paper's evaluation views by torchvision alone, `[N, 3, S, S]`."""
    bicubic = InterpolationMode.BICUBIC
    return torch.stack(
        [tvf.center_crop(tvf.resize(i, [SIZE], bicubic), [SIZE, SIZE]) for i in images_of(tars)]
    )


def plain_tokens(folder: Path, views: torch.Tensor) -> torch.Tensor:
    """Tokens after the final norm by timm alone, `[N, 1 + P, D]`."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        return model.forward_features((views.float() / 255 - 0.5) / 0.5)


def test_features_are_those_of_a_plain_forward(backwards, tars, encoders):
    views = plain_views(tars)
    tokens = plain_tokens(encoders["alpha"], views)
    assert torch.equal(backwards.pictures(range(len(backwards))), views)
    # Half precision keeps 11 bits.
    torch.testing.assert_close(backwards.cls("alpha"), tokens[:, 0], rtol=2**-10, atol=1e-4)
    rows = torch.tensor([50, 0, 31])
    torch.testing.assert_close(
        backwards.patches("alpha")[rows], tokens[rows, 1:], rtol=2**-10, atol=1e-4
    )
    assert backwards.grid("alpha") == (3, 3)


def test_labels_and_masks_lie_in_the_order_of_the_rows(backwards, tars):
    labels = [i % 3 for n in (30, 21) for i in range(n)]
    assert backwards.labels.tolist() == labels
    masks = backwards.masks
    assert masks.dtype == torch.uint8 and tuple(masks.shape) == (51, SIZE, SIZE)
    for mask, label in zip(masks, labels, strict=True):
        assert set(mask.unique().tolist()) == {0, label + 1}
    row = 0
    for index in map(index_tar, tars):
        for one in index.samples:
            with Image.open(io.BytesIO(index.read(one, "seg.png"))) as picture:
                stored = torch.from_numpy(np.array(picture))
            cut = tvf.resize(stored[None], [SIZE], InterpolationMode.NEAREST_EXACT)
            assert torch.equal(masks[row], tvf.center_crop(cut, [SIZE, SIZE])[0])
            row += 1


def test_masks_are_cut_where_the_views_are(encoders, tmp_path):
    """Image and mask say the same thing: bright is 1. They must go on saying it when cut."""
    rng = np.random.default_rng(0)
    samples = []
    for i, (height, width) in enumerate([(60, 110), (131, 64), (48, 48), (200, 90)]):
        mask = np.zeros((height, width), np.uint8)
        top, left = int(rng.integers(0, height // 2)), int(rng.integers(0, width // 2))
        mask[top : top + height // 2, left : left + width // 2] = 1
        image = np.repeat(mask[..., None] * 255, 3, axis=2)
        members = {"png": encoded(image, "PNG"), "seg.png": encoded(mask, "PNG")}
        samples.append((f"{i}", members))
    one = extract_split(
        ["pixels:16"],
        [str(tar_of(tmp_path / "coded.tar", samples))],
        tmp_path / "feats",
        name="",
        split="train",
        size=SIZE,
        batch_size=4,
        workers=1,
        device="cpu",
    )
    bright = one.pictures(range(4))[:, 0] > 127
    differ = (bright != one.masks.bool()).float().mean(dim=(1, 2))
    # Bicubic and nearest disagree by a pixel along edges at most; a shifted crop by whole bands.
    assert differ.max() < 0.03
    assert one.masks.unique().tolist() == [0, 1]
    # Where nothing is resized, nothing may differ.
    assert differ[2] == 0


def test_a_cache_with_more_tars_gives_those_of_the_call(config, tars):
    both = split(replace(config, name="boxes"), "train")
    one = split(replace(config, name="boxes", train=(str(tars[1]),)), "train")
    assert (len(both), len(one)) == (51, 21)
    assert torch.equal(one.cls("alpha"), both.cls("alpha")[30:])


def test_knn_gets_the_features_with_their_labels(config, tars, encoders):
    """Against a vote counted by hand over features made by timm alone; train and test are one."""
    (score,) = evaluate(replace(config, test=config.train))
    features = plain_tokens(encoders["alpha"], plain_views(tars))[:, 0].half().double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = np.array([i % 3 for n in (30, 21) for i in range(n)])
    similarities = features @ features.T
    right = 0
    for row, label in zip(similarities, labels, strict=True):
        near = np.argsort(-row)[:20]
        votes = [np.exp(row[near][labels[near] == c] / 0.07).sum() for c in range(3)]
        right += int(np.argmax(votes) == label)
    assert score.value == pytest.approx(100 * right / 51, abs=100 / 51 + 1e-6)
    assert set(score.details["top1_by_k"]) == {"10", "20", "100", "200"}
    # One neighbour of an image among themselves is itself.
    train = split(config, "train")
    own = knn(train.cls("alpha"), train.labels, train.cls("alpha"), train.labels, k=[1])
    assert own == {1: 100.0}


def units(root: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in root.glob("eval/*/*/center@*/*/*.json")}


def test_a_second_call_computes_nothing_again(config, encoders):
    first = evaluate(config)
    before = units(config.cache)
    assert len([path for path in before if "alpha" in path.parts]) == 3
    assert evaluate(config) == first
    assert units(config.cache) == before
    added = evaluate(replace(config, encoders=(*config.encoders, str(encoders["beta"]))))
    assert [score.encoder for score in added] == ["alpha", "beta"]
    after = units(config.cache)
    assert {path: after[path] for path in before} == before
    assert {path.parts[-4] for path in after.keys() - before.keys()} == {"beta"}


def test_a_retrained_encoder_is_extracted_anew(config, encoders, tmp_path):
    folder = shutil.copytree(encoders["alpha"], tmp_path / "mine")
    config = replace(config, encoders=(str(folder), "pixels:16"))
    evaluate(config)
    evaluate(replace(config, task="classification"))
    before = units(config.cache)
    old = split(config, "test").cls("mine")

    write_encoder(folder, seed=5)
    evaluate(config)
    after = units(config.cache)
    changed = {path.parts[-4] for path, made in after.items() if before[path] != made}
    assert changed == {"mine"}
    new = split(config, "test").cls("mine")
    views = plain_views([Path(config.test[0])])
    torch.testing.assert_close(new, plain_tokens(folder, views)[:, 0], rtol=2**-10, atol=1e-4)
    assert not torch.allclose(new, old, atol=0.1)

    document = json.loads(config.results.read_text())
    kept = {(r["encoder"], r["task"]) for r in document["scores"]}
    assert kept == {("mine", "knn"), ("pixels-16", "knn"), ("pixels-16", "classification")}
    assert [(r["encoder"], r["task"]) for r in document["superseded"]] == [
        ("mine", "classification")
    ]


@pytest.fixture(scope="module")
def scored(tars, test_tar, encoders, tmp_path_factory):
    """All tasks for an encoder of every role, into one results file."""
    folder = tmp_path_factory.mktemp("scored")
    student = folder / "runs" / "unic" / "student"
    write_encoder(student, seed=7)
    # What marks a run: distillation writes its projectors beside the student.
    (student.parent / "heads.safetensors").write_bytes(b"")
    config = EvalConfig(
        task="knn",
        encoders=(
            f"alpha={encoders['alpha']}",
            "pixels:16",
            f"random:{encoders['alpha']}",
            str(student),
            f"same={student.parent}",
        ),
        train=tuple(map(str, tars)),
        test=(str(test_tar),),
        cache=folder / "feats",
        results=folder / "results.json",
        name="boxes",
        classes=("background", "red", "green", "blue"),
        size=SIZE,
        device="cpu",
        steps=25,
    )
    tasks = ("knn", "classification", "segmentation")
    return config, {task: evaluate(replace(config, task=task)) for task in tasks}


ROLES = {
    "alpha": "teacher",
    "pixels-16": "baseline",
    "random-alpha": "baseline",
    "unic": "student",
    "same": "student",
}


@pytest.mark.parametrize("task", ["knn", "classification", "segmentation"])
def test_every_encoder_is_scored_in_its_role(scored, task):
    scores = scored[1][task]
    assert {score.encoder: score.role for score in scores} == ROLES
    assert {score.task for score in scores} == {task}
    assert all(0 <= score.value <= 100 for score in scores)
    assert len({score.protocol for score in scores}) == 1
    values = {score.encoder: score.value for score in scores}
    # A student by the folder of its run is the student.
    assert values["unic"] == values["same"]


def test_the_easy_set_is_solved(scored):
    """The class is the image's colour: pixels must find it, or rows and labels are mixed up."""
    for task in ("knn", "classification"):
        assert {s.encoder: s.value for s in scored[1][task]}["pixels-16"] > 95


def test_segmentation_says_what_was_reduced_and_every_class(scored):
    for score in scored[1]["segmentation"]:
        assert "25 steps (reduced from" in score.protocol
        assert len(score.details["per_class_iou"]) == 4


def test_the_results_file_merges_the_tasks(scored):
    config, by_task = scored
    stored = read_results(config.results)
    assert {(s.encoder, s.task) for s in stored} == {(e, t) for e in ROLES for t in by_task}
    assert {s.key: s.value for s in stored} == {s.key: s.value for t in by_task.values() for s in t}
    records = json.loads(config.results.read_text())["scores"]
    assert all(len(record["encoder_sha256"]) == 64 for record in records)
    assert all("train-000000.tar" in record["data"] for record in records)


def test_a_label_that_is_no_number(config, tmp_path):
    rng = np.random.default_rng(1)
    bad = tar_of(tmp_path / "bad.tar", [("x", sample(rng, 0)), ("cat_1", sample(rng, "cat"))])
    with pytest.raises(EvaluationError, match=r"bad\.tar:cat_1\.cls: its label b'cat' is no numb"):
        evaluate(replace(config, train=(str(bad),), encoders=("pixels:16",)))
    assert not config.results.exists()


@pytest.mark.parametrize(
    ("task", "extension"),
    [("knn", "cls"), ("classification", "cls"), ("segmentation", "seg.png")],
)
def test_missing_labels(config, tmp_path, task, extension):
    rng = np.random.default_rng(1)
    whole, lacking = (sample(rng, 0, **{"seg.png": mask()}) for _ in range(2))
    del lacking[extension]
    bad = tar_of(tmp_path / "bad.tar", [("whole", whole), ("lacking", lacking)])
    with pytest.raises(EvaluationError) as caught:
        evaluate(replace(config, task=task, train=(str(bad),), encoders=("pixels:16",)))
    message = str(caught.value)
    assert f"bad.tar:lacking.{extension} is missing" in message
    assert task in message and "the tars must hold labels beside their images" in message
    assert f"has {', '.join(sorted(lacking))}" in message


def mask() -> bytes:
    return encoded(np.ones((50, 60), np.uint8), "PNG")


def test_masks_of_other_categories_than_the_project_names(config):
    few = replace(config, task="segmentation", classes=("background", "red"), steps=2)
    with pytest.raises(EvaluationError, match=r"mask values 0 to 1 or 255, found \[2"):
        evaluate(replace(few, encoders=("pixels:16",)))


def test_a_mask_of_another_size_than_its_image(config, tmp_path):
    odd = sample(np.random.default_rng(1), 0, **{"seg.png": encoded(np.ones((9, 90), "u1"), "PNG")})
    bad = tar_of(tmp_path / "bad.tar", [("odd", odd)])
    bad_config = replace(config, task="segmentation", train=(str(bad),), encoders=("pixels:16",))
    with pytest.raises(UserError, match=r"bad\.tar:odd\.seg\.png: a mask of 9 x 90 pix"):
        evaluate(bad_config)


@pytest.mark.parametrize("value", [256, 65535])
def test_a_mask_value_that_does_not_fit(config, tmp_path, value):
    """Cut to 8 bits, 256 would pass for category 0 and 65535 for "ignored"."""
    deep = encoded(np.full((50, 60), value, np.uint16), "PNG")
    odd = sample(np.random.default_rng(1), 0, **{"seg.png": deep})
    bad = tar_of(tmp_path / "bad.tar", [("deep", odd)])
    bad_config = replace(config, task="segmentation", train=(str(bad),), encoders=("pixels:16",))
    with pytest.raises(UserError, match=rf"bad\.tar:deep\.seg\.png.*{value}"):
        evaluate(bad_config)


def test_two_encoders_of_one_name(config, encoders, tmp_path):
    other = shutil.copytree(encoders["beta"], tmp_path / "alpha")
    with pytest.raises(UserError, match="are both called 'alpha': give one a name"):
        evaluate(replace(config, encoders=(str(encoders["alpha"]), str(other))))


def image_folder(root: Path, classes: list[str], count: int) -> Path:
    """Pictures in class folders; a class's colour follows its name, not its number."""
    colours = {"ants": (220, 20, 20), "bees": (20, 220, 20), "cats": (20, 20, 220)}
    rng = np.random.default_rng(len(classes) + count)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = np.clip(rng.normal(colours[name], 20, (50, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


def test_image_folders_as_train_and_test(config, tmp_path):
    train = image_folder(tmp_path / "train", ["ants", "bees"], 12)
    test = image_folder(tmp_path / "test", ["ants", "bees"], 5)
    ours = replace(config, train=(str(train),), test=(str(test),), encoders=("pixels:16",))
    (score,) = evaluate(ours)
    assert score.value == 100
    assert len(split(ours, "train")) == 24 and split(ours, "test").labels.sum() == 5


def test_image_folders_of_different_classes(config, tmp_path):
    train = image_folder(tmp_path / "train", ["ants", "bees", "cats"], 2)
    test = image_folder(tmp_path / "test", ["ants", "cats"], 2)
    ours = replace(config, train=(str(train),), test=(str(test),), encoders=("pixels:16",))
    with pytest.raises(EvaluationError) as caught:
        evaluate(ours)
    assert "has ants, bees, cats; test" in str(caught.value)
    assert "has ants, cats; give both the same class folders" in str(caught.value)
    assert not config.cache.exists()


def test_several_tasks_load_each_encoder_once(config, encoders, monkeypatch):
    loaded = []
    load = evaluate_encoder.load_encoder
    monkeypatch.setattr(
        evaluate_encoder, "load_encoder", lambda name, **kw: loaded.append(name) or load(name, **kw)
    )
    monkeypatch.setattr(extract_run, "load_encoder", evaluate_encoder.load_encoder)
    both = replace(config, encoders=(*config.encoders, "pixels:16"))
    scores = evaluate(both, ("knn", "classification"))
    assert loaded == list(both.encoders)
    tasks = [(score.task, score.encoder) for score in scores]
    assert tasks == [(t, e) for t in ("knn", "classification") for e in ("alpha", "pixels-16")]
    kept = {(s.task, s.encoder, s.value) for s in read_results(config.results)}
    assert kept == {(s.task, s.encoder, s.value) for s in scores}
    assert evaluate(both)[0].value == scores[0].value


def test_tokens_that_are_kept_are_those_that_are_read(backwards, monkeypatch):
    rows = torch.tensor([50, 0, 31, 0])
    reads = []
    read = CachedViews.__getitems__
    monkeypatch.setattr(
        CachedViews, "__getitems__", lambda self, rows: reads.append(len(rows)) or read(self, rows)
    )
    kept = backwards.patches("alpha")
    found = [kept[rows] for _ in range(3)]
    assert reads == [1, 51]
    monkeypatch.setattr(evaluate_encoder, "KEPT_BYTES", 51 * 9 * 32)
    large = backwards.patches("alpha")
    assert torch.equal(large[rows], found[0]) and torch.equal(found[1], found[2])
    assert reads == [1, 51, 1, 4]
