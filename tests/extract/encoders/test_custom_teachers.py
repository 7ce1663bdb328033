"""Encoders of one's own: the example of the documentation, and everything that can be wrong."""

import json
import re
from pathlib import Path

import pytest
import torch
import torchvision

from extract.config import ExtractConfig
from extract.encoders.encoder import EncoderError
from extract.run import extract
from extract.teachers import encoder_folder, load_encoder

DOCS = Path(__file__).parents[3] / "docs" / "teachers.md"
GOOD = """
import torch
from torch import nn
from torch.nn import functional as F


class Tokens(nn.Module):
    mean, std = [0.5] * 3, [0.25] * 3

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pixels):
        patches = F.unfold(pixels, 16, stride=16).mT * self.scale
        return {"cls": patches.mean(1), "patches": patches}


def build(*, size):
    return Tokens(size)
"""


def write(folder: Path, code: str = GOOD) -> str:
    (folder / "own.py").write_text(code)
    return f"{folder / 'own.py'}:build"


def views(size: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "my_resnet.py").write_text(blocks[0])
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    encoder = load_encoder(f"{tmp_path}/my_resnet.py:build", size=96)
    tokens, spec = encoder(views(96)), encoder.spec
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    resnet.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = resnet.eval()((views(96) / 255 - mean) / std)
    torch.testing.assert_close(tokens["cls"], expected)
    torch.testing.assert_close(tokens["patches"].mean(1), expected)
    assert (spec.grid, spec.cls_width, spec.global_token) == ((3, 3), 512, "pool")
    assert (spec.source, spec.architecture) == ("file:my_resnet.py:build", "Tokens")
    assert (spec.name, spec.licence) == ("my_resnet-build", "bsd-3-clause")


def test_documented_attributes_are_those_that_are_read() -> None:
    from dataclasses import fields

    from extract.encoders.custom import Description

    table = DOCS.read_text().partition("| attribute | |")[2].partition("\n\n")[0]
    documented = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.split("\n")[2:]))
    assert documented == [field.name for field in fields(Description)]


def test_features_go_into_a_cache_under_a_name(tmp_path: Path, tars: list[Path]) -> None:
    name = write(tmp_path)
    config = ExtractConfig(
        data=(str(tars[0]),),
        cache=tmp_path / "feats",
        teachers=(f"mine={name}",),
        recipe="unic@48",
        views=1,
        workers=1,
        device="cpu",
    )
    list(extract(config))
    record = json.loads((tmp_path / "feats" / "mine" / "teacher.json").read_text())
    assert record["source"] == "file:own.py:build"
    assert record["arrays"] == {"cls": [768], "patches": [9, 768]}
    assert (record["mean"], record["std"]) == ([0.5] * 3, [0.25] * 3)


def test_the_weights_are_fingerprinted(tmp_path: Path) -> None:
    name = write(tmp_path)
    first = load_encoder(name, size=32).spec
    assert first.sha256 == load_encoder(name, size=64).spec.sha256
    assert first.licence == "unknown" and first.parameters == 1
    write(tmp_path, GOOD.replace("torch.ones(1)", "torch.zeros(1)"))
    assert load_encoder(name, size=32).spec.sha256 != first.sha256


def test_it_is_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    code = GOOD.replace("* self.scale", "* self.scale * (1 + self.training)")
    encoder = load_encoder(write(tmp_path, code), size=32)
    plain = load_encoder(write(tmp_path), size=32)
    encoder.train()
    assert torch.equal(encoder(views(32))["cls"], plain(views(32))["cls"])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_names_and_grids_of_ones_own(tmp_path: Path) -> None:
    code = GOOD.replace(
        "mean, std =", "grid, tap, patch_size = (1, 4), 'norm', 16\n    mean, std ="
    )
    code = code.replace('"patches": patches}', '"patches": patches, "registers": patches[:, :2]}')
    encoder = load_encoder(write(tmp_path, code), size=32)
    assert encoder.spec.grid == (1, 4) and encoder.spec.tap == "norm"
    assert encoder.spec.patch_size == 16
    assert encoder(views(32))["registers"].shape == (2, 2, 768)
    names = {
        "a/own.py:build": "own-build",
        "my file.py:vit_l": "my-file-vit_l",
        "mine=own.py:build": "mine",
    }
    assert {name: encoder_folder(name) for name in names} == names


def test_a_module_beside_the_file_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_own.py").write_text(GOOD)
    name = write(tmp_path, "from neighbour_of_own import build\n")
    assert load_encoder(name, size=32).spec.grid == (2, 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def build", "def make", r"own.py has no function 'build'; it has: make"),
        ("return Tokens(size)", "return 3", r"own.py:build returned a int, expected a torch.nn"),
        ("return Tokens(size)", "return Tokens", r"own.py:build returned a type"),
        ("mean, std =", "mean, sd =", r"no attribute std; give it the three numbers"),
        ("[0.25] * 3", "[0.25]", r"std = \[0.25\], expected three numbers"),
        ("[0.25] * 3", "[0.0] * 3", r"std = .* expected three numbers"),
        (
            "mean, std =",
            "tap = 'last'\n    mean, std =",
            r"tap = 'last', expected one of",
        ),
        ('return {"cls"', 'return {"CLS"', r"gave a dict of CLS, patches, expected a dict with"),
        ('return {"cls": patches.mean(1), "patches": patches}', "return patches", r"gave float32"),
        ("patches.mean(1)", "patches", r"'cls' as float32 \[2, 4, 768\] .* expected .* \[2, D\]"),
        ('"patches": patches', '"patches": patches[:1]', r"'patches' as float32 \[1, 4, 768\]"),
        ('"patches": patches', '"patches": patches.long()', r"'patches' as int64"),
        ('"patches": patches', '"patches": patches[:, 1:]', r"3 patch tokens, which is no grid"),
        ('"patches": patches', '"patches": patches, "key": patches', r"'key' cannot name tokens"),
        ("stride=16", "stride=0", r"the encoder of own.py:build failed in line 15: RuntimeError"),
        ("import torch\n", "import no_such_module\n", r"own.py failed in line 2: ModuleNotFound"),
        ("(*, size)", "(pixels)", r"own.py:build failed.*TypeError: .*'size'"),
        ("class Tokens", "class = Tokens", r"own.py failed in line 7: SyntaxError"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(EncoderError, match=message):
        load_encoder(write(tmp_path, GOOD.replace(old, new, 1)), size=32)


def test_files_functions_and_options_that_do_not_go_together(tmp_path: Path) -> None:
    name = write(tmp_path)
    with pytest.raises(EncoderError, match=r"no file at .*absent.py"):
        load_encoder(f"{tmp_path}/absent.py:build")
    with pytest.raises(EncoderError, match=r"name the function .*own.py:build"):
        load_encoder(f"{tmp_path}/own.py")
    with pytest.raises(EncoderError, match="leave out --weights"):
        load_encoder(name, weights=tmp_path / "w.pth")
    with pytest.raises(EncoderError, match="leave out --weights and other"):
        load_encoder(name, global_token="cls")
