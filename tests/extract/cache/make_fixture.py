"""Makes `fixture/cache.tar.xz`, the small cache that the tests keep. Run once a format version:

    uv run python tests/extract/cache/make_fixture.py

One tar of four pictures, the last of which is cut in half and skipped, and encoders with random
weights over three recipes: two training views made again from the tar, one view stored as JPEG and
one stored raw; all codecs, kept patches, CLS tokens alone. Nothing in it names a place or a time.
It is packed because most of its 250 kB are the padding and metadata of tiny chunks. The golden
numbers in test_foreign_reader.py are those of the stored files, not of another run.
"""

import contextlib
import io
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from extract.config import ExtractConfig
from extract.run import extract

FIXTURE = Path(__file__).parent / "fixture" / "cache.tar.xz"
SIZE, WIDTH = 16, 8
EXTRACTIONS: tuple[dict[str, Any], ...] = (
    {"recipe": "center@16r20", "teachers": ("four",), "codec": "fp16", "store_views": "raw"},
    {"recipe": "center@16r20", "teachers": ("kept",), "tokens": "cls"},
    {"recipe": "center@16", "teachers": ("four",), "codec": "int8-zstd", "store_views": "jpeg"},
    {"recipe": "unic@16", "teachers": ("four",), "codec": "int4"},
    {"recipe": "unic@16", "teachers": ("kept",), "codec": "int8", "patches": 3},
)
PATCH_SIZES = {"four": 4, "kept": 8}


def picture(rng: np.random.Generator, kind: str) -> bytes:
    """A smooth ramp with noise, 24 to 40 pixels a side."""
    height, width = rng.integers(24, 41, 2)
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([rows * 5, columns * 6, 255 - rows * 3 - columns * 2], axis=-1)
    pixels = (ramp + rng.integers(-30, 31, ramp.shape)).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write_tar(path: Path) -> None:
    rng = np.random.default_rng(2024)
    pictures = {f"n0{i}/ü{i}": picture(rng, kind) for i, kind in enumerate(("JPEG", "PNG", "JPEG"))}
    pictures["n03/cut"] = picture(rng, "JPEG")[:-200]
    with tarfile.open(path, "w") as archive:
        for i, (key, data) in enumerate(pictures.items()):
            members = {
                f"{key}.cls": str(i % 2).encode(),
                f"{key}.{'PNG' if i == 1 else 'jpg'}": data,
            }
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_encoder(folder: Path, patch_size: int) -> None:
    """A timm folder with a ViT of two blocks; weights are drawn, so they are large enough to tell.

    The second position's embedding is ten times as large, for tokens beyond a codec's range.
    """
    shape = {"img_size": SIZE, "patch_size": patch_size, "embed_dim": WIDTH, "depth": 2}
    arguments = {**shape, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(patch_size)
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        model.pos_embed[:, 2] *= 10
    cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, SIZE, SIZE], "license": "mit"}
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": cfg},
        model_args=arguments,
        safe_serialization=True,
    )


def pack(paths: list[Path], target: Path) -> None:
    """The files below `paths` in a tar that depends on names and content alone."""
    target.parent.mkdir(exist_ok=True)
    files = sorted(file for path in paths for file in (path, *path.rglob("*")) if file.is_file())
    with tarfile.open(target, "w:xz") as archive:
        for file in files:
            member = tarfile.TarInfo(file.as_posix())
            member.size = file.stat().st_size
            with file.open("rb") as content:
                archive.addfile(member, content)


def main() -> None:
    """Write the fixture anew, from relative paths alone: they are recorded."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        write_tar(Path("photos.tar"))
        for name, patch_size in PATCH_SIZES.items():
            write_encoder(Path(name), patch_size)
        for changes in EXTRACTIONS:
            names = tuple(f"{name}={name}" for name in changes["teachers"])
            options = {"views": 2 if changes["recipe"] == "unic@16" else 1, **changes}
            plain = {"data": ("photos.tar",), "cache": Path("feats"), "device": "cpu"}
            bad = {"skip_bad": True, "max_bad": 0.5, "workers": 1}
            extract(ExtractConfig(**{**plain, **bad, **options, "teachers": names}))
        pack([Path("feats"), Path("photos.tar")], FIXTURE)


if __name__ == "__main__":
    main()
