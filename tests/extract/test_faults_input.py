"""Hostile and broken input through the commands: named in one line, nothing run, nothing outside.

Cut and hostile tars cost themselves and no other; a changed bit of a weight is another encoder; one
row that cannot be stored is named.
"""

import ast
import io
import os
import pickle
import shutil
import signal
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import webdataset as wds
from conftest import STUDENT, picture, write_encoder, write_tar
from safetensors.torch import load_file, save_file
from test_kill_sweep import differences, tree
from typer.testing import CliRunner

from extract.cache import Cache, CachedViews, select
from extract.cache.codecs import FeatureError
from extract.cache.errors import CacheError
from extract.cache.images import decode, image_extension, index_tar
from extract.cache.views import draw_view, parse_recipe
from extract.cli import main
from extract.config import ExtractConfig
from extract.run import extract

REPOSITORY = Path(__file__).parents[2]
PRODUCT = ("console", "extract", "distill", "evaluate", "demo")
LABEL = "unic@32"
# Every n-th cut goes through the whole command; 1 takes a minute and all of them.
STRIDE = int(os.environ.get("TAR_CUT_STRIDE", "9"))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut can tell; extraction of small units is otherwise four fifths waiting."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "alpha", 0, img_size=32, depth=1)


@dataclass
class Said:
    code: int
    errors: list[str]
    everything: str


