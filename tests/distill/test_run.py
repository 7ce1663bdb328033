"""The trainer from a cache to a student, in every recipe, and what it refuses to start on."""

import hashlib
import io
import json
import shutil
import tarfile

import pytest
import timm
import torch
import zarr
from safetensors import safe_open
from safetensors.torch import load_file

from distill.batches import TrainingBatches, UserError
from distill.config import DistillConfig, DistillError
from distill.projectors import Ladder
from distill.run import Training, build, distill
from distill.standardization import Standardization
from distill.step import Distillation

STUDENT = "vit_tiny_patch16_224 patch_size=16 embed_dim=32 depth=3 num_heads=2"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of this size are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configure(cache, out, **changes):
    plain = dict(student=STUDENT, epochs=1, batch_size=17, lr=3e-2, warmup_epochs=1, log_every=1)
    return DistillConfig(cache=cache, out=out, **(plain | dict(device="cpu") | changes))


def losses(out):
    return [json.loads(text)["loss"] for text in (out / "metrics.jsonl").read_text().splitlines()]


def tree(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("recipe", ["basic", "std", "dedicated", "ladder", "unic", "single"])
def test_every_recipe_learns(feats, tmp_path, recipe):
    teachers = ("alpha",) if recipe == "single" else ()
    config = configure(feats, tmp_path / "run", recipe=recipe, teachers=teachers, epochs=20)
    done = distill(config)
    assert (done.made, done.steps) == (60, 60)
    found = losses(config.out)
    assert sum(found[-6:]) < 0.9 * sum(found[:6])
    assert list(done.last["teachers"]) == list(teachers or ("alpha", "beta"))


@pytest.fixture(scope="module")
def trained(feats, tmp_path_factory):
    """A trainer that finished, its distillation in memory, and a batch it might see."""
    config = configure(feats, tmp_path_factory.mktemp("trained") / "run", epochs=3)
    batches = TrainingBatches(feats, batch_size=config.batch_size, seed=config.seed)
    torch.manual_seed(0)
    distillation = build(config, batches).train()
    run = Training(config, batches, distillation, torch.device("cpu"))
    run.train(run.resume())
    run.finish(made=run.total)
    return config.out, distillation.eval(), next(batches.iterate(1, 2, 1))


def load(out, **changes):
    return timm.create_model(f"local-dir:{out / 'student'}", **changes).eval()


def normalised(views):
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (views.float() / 255 - mean) / std


def test_timm_alone_loads_the_student(trained):
    out, distillation, batch = trained
    images = normalised(batch["views"])
    with torch.no_grad():
        expected = distillation.student.features(distillation.normalise(batch["views"]))
        found = load(out, pretrained=True).forward_features(images)
        untrained = load(out).forward_features(images)
    torch.testing.assert_close(found, expected)
    assert (untrained - expected).abs().max() > 0.1


def test_the_student_states_its_preprocessing_and_where_it_comes_from(trained):
    content = json.loads((trained[0] / "student" / "config.json").read_text())
    stated = content["pretrained_cfg"]
    assert (tuple(stated["mean"]), tuple(stated["std"])) == (MEAN, STD)
    assert stated["input_size"] == [3, 48, 48]
    assert stated["license"] == "apache-2.0"
    assert (content["unic"]["recipe"], content["unic"]["steps"]) == ("unic", 9)
    assert sorted(content["unic"]["teachers"]) == ["alpha", "beta"]


def test_student_and_heads_reproduce_the_trainers_loss(trained):
    out, distillation, batch = trained
    with safe_open(out / "heads.safetensors", "pt") as file:
        about = file.metadata()
    tensors = load_file(out / "heads.safetensors")
    shape = json.loads(about["ladder"])
    model = load(out, pretrained=True)
    hidden = tuple(shape.pop("hidden"))
    ladder = Ladder(model.embed_dim, shape.pop("depth"), shape.pop("dims"), hidden=hidden, **shape)
    width = {teacher: torch.zeros(dim) for teacher, dim in ladder.dims.items()}
    kind = json.loads(about["standardization"])["kind"]
    blank = {t: {"cls": (zero, zero), "patches": (zero, zero)} for t, zero in width.items()}
    standardization = Standardization(kind, blank)
    for part, module in (("ladder.", ladder), ("standardization.", standardization)):
        own = {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)}
        module.load_state_dict(own)

    def student(images):
        found = model.forward_intermediates(
            images, norm=False, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
        )
        return [(prefix[:, 0], patches) for patches, prefix in found]

    class Plain(torch.nn.Module):
        def forward(self, images):
            return student(images)

    again = Distillation(Plain(), ladder, standardization, distillation.recipe, MEAN, STD)
    with torch.no_grad():
        expected, _ = distillation.losses(batch["views"], batch["targets"], {})
        found, _ = again.losses(batch["views"], batch["targets"], {})
    torch.testing.assert_close(found, expected)


