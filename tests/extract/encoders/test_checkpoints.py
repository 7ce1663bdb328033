import argparse
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from extract.cache.errors import UserError
from extract.encoders.checkpoints import CheckpointError, load_strict, map_keys, read_checkpoint

ARCHITECTURE = "vit_tiny_patch16_224"


def small_vit(width: int = 8) -> nn.Module:
    return timm.create_model(
        ARCHITECTURE, num_classes=0, img_size=32, embed_dim=width, depth=1, num_heads=2
    )


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"student": {"a.weight": torch.zeros(1)}, "teacher": s},
        lambda s: {"state_dict": {"module": s}, "optimizer": {"state": {}}},
        lambda s: {"model": {f"module._orig_mod.backbone.{k}": v for k, v in s.items()}},
        lambda s: {"teacher": {f"encoder.{k}": v for k, v in s.items()}},
    ],
)
def test_wrappings_come_off(tmp_path: Path, wrap) -> None:
    torch.save(wrap(STATE), tmp_path / "w.pth")
    assert_same(read_checkpoint(tmp_path / "w.pth"), STATE)


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    assert_same(read_checkpoint(tmp_path / "w.safetensors"), STATE)
    prefixed = {f"encoder.{name}": tensor for name, tensor in STATE.items()}
    save_file(prefixed, tmp_path / "p.safetensors")
    assert_same(read_checkpoint(tmp_path / "p.safetensors"), STATE)
    assert_same(read_checkpoint(tmp_path / "p.safetensors", unwrap=False), prefixed)


class Hostile:
    """Loading this with pickle creates the canary file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    canary, file = tmp_path / "canary", tmp_path / "hostile.pth"
    content = {"state_dict": STATE, "extra": Hostile(canary)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="could run code"):
        read_checkpoint(file)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Hostile(canary)))
    assert canary.exists(), "the canary works, so its absence above means something"


def test_foreign_objects_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "args": {"path": Path("x")}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"\(pathlib\.") as error:
        read_checkpoint(tmp_path / "w.pth")
    assert ".safetensors" in str(error.value)
    allowed = torch.serialization.get_safe_globals()
    assert argparse.Namespace not in allowed, "allowed while reading only"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    save_file(STATE, file) if suffix == ".safetensors" else torch.save(STATE, file)
    file.write_bytes(file.read_bytes()[:-200] if suffix == ".pth" else file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="no whole"):
        read_checkpoint(file)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError):
        read_checkpoint(file)


def test_files_without_named_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights file at"):
        read_checkpoint(tmp_path / "absent.pth")
    for number, content in enumerate(({"epoch": 3}, [torch.zeros(2)], torch.zeros(2))):
        torch.save(content, tmp_path / f"{number}.pth")
        with pytest.raises(CheckpointError, match="holds no tensors by name"):
            read_checkpoint(tmp_path / f"{number}.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "other.pth")


def test_two_encoders_in_one_state_dict_are_refused(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(1), "backbone.a": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds 'a' twice"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_file_that_fits_is_not_touched() -> None:
    model = small_vit()
    state = model.state_dict()
    assert_same(map_keys(state, model, ARCHITECTURE), state)


def test_heads_are_dropped_unless_the_model_has_one() -> None:
    model = small_vit()
    heads = {
        "head.weight": torch.zeros(3, 8),
        "lp.heads.x": torch.zeros(1),
        "fc.bias": torch.ones(3),
    }
    assert_same(map_keys(model.state_dict() | heads, model, ARCHITECTURE), model.state_dict())
    classifier = timm.create_model(
        ARCHITECTURE, num_classes=3, img_size=32, embed_dim=8, depth=1, num_heads=2
    )
    state = classifier.state_dict()
    assert_same(map_keys(state | {"fc.bias": torch.ones(3)}, classifier, ARCHITECTURE), state)


def test_load_strict_says_all_that_is_wrong_and_loads_nothing() -> None:
    model = small_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["norm.weight"]
    state["norm.bias"] = torch.zeros(9)
    state |= {f"extra.{i}": torch.zeros(1) for i in range(6)}
    with pytest.raises(CheckpointError) as error:
        load_strict(model, state, "w.pth")
    message = str(error.value)
    assert message.startswith("w.pth does not fit VisionTransformer")
    assert "1 missing: norm.weight\n" in message
    assert "6 unexpected: extra.0, extra.1, extra.2, extra.3, … (2 more)" in message
    assert "1 of another shape: norm.bias [9], expected [8]" in message
    assert_same(dict(model.state_dict()), before)


def test_load_strict_copies_everything() -> None:
    model, other = small_vit(), small_vit()
    nn.init.normal_(other.norm.weight)
    load_strict(model, other.state_dict(), "other")
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