Command = Callable[..., Said]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    encoder: Path,
) -> Iterator[Command]:
    """Runs `unic-extract` over tars into `feats`: its exit code and the lines of its error."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*tars: Path) -> Said:
        data = [word for tar in tars for word in ("--data", str(tar))]
        options = ["--recipe", LABEL, "--views", "1", "--device", "cpu", "--workers", "1"]
        teacher = ["--teacher", f"alpha={encoder}", "--cache", "feats"]
        monkeypatch.setattr(sys, "argv", ["unic-extract", *teacher, *options, *data])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        return Said(int(left.value.code or 0), errors, said)

    yield run
    signal.signal(signal.SIGTERM, before)


def config(cache: Path, tars: list[Path], encoder: Path) -> ExtractConfig:
    return ExtractConfig(
        data=tuple(map(str, tars)),
        cache=cache,
        teachers=(f"alpha={encoder}",),
        recipe=LABEL,
        views=1,
        batch_size=8,
        workers=1,
        device="cpu",
    )


def known(cache: Path) -> set[str]:
    """Stems of the tars of which the cache holds anything."""
    return {path.stem for path in [*cache.glob("tars/*.json"), *cache.glob("*/*/*/*.json")]}


# --- tars ---


def test_a_cut_tar_costs_itself_and_no_other(command: Command, tmp_path: Path) -> None:
    """Cut at blocks of a tar of five samples: an error that names it, and the other tar is there;
    or, where only padding was cut off, exactly the five."""
    good, whole = write_tar(tmp_path / "good.tar", 2), write_tar(tmp_path / "whole.tar", 5)
    content = whole.read_bytes()
    last = index_tar(whole).samples[-1]
    end = max(member.offset for member in last.members.values()) + 512 + 2 * 512
    lengths = [*range(0, end, 512)[::STRIDE], end - 512, end, len(content)]
    for length in lengths:
        shutil.rmtree(tmp_path / "feats", ignore_errors=True)
        cut = tmp_path / "cut.tar"
        cut.write_bytes(content[:length])
        said = command(cut, good)
        if length >= end:
            assert said.code == 0 and known(tmp_path / "feats") == {"good", "cut"}
            assert Cache(tmp_path / "feats").tar("cut").rows == 5
        else:
            assert said.code == 1 and len(said.errors) == 1, (length, said)
            assert "cut.tar" in said.errors[0] and "Traceback" not in said.everything
            assert known(tmp_path / "feats") == {"good"}, length
        rows = select(Cache(tmp_path / "feats")).rows_per_tar.tolist()
        assert rows == ([5, 2] if length >= end else [2])


@pytest.mark.parametrize(
    "names",
    [
        ["../out.jpg"],
        ["/tmp/out.jpg"],
        ["a.v1.jpg", "a.v2.jpg"],
        ["a.jpg", "b.jpg", "a.cls"],
        ["a.jpg", "b.jpg", "a.jpg"],
        ["a\x1b]0;owned\x07.jpg"],
    ],
    ids=["climbing", "absolute", "dotted", "interleaved", "doubled", "control characters"],
)
def test_a_hostile_tar_is_named_and_writes_nothing_outside(
    command: Command, tmp_path: Path, names: list[str]
) -> None:
    data = picture(np.random.default_rng(0), 0)[0]
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "bad.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    good = write_tar(tmp_path / "in" / "good.tar", 2)
    before = tree(tmp_path)
    said = command(tmp_path / "in" / "bad.tar", good)
    assert said.code == 1 and len(said.errors) == 1 and "bad.tar" in said.errors[0]
    assert "\x1b]0" not in said.everything and "\x07" not in said.everything
    assert known(tmp_path / "feats") == {"good"}
    shutil.rmtree(tmp_path / "feats")
    assert differences(before, tree(tmp_path)) == []


def test_strange_keys_are_extracted_and_write_nothing_outside(
    command: Command, tmp_path: Path
) -> None:
    keys = ["x/..y/a b", "$(touch hacked)", "%s%n", "-rf", "C:\\x", "A", "a", "w" * 90]
    keys += [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    rng = np.random.default_rng(0)
    with wds.TarWriter(str(tmp_path / "strange.tar"), mtime=0) as tar:
        for key in keys:
            tar.write({"__key__": key, "jpg": picture(rng, 0)[0]})
    before = tree(tmp_path)
    assert command(tmp_path / "strange.tar").code == 0
    dataset = CachedViews(select(Cache(tmp_path / "feats")))
    assert len(dataset) == len(keys)
    dataset.check_pixels(100)
    shutil.rmtree(tmp_path / "feats")
    assert differences(before, tree(tmp_path)) == []


@pytest.mark.parametrize(
    "stem",
    ["teacher", "codec", "cache", "views", "a[1]*?", "x.y", "é"],
)
def test_strange_names_of_tars_are_names_as_any(
    command: Command, tmp_path: Path, stem: str
) -> None:
    tar = write_tar(tmp_path / "t.tar", 2).rename(tmp_path / f"{stem}.tar")
    assert command(tar).code == 0
    cache = Cache(tmp_path / "feats")
    assert cache.encoders() == ["alpha"]
    assert select(cache).tars == (stem,)
    CachedViews(select(cache)).check_pixels()
    before = tree(cache.root)
    assert command(tar).code == 0 and tree(cache.root) == before


# --- what would run code ---


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def armed_tar(path: Path, canary: Path, count: int = 6) -> Path:
    """A labelled tar whose samples carry pickles under every name that webdataset knows."""
    payload = pickle.dumps(Canary(canary))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x/data.pkl", payload)
        file.writestr("x/version", "3")
    npy = b"\x93NUMPY\x01\x00v\x00" + (
        b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
    )
    rng = np.random.default_rng(0)
    with wds.TarWriter(str(path), mtime=0, encoder=False) as tar:
        for i in range(count):
            image, mask = picture(rng, i % 3)
            arms = {name: payload for name in ("pyd", "pkl", "pickle", "dill", "x.pyd")}
            arms |= {"pth": archive.getvalue(), "pt": archive.getvalue(), "npy": npy + payload}
            plain = {"jpg": image, "cls": str(i % 3).encode(), "seg.png": mask}
            tar.write({"__key__": f"{i:04d}", **arms, **plain})
    return path


def test_the_canary_sings_where_tars_are_decoded_carelessly(tmp_path: Path) -> None:
    tar = armed_tar(tmp_path / "armed.tar", tmp_path / "canary", count=1)
    index = index_tar(tar)
    sample = {"__key__": "a", "pyd": index.read(index.samples[0], "pyd")}
    list(wds.decode()(iter([sample])))
    assert (tmp_path / "canary").exists()


def test_no_command_runs_what_a_tar_carries(
    command: Command, tmp_path: Path, encoder: Path
) -> None:
    from distill.cli import app as distill
    from evaluate.cli import app as evaluate

    canary = tmp_path / "canary"
    tar, test = (armed_tar(tmp_path / f"{name}.tar", canary) for name in ("armed", "test"))
    assert command(tar).code == 0
    done = CliRunner().invoke(
        distill,
        [
            *("--cache", "feats", "--student", STUDENT, "--epochs", "1", "--batch-size", "3"),
            *("--device", "cpu", "--out", "runs/one"),
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    for task in ("knn", "segmentation"):
        done = CliRunner().invoke(
            evaluate,
            [
                *(task, "--encoder", f"alpha={encoder}", "--train", str(tar), "--test", str(test)),
                *("--size", "32", "--device", "cpu"),
            ],
            catch_exceptions=False,
        )
        assert done.exit_code == 0, done.output
    assert not canary.exists()


def careless(source: str) -> list[str]:
    """Calls in `source` that load pickles, run text or shell commands, or decode by name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        safe = {
            "torch.load": given.get("weights_only") == "True",
            "np.load": given.get("allow_pickle", "False") == "False",
        }
        banned = {"pickle.load", "pickle.loads", "eval", "exec", "os.system", "yaml.load"}
        banned |= {"wds.WebDataset", "joblib.load", "marshal.loads"}
        if name in banned or not safe.get(name, True) or given.get("shell") == "True":
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "pickle.loads(x)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "eval(x)",
        "subprocess.run(x, shell=True)",
        "wds.WebDataset(p).decode()",
    ],
)
def test_the_scan_can_find(source: str) -> None:
    assert careless(source)


