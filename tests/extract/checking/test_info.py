"""`unic-extract info`: what is there, what is missing, and that no features are read for it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import SIZE
from rich.console import Console

from extract.cache import Cache, CacheError, select
from extract.cache.schema import UnitRecord
from extract.checking.info import describe_cache, info_json
from extract.checking.info_report import print_info
from extract.config import ExtractConfig
from extract.run import extract

LABEL = f"unic@{SIZE}"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut can tell."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def copy(feats: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(feats, tmp_path / "copy"))


def printed(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    print_info(describe_cache(root), Console(width=200))
    return " ".join(capsys.readouterr().out.split())


def test_a_complete_cache(feats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = describe_cache(feats)
    assert info.complete and (info.tars, info.images, info.skipped, info.seed) == (2, 51, 0, 0)
    assert [part.owner for part in info.parts] == ["views", "alpha", "beta"]
    for part in info.parts:
        assert (part.recipe, part.units, part.expected, part.rows) == (LABEL, 4, 4, 102)
        groups = (feats / part.owner).rglob("*.zarr/**/*")
        assert part.bytes == sum(path.stat().st_size for path in groups if path.is_file())
    alpha = info.parts[1]
    assert (alpha.codec, alpha.arrays) == ("fp16", {"cls": [32], "patches": [9, 32]})
    assert (info.leftovers, info.unreadable, info.evaluation) == ([], [], [])
    said = printed(feats, capsys)
    record = Cache(feats).encoder("alpha")
    for part in ("51 images in 2 tars", "; complete", record.weights_sha256[:12], "apache-2.0"):
        assert part in said
    assert "INCOMPLETE" not in said and "missing" not in said
    assert json.loads(json.dumps(info_json(info)))["complete"] is True


def test_statistics_are_those_of_all_rows(feats: Path) -> None:
    found = describe_cache(feats).parts[1].statistics["patches"]
    rows = np.concatenate(
        [
            zarr.open_group(group)["patches"][:].astype(np.float64).reshape(-1, 32)
            for group in sorted(feats.glob(f"alpha/{LABEL}/*/*.zarr"))
        ]
    )
    std_D = rows.std(0, ddof=1)
    assert found["count"] == len(rows) == 102 * 9
    assert found["std_min"] == pytest.approx(std_D.min(), rel=1e-3)
    assert found["std_max"] == pytest.approx(std_D.max(), rel=1e-3)
    assert std_D.min() < found["std_median"] < std_D.max()
    assert found["mean_rms"] == pytest.approx(np.sqrt((rows.mean(0) ** 2).mean()), rel=1e-3)


def test_what_is_missing_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Cache(copy).layout.manifest("beta", LABEL, 1, "train-000001")
    group = manifest.parent / UnitRecord.read(manifest).group
    manifest.unlink()
    (copy / ".staging-0123").mkdir()
    info = describe_cache(copy)
    assert not info.complete
    beta = info.parts[2]
    assert (beta.units, beta.expected, beta.missing) == (3, 4, ["view 1 of train-000001"])
    assert info.leftovers == [".staging-0123", str(group.relative_to(copy))]
    said = printed(copy, capsys)
    assert "INCOMPLETE" in said and f"missing of beta/{LABEL}: view 1 of train-000001" in said
    assert group.name in said and ".staging-0123" in said


def test_a_tar_that_was_only_begun_counts_as_missing(copy: Path) -> None:
    for path in [*copy.glob("*/*/*/train-000001*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    info = describe_cache(copy)
    assert [(part.units, part.expected) for part in info.parts] == [(2, 4)] * 3
    assert info.parts[0].missing == ["view 0 of train-000001", "view 1 of train-000001"]


def test_features_are_not_read_and_damage_is_only_told(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in copy.glob("*/*/*/*.zarr"):
        shutil.rmtree(path)
    assert describe_cache(copy).complete
    manifest = Cache(copy).layout.manifest("alpha", LABEL, 0, "train-000000")
    manifest.write_bytes(manifest.read_bytes()[:-40])
    record = copy / "beta" / "teacher.json"
    record.write_text("{}")
    info = describe_cache(copy)
    assert not info.complete and len(info.unreadable) == 2
    assert any(str(manifest) in line for line in info.unreadable)
    assert f"damaged: {record}" in printed(copy, capsys)


def test_two_recipes_codecs_and_subsets_are_told_apart(
    tmp_path: Path,
    tars: list[Path],
    encoders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = {"data": tuple(map(str, tars)), "cache": tmp_path, "workers": 1, "device": "cpu"}
    alpha, wide = f"alpha={encoders['alpha']}", f"wide={encoders['wide']}"
    extract(
        ExtractConfig(teachers=(alpha,), recipe=LABEL, views=1, codec="int8", patches=4, **common)
    )
    center = f"center@{SIZE}"
    extract(
        ExtractConfig(
            teachers=(wide,), recipe=center, views=1, tokens="cls", store_views="jpeg", **common
        )
    )
    info = describe_cache(tmp_path)
    assert info.complete
    parts = {(part.owner, part.recipe): part for part in info.parts}
    assert set(parts) == {
        ("views", LABEL),
        ("patches@3x3", LABEL),
        ("alpha", LABEL),
        ("views", center),
        ("wide", center),
    }
    stored = parts["alpha", LABEL]
    assert (stored.codec, stored.patches) == ("int8", 4) and stored.fidelity["cosine_p1"] > 0.99
    assert (parts["wide", center].arrays, parts["views", center].pixels) == ({"cls": [48]}, "jpeg")
    said = printed(tmp_path, capsys)
    assert "int8, 4 patches" in said and "fp16, CLS only" in said and "jpeg pixels" in said


def test_caches_of_evaluation_are_pointed_at(
    copy: Path, feats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(feats, copy / "eval" / "pets-train")
    assert describe_cache(copy).evaluation == ["pets-train"]
    assert [part.owner for part in describe_cache(copy).parts] == ["views", "alpha", "beta"]
    assert "pets-train" in printed(copy, capsys)
    assert select(Cache(copy)).encoders == ("alpha", "beta")


def test_what_is_no_cache_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not a feature cache"):
        describe_cache(tmp_path)