def test_neither_teachers_nor_a_writable_cache_are_needed(fresh_cache, tars, encoders, tmp_path):
    cache = fresh_cache("alpha", "wide")
    before, away = tree(cache), encoders["alpha"].parent.with_name("away")
    encoders["alpha"].parent.rename(away)
    try:
        config = configure(cache, tmp_path / "run", epochs=20)
        distill(config)
    finally:
        away.rename(encoders["alpha"].parent)
    assert tree(cache) == before
    # Of another grid (4x4 for the student's 3x3) and width (48 for 32) than the student.
    last = json.loads((config.out / "metrics.jsonl").read_text().splitlines()[-1])
    first = json.loads((config.out / "metrics.jsonl").read_text().splitlines()[0])
    for teacher in ("alpha", "wide"):
        parts = [line["teachers"][teacher]["teacher_loss"] for line in (first, last)]
        assert parts[1] < 0.95 * parts[0]


def refused(config, message):
    with pytest.raises(UserError, match=message):
        distill(config)
    assert not config.out.exists()


@pytest.fixture
def own(feats, tars, tmp_path):
    """A copy of the cache and its tars that a test may damage, and how to train on it."""
    folder = shutil.copytree(tars[0].parent, tmp_path / "moved")
    cache = shutil.copytree(feats, tmp_path / "own" / "feats")
    return configure(cache, tmp_path / "run", data=(str(folder),))


def test_tars_that_moved_are_named_by_data(own, tmp_path):
    assert distill(own).made == 3
    (tmp_path / "moved").rename(tmp_path / "again")
    other = configure(own.cache, tmp_path / "other")
    location = json.loads((own.cache / "tars" / "train-000000.json").read_text())["locations"]
    if not any((own.cache / place).exists() for place in location):
        refused(other, "say where the tars are with --data")
    assert distill(configure(own.cache, own.out, data=(f"{tmp_path}/again/*.tar",))).made == 0


def test_views_cut_elsewhere_are_refused(own):
    units = sorted((own.cache / "views" / "unic@48").glob("*/*.zarr"))
    shifted = 0
    for unit in units:
        group = zarr.open_group(unit, mode="r+")
        name = "crop_top"
        shifted += int((group[name][:] > 1).sum())
        # Crops that still lie within their images.
        group[name][:] = group[name][:].clip(max=1)
    assert shifted > 20
    refused(own, "unic@48, view")


def test_tars_with_other_pictures_are_refused(own, tmp_path):
    path = tmp_path / "moved" / "train-000000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    pictures = [data for member, data in members if member.name.endswith(".jpg")]
    rotated = iter(pictures[1:] + pictures[:1])
    size = path.stat().st_size
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            new = next(rotated) if member.name.endswith(".jpg") else data
            member.size = len(new)
            tar.addfile(member, io.BytesIO(new))
    assert path.stat().st_size == size
    refused(own, r"train-000000\.tar: the bytes of image")


def test_tars_of_another_length_are_refused(own, tmp_path):
    shutil.copy(tmp_path / "moved" / "train-000001.tar", tmp_path / "moved" / "train-000000.tar")
    refused(own, "at extraction it had")


def test_a_cache_that_lacks_a_unit_is_refused(own):
    (own.cache / "beta" / "unic@48" / "1" / "train-000001.json").unlink()
    refused(own, "beta/unic@48 lacks 1 of 4 units, the first is view 1 of train-000001")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(recipe="single"), "'single' takes one teacher, got 2"),
        (dict(recipe="eunuch"), r"no recipe 'eunuch'; choose one of(.|\n)*dedicated(.|\n)*ladder"),
        (dict(student="vit_huge_nowhere"), "vit_huge_nowhere"),
        (dict(student="resnet18"), "cannot build the run: ResNet"),
        (dict(student=STUDENT + " patch_size=7x"), "cannot build the run"),
        (dict(student=STUDENT + " heads=3"), "heads"),
        (dict(drop=1.5), r"in \[0, 1\], got 1.5"),
        (dict(device="gpu"), "--device 'gpu' is no device"),
    ],
    ids=["single", "recipe", "student", "resnet", "value", "argument", "drop", "device"],
)
def test_settings_that_do_not_work_are_refused_before_the_first_step(
    feats, tmp_path, changes, message
):
    refused(configure(feats, tmp_path / "run", **changes), message)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "workers", "log_every"])
def test_counts_are_positive(feats, tmp_path, name):
    with pytest.raises(DistillError, match=f"--{name.replace('_', '-')} must be at least 1"):
        configure(feats, tmp_path / "run", **{name: 0})


def test_a_loss_that_explodes_stops_the_run(feats, tmp_path):
    config = configure(feats, tmp_path / "run", lr=1e30, epochs=4)
    with pytest.raises(DistillError, match=r"the loss is (nan|inf) after step .* Try a lower --lr"):
        distill(config)
    assert not (config.out / "student").exists()
