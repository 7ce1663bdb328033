"""Conversion from codec to codec: the same bits as extraction, resumable, and harmless."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZE, make_cache

from extract.cache.dataset import CachedViews
from extract.cache.errors import CacheError, UserError
from extract.cache.reader import Cache, select
from extract.cache.schema import CODECS
from extract.config import ExtractConfig
from extract.convert import ConvertConfig, convert
from extract.run import extract

LABEL = f"unic@{SIZE}"


def tree(root: Path) -> dict[str, bytes]:
    """Every file but the tars' records, which say where the tars are, seen from the cache."""
    return {
        name: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not (name := path.relative_to(root).as_posix()).startswith("tars/")
    }


@pytest.fixture
def extracted(tmp_path: Path, tars: list[Path], encoders: dict[str, Path]) -> Callable[..., Path]:
    def run(folder: str, **changes: Any) -> Path:
        plain = ExtractConfig(
            data=tuple(map(str, tars)),
            cache=tmp_path / folder,
            teachers=tuple(f"{name}={encoders[name]}" for name in ("alpha", "beta")),
            recipe=LABEL,
            views=2,
            batch_size=16,
            workers=2,
            device="cpu",
        )
        extract(replace(plain, **changes))
        return tmp_path / folder

    return run


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("patches", [None, 4])
def test_from_fp16_it_is_what_extraction_would_have_made(
    extracted: Callable[..., Path], tmp_path: Path, codec: str, patches: int | None
) -> None:
    plain = extracted("plain", patches=patches)
    direct = extracted("direct", codec=codec, patches=patches)
    before = tree(plain)
    done = convert(ConvertConfig(plain, tmp_path / "converted", codec))
    assert [(line.encoder, line.before, line.after) for line in done] == [
        ("alpha", "fp16", codec),
        ("beta", "fp16", codec),
    ]
    assert tree(tmp_path / "converted") == tree(direct)
    assert tree(plain) == before
    ratio = done[0].bytes_after / done[0].bytes_before
    assert ratio < {"fp16": 1.01, "int8": 0.9, "int8-zstd": 0.9, "int4": 0.8}[codec]
    CachedViews(select(Cache(tmp_path / "converted"))).check_pixels(1000)


def test_back_to_fp16_and_on(feats: Path, tmp_path: Path) -> None:
    convert(ConvertConfig(feats, tmp_path / "a", "int8", ("beta",)))
    convert(ConvertConfig(tmp_path / "a", tmp_path / "b", "fp16"))
    assert Cache(tmp_path / "b").encoders() == ["beta"]
    tokens = [
        CachedViews(select(Cache(tmp_path / name)), pixels=False).__getitems__(range(102))
        for name in ("a", "b")
    ]
    assert torch.equal(*(t["targets"]["beta"]["patches"] for t in tokens))


def test_a_conversion_goes_on_where_it_stopped(feats: Path, tmp_path: Path) -> None:
    convert(ConvertConfig(feats, tmp_path / "whole", "int8"))
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    manifest = next((tmp_path / "part" / "beta" / LABEL / "1").glob("*.json"))
    manifest.unlink()
    (tmp_path / "part" / "cache.json").unlink()
    next((tmp_path / "part" / "views" / LABEL / "0").glob("*.json")).unlink()
    with pytest.raises(CacheError, match="is not empty and is no feature cache"):
        convert(ConvertConfig(feats, tmp_path / "part", "int8"))
    shutil.copy(feats / "cache.json", tmp_path / "part")
    convert(ConvertConfig(feats, tmp_path / "part", "int8"))
    assert tree(tmp_path / "part") == tree(tmp_path / "whole")


def test_what_cannot_be_is_refused(feats: Path, tmp_path: Path, fresh_cache: Any) -> None:
    with pytest.raises(UserError, match="--codec 'zip' is unknown"):
        ConvertConfig(feats, tmp_path / "a", "zip")
    with pytest.raises(UserError, match="is the cache itself"):
        ConvertConfig(feats, feats, "int8")
    with pytest.raises(CacheError, match="no features of 'gamma'"):
        convert(ConvertConfig(feats, tmp_path / "a", "int8", ("gamma",)))
    convert(ConvertConfig(feats, tmp_path / "b", "int8"))
    with pytest.raises(CacheError, match="was begun with codec int8, now int4"):
        convert(ConvertConfig(feats, tmp_path / "b", "int4"))


def test_damage_is_not_converted(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    cache = make_cache(tmp_path / "feats", tars, encoders, ("alpha",))
    shard = next((cache / "alpha").rglob("patches/c/0/0/0"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CacheError, match="chunk 0 is damaged"):
        convert(ConvertConfig(cache, tmp_path / "other", "int8"))


def test_a_cls_cache_stays_float16(extracted: Callable[..., Path], tmp_path: Path) -> None:
    plain = extracted("plain", tokens="cls")
    (alpha, _) = convert(ConvertConfig(plain, tmp_path / "other", "int8"))
    assert alpha.after == "fp16" and alpha.bytes_after == alpha.bytes_before
