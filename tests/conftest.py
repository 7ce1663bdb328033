"""Small real things that many tests share: labelled tars and tiny ViTs in timm's folder format."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import webdataset as wds
import zarr
from PIL import Image

# Tiny tensors gain nothing from threads, and lose much where tests run side by side.
torch.set_num_threads(1)

SIZE = 48
ARCHITECTURE = "vit_tiny_patch16_224"
TINY = {
    **{"img_size": SIZE, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2},
    **{"num_classes": 0},
}
STUDENT = f"{ARCHITECTURE} patch_size=16 embed_dim=32 depth=3 num_heads=2"


def picture(rng: np.random.Generator, label: int) -> tuple[bytes, bytes]:
    """A noisy JPEG whose colour is its class, and a PNG mask with one box of category label + 1."""
    height, width = int(rng.integers(50, 80)), int(rng.integers(50, 80))
    image = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    image[..., label] += 120
    mask = np.zeros((height, width), np.uint8)
    mask[10:30, 20:45] = label + 1
    image[10:30, 20:45] //= 2
    return encoded(image, "JPEG"), encoded(mask, "PNG")


def encoded(array: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, count: int, seed: int = 0) -> Path:
    """A WebDataset tar of `count` labelled pictures of 3 classes."""
    rng = np.random.default_rng([seed, count])
    with wds.TarWriter(str(path), mtime=0) as tar:
        for i in range(count):
            image, mask = picture(rng, label := i % 3)
            sample = {"jpg": image, "cls": str(label), "seg.png": mask}
            tar.write({"__key__": f"{path.stem}_{i:04d}", **sample})
    return path


def write_encoder(folder: Path, seed: int, **changes: int) -> Path:
    """A timm folder with a tiny ViT of random weights (`changes` to TINY)."""
    arguments = {**TINY, **changes}
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, **arguments)
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={
            "pretrained_cfg": {
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
                "license": "apache-2.0",
                "input_size": [3, SIZE, SIZE],
            }
        },
        model_args=arguments,
        safe_serialization=True,
    )
    return folder


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two training tars, 30 and 21 pictures. Read-only: copy before changing anything."""
    folder = tmp_path_factory.mktemp("tars")
    return [write_tar(folder / f"train-{i:06d}.tar", n, seed=i) for i, n in enumerate((30, 21))]


@pytest.fixture(scope="session")
def test_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test tar of 24 pictures."""
    return write_tar(tmp_path_factory.mktemp("test-tars") / "test-000000.tar", 24, seed=9)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny encoders of one grid, `alpha` and `beta`, and `wide` of another grid and width."""
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "alpha": write_encoder(folder / "alpha", 0),
        "beta": write_encoder(folder / "beta", 1),
        "wide": write_encoder(folder / "wide", 2, patch_size=12, embed_dim=48),
    }


@pytest.fixture(scope="session")
def feats(
    tmp_path_factory: pytest.TempPathFactory, tars: list[Path], encoders: dict[str, Path]
) -> Path:
    """A complete cache of `alpha` and `beta` over both tars, two views of unic@48. Read-only."""
    return make_cache(tmp_path_factory.mktemp("cache") / "feats", tars, encoders)


def make_cache(
    root: Path,
    tars: list[Path],
    encoders: dict[str, Path],
    names: tuple[str, ...] = ("alpha", "beta"),
) -> Path:
    """Extract `names` over `tars` into `root`."""
    from extract.config import ExtractConfig
    from extract.run import extract

    config = ExtractConfig(
        data=tuple(map(str, tars)),
        cache=root,
        teachers=tuple(f"{name}={encoders[name]}" for name in names),
        recipe=f"unic@{SIZE}",
        views=2,
        batch_size=16,
        workers=2,
        device="cpu",
    )
    extract(config)
    return root


def open_unit(cache: Path, owner: str, view: int, stem: str, label: str = f"unic@{SIZE}") -> Any:
    """The Zarr group of a unit, by its manifest, opened by zarr-python."""
    manifest = cache / owner / label / str(view) / f"{stem}.json"
    return zarr.open_group(manifest.parent / json.loads(manifest.read_text())["group"], mode="r")


@pytest.fixture
def fresh_cache(tmp_path: Path, tars: list[Path], encoders: dict[str, Path]) -> Callable[..., Path]:
    """Makes a cache of one's own that a test may damage: `fresh_cache("alpha", "beta")`."""
    return lambda *names: make_cache(tmp_path / "feats", tars, encoders, names or ("alpha", "beta"))