def test_nothing_in_the_product_could_run_what_it_reads() -> None:
    paths = [path for top in PRODUCT for path in sorted((REPOSITORY / top).rglob("*.py"))]
    assert len(paths) > 50
    assert not {str(p): bad for p in paths if (bad := careless(p.read_text()))}


# --- encoders ---


def flipped_weight(source: Path, folder: Path) -> Path:
    """A copy of a timm folder with the lowest bit of one weight's mantissa flipped."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    bits = weights["blocks.0.mlp.fc1.weight"].view(torch.int32)
    bits[3, 7] ^= 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_one_bit_of_one_weight_is_refused_with_both_hashes(tmp_path: Path, encoder: Path) -> None:
    tar, cache = write_tar(tmp_path / "t.tar", 3), tmp_path / "feats"
    extract(config(cache, [tar], encoder))
    before, old = tree(cache), Cache(cache).encoder("alpha").weights_sha256
    other = flipped_weight(encoder, tmp_path / "other")
    extract(config(tmp_path / "new", [tar], other))
    new = Cache(tmp_path / "new").encoder("alpha").weights_sha256
    # Also where there would be something to compute.
    for tars in ([tar], [tar, write_tar(tmp_path / "u.tar", 3)]):
        with pytest.raises(CacheError, match="another encoder") as error:
            extract(config(cache, tars, other))
        assert old != new and old in str(error.value) and new in str(error.value)
        assert tree(cache) == before


@torch.inference_mode()
def largest(tar: Path, encoder: Path) -> tuple[list[str], np.ndarray]:
    """Keys, and the largest CLS value of each view, by the timm model alone."""
    recipe, index = parse_recipe(LABEL), index_tar(tar)
    model = timm.create_model(f"local-dir:{encoder}", pretrained=True).eval()
    keys, values = [], []
    for sample in index.samples:
        image = decode(index.read(sample, image_extension(sample)), sample.key)
        where = (index.stem, sample.ordinal, sample.key, 0)
        view = recipe.apply(image, draw_view(recipe, 0, *where, *image.shape[1:]))
        tokens = model.forward_features((view[None].float() / 255 - 0.5) / 0.5)
        keys.append(sample.key)
        values.append(tokens[0, 0].abs().max().item())
    return keys, np.array(values)


@pytest.mark.parametrize("case", ["overflow", "infinity", "NaN"])
def test_one_row_that_cannot_be_stored_stops_its_tar_by_name(
    tmp_path: Path, encoder: Path, case: str
) -> None:
    """Weights are scaled so that the CLS token of one image alone leaves the range of float16."""
    tar = write_tar(tmp_path / "t.tar", 12)
    keys, values = largest(tar, encoder)
    order = np.argsort(values)
    bound = {"overflow": 65504.0, "infinity": 3.4e38, "NaN": 3.4e38}[case]
    shutil.copytree(encoder, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    weights = load_file(path)
    between = (values[order[-1]] + values[order[-2]]) / 2
    weights["norm.weight"] = weights["norm.weight"] * (bound / between)
    if case == "NaN":
        weights["norm.bias"] = weights["norm.bias"] + float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(FeatureError) as error:
        extract(config(tmp_path / "feats", [tar], tmp_path / "bad"))
    # Of what cannot be stored, the first row of the tar is named; for an overflow it is the only.
    expected = keys[order[-1]] if case == "overflow" else keys[0]
    assert repr(expected) in str(error.value) and "alpha: " in str(error.value)
    assert ("not finite" in str(error.value)) == (case != "overflow")
    assert not list((tmp_path / "feats").glob("alpha/*/*/*.json"))
    assert not list((tmp_path / "feats").glob(".staging-*"))
