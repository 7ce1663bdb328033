"""`unic-extract verify` passes a whole cache and names every kind of damage."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
import zarr
from conftest import SIZE
from safetensors.torch import load_file, save_file

from extract.cache import Cache, CacheError
from extract.cache.images import index_tar
from extract.cache.schema import VIEWS, UnitRecord
from extract.cache.sealed import sealed_bytes
from extract.cache.statistics import Moments
from extract.cache.writer import group_name, object_table
from extract.checking.recompute import compare, tolerance
from extract.checking.verify import Report, VerifyConfig, print_report, verify_cache
from extract.config import ExtractConfig
from extract.run import extract

LABEL = f"unic@{SIZE}"
ALL = 10_000


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut can tell."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def copy(feats: Path, tmp_path: Path) -> Path:
    """A copy of the shared cache that a test may damage; its tars are found by `data` alone."""
    return Path(shutil.copytree(feats, tmp_path / "a" / "b" / "copy"))


@pytest.fixture
def verify(tars: list[Path], encoders: dict[str, Path]) -> Callable[..., Report]:
    """Verifies a cache, with the encoders and tars at hand."""

    def run(cache: Path, **changes: Any) -> Report:
        settings: dict[str, Any] = {
            "cache": cache,
            "data": tuple(map(str, tars)),
            "teachers": {name: str(path) for name, path in encoders.items()},
            "device": "cpu",
            "rows": 8,
        }
        return verify_cache(VerifyConfig(**(settings | changes)))

    return run


def manifest(cache: Path, owner: str, view: int, tar: str) -> Path:
    return Cache(cache).layout.manifest(owner, LABEL, view, tar)


def group(path: Path) -> Path:
    return path.parent / UnitRecord.read(path).group


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def forge(path: Path, change: Callable[[Path], None], **fields: Any) -> UnitRecord:
    """Change the group of a manifest, and write a manifest that is valid for what is there now."""
    record = UnitRecord.read(path)
    folder = path.parent / record.group
    change(folder)
    objects = object_table(folder)
    record = replace(record, objects=objects, group=group_name(record.tar, objects), **fields)
    folder.rename(path.parent / record.group)
    path.write_bytes(sealed_bytes(record.__dict__))
    return record


def assign(array: str, change: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        stored = zarr.open_group(folder)[array]
        values = np.array(stored[:])
        change(values)
        stored[:] = values

    return run


def test_a_whole_cache_is_intact(
    feats: Path, verify: Callable[..., Report], capsys: pytest.CaptureFixture[str]
) -> None:
    report = verify(feats, rows=ALL)
    assert report.problems == [] and report.notes == []
    assert [(line.encoder, line.units, line.rows) for line in report.lines] == [
        ("alpha", 4, 102),
        ("beta", 4, 102),
    ]
    for line in report.lines:
        assert line.agreement is not None and line.agreement.rows == 102
        assert line.agreement.cosine_min > 0.99999 and line.agreement.error < 2e-2
    files = [path for path in feats.rglob("*.zarr/**/*") if path.is_file()]
    assert report.bytes_read == sum(path.stat().st_size for path in files)
    capsys.readouterr()
    print_report(report)
    said = capsys.readouterr()
    assert "intact" in said.out and "alpha/unic@48" in said.out and said.err == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"codec": "int8"},
        {"codec": "int8-zstd"},
        {"codec": "int4"},
        {"codec": "int8", "patches": 4},
        {"patches": 3},
        {"tokens": "cls"},
        {"store_views": "raw"},
        {"store_views": "jpeg"},
        {"batch_size": 5},
    ],
    ids=str,
)
def test_whatever_way_a_cache_is_stored_it_is_intact(
    tmp_path: Path,
    tars: list[Path],
    encoders: dict[str, Path],
    verify: Callable[..., Report],
    changes: dict[str, Any],
) -> None:
    cache = made(tmp_path / "feats", tars, encoders, **changes)
    report = verify(cache, rows=ALL)
    assert report.problems == []
    agreement = report.lines[0].agreement
    assert agreement is not None and agreement.rows == 51


def made(cache: Path, tars: list[Path], encoders: dict[str, Path], **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "data": tuple(map(str, tars)),
        "cache": cache,
        "teachers": (f"alpha={encoders['alpha']}",),
        "recipe": LABEL,
        "views": 1,
        "batch_size": 16,
        "workers": 1,
        "device": "cpu",
    }
    extract(ExtractConfig(**(settings | changes)))
    return cache


FILES = {
    "an inner chunk": ("patches/c/0/0/0", 10, "patches/c/0/0/0 was changed"),
    "a shard's index": ("patches/c/0/0/0", -9, "patches/c/0/0/0 was changed"),
    "keys": ("key/c/0", 3, "key/c/0 was changed"),
    "an array's zarr.json": ("cls/zarr.json", 40, "cls/zarr.json was changed"),
    "the group's zarr.json": ("zarr.json", 20, "zarr.json was changed"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_named(
    copy: Path, verify: Callable[..., Report], name: str
) -> None:
    path, offset, said = FILES[name]
    where = manifest(copy, "alpha", 1, "train-000001")
    flip(group(where) / path, offset)
    for quick in (True, False) if name.endswith("zarr.json") else (False,):
        problems = verify(copy, rows=0, quick=quick).problems
        assert any(said in line and "alpha/unic@48, view 1" in line for line in problems), problems
        assert all("view 1 of train-000001" in line for line in problems)


@pytest.mark.parametrize(
    "name",
    ["tars/train-000000.json", "alpha/teacher.json", f"alpha/{LABEL}/codec.json", "MANIFEST"],
)
def test_a_flipped_bit_in_any_record_is_named(
    copy: Path, verify: Callable[..., Report], name: str
) -> None:
    where = manifest(copy, "alpha", 0, "train-000000") if name == "MANIFEST" else copy / name
    content = where.read_bytes()
    flip(where, content.index(b'_sha256"') + 14)
    assert any(f"{where} does not match its own" in line for line in verify(copy, rows=0).problems)


def test_no_cache_at_all_is_an_error(copy: Path, verify: Callable[..., Report]) -> None:
    flip(copy / "cache.json", 40)
    with pytest.raises(CacheError, match=r"cache\.json"):
        verify(copy)


def test_missing_and_cut_files_are_all_listed(copy: Path, verify: Callable[..., Report]) -> None:
    lost = group(manifest(copy, "alpha", 0, "train-000000")) / "cls" / "c" / "0" / "0"
    lost.unlink()
    cut = group(manifest(copy, "beta", 1, "train-000001")) / "patches" / "c" / "0" / "0" / "0"
    cut.write_bytes(cut.read_bytes()[:-1])
    for quick in (True, False):
        problems = verify(copy, rows=0, quick=quick).problems
        assert any(f"{lost} is missing" in line for line in problems)
        assert any(f"{cut} has" in line and "beta/unic@48" in line for line in problems)


def test_damage_under_a_valid_manifest_is_found(copy: Path, verify: Callable[..., Report]) -> None:
    """Files as their manifests say, yet a chunk that does not hold its own checksum, and a hole."""

    def hole(values: np.ndarray) -> None:
        values[3, 5, 7] = np.nan

    chunk = "patches/c/0/0/0"
    forge(manifest(copy, "alpha", 0, "train-000000"), lambda folder: flip(folder / chunk, 10))
    forge(manifest(copy, "beta", 0, "train-000000"), assign("patches", hole))
    problems = verify(copy, rows=0).problems
    assert len(problems) == 2
    assert any("alpha/" in line and "is damaged" in line for line in problems)
    assert any("beta/" in line and "never written" in line for line in problems)


def swap(values: np.ndarray) -> None:
    values[[4, 9]] = values[[9, 4]]


def test_swapped_features_are_found_by_the_live_encoder_alone(
    copy: Path, verify: Callable[..., Report], capsys: pytest.CaptureFixture[str]
) -> None:
    forge(manifest(copy, "alpha", 1, "train-000001"), assign("cls", swap))
    assert verify(copy, rows=0).problems == []
    report = verify(copy, rows=ALL)
    assert len(report.problems) == 2
    for line, row in zip(report.problems, (4, 9), strict=True):
        assert (
            f"alpha/{LABEL}, view 1 of train-000001, row {row} ('train-000001_{row:04d}')" in line
        )
        assert "cls differ" in line and "cosine" in line
    assert report.lines[0].agreement is not None and report.lines[0].agreement.cosine_min < 0.9
    capsys.readouterr()
    print_report(report)
    said = capsys.readouterr()
    assert len([line for line in said.err.splitlines() if line.startswith("error: ")]) == 2
    assert "intact" not in said.out


def test_one_value_off_by_a_little_is_found(copy: Path, verify: Callable[..., Report]) -> None:
    """Too little for any cosine: the largest error finds it."""

    def nudge(values: np.ndarray) -> None:
        values[2, 3, 4] += np.float16(0.05)

    forge(manifest(copy, "alpha", 0, "train-000000"), assign("patches", nudge))
    (line,) = verify(copy, rows=ALL).problems
    assert "row 2 " in line and "patches differ" in line and "largest error 0.0" in line


def test_an_int8_value_may_be_off_by_one_step_and_not_by_two(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path], verify: Callable[..., Report]
) -> None:
    def nudge(values: np.ndarray) -> None:
        values[2, 3, 4] += 1 if values[2, 3, 4] < 0 else -1

    cache = made(tmp_path / "feats", tars, encoders, codec="int8")
    forge(manifest(cache, "alpha", 0, "train-000000"), assign("patches", nudge))
    report = verify(cache, rows=ALL)
    assert report.problems == [] and report.lines[0].agreement.error > 0.05
    forge(manifest(cache, "alpha", 0, "train-000000"), assign("patches", nudge))
    (line,) = verify(cache, rows=ALL).problems
    assert "row 2 " in line and "patches differ" in line


def test_a_crop_shifted_by_a_pixel_is_found(copy: Path, verify: Callable[..., Report]) -> None:
    """Even where every seal was made to fit."""

    def shift(values: np.ndarray) -> None:
        values[7] += 1 if values[7] == 0 else -1

    views = forge(manifest(copy, VIEWS, 0, "train-000000"), assign("crop_left", shift))
    for name in ("alpha", "beta"):
        where = manifest(copy, name, 0, "train-000000")
        forge(where, lambda folder: None, views=views.seal())
    assert verify(copy, rows=0).problems == []
    problems = verify(copy, rows=ALL).problems
    assert problems and all("row 7 " in line for line in problems)
    assert any("the view is not the one in the cache" in line for line in problems)


def test_features_of_another_extraction_do_not_fit(
    copy: Path,
    tmp_path: Path,
    tars: list[Path],
    encoders: dict[str, Path],
    verify: Callable[..., Report],
) -> None:
    other = made(tmp_path / "other", tars, encoders, seed=3)
    ours, theirs = (manifest(cache, "alpha", 0, "train-000001") for cache in (copy, other))
    shutil.copytree(group(theirs), ours.parent / group(theirs).name)
    shutil.copy(theirs, ours)
    problems = verify(copy, rows=0, quick=True).problems
    assert any("seals of the views do not match" in line for line in problems)
    assert all("alpha/unic@48, view 0 of train-000001" in line for line in problems)


def test_rows_of_other_images_are_found(copy: Path, verify: Callable[..., Report]) -> None:
    forge(manifest(copy, "alpha", 0, "train-000000"), assign("key", swap))
    (line,) = verify(copy, rows=0, quick=True).problems
    assert "alpha/unic@48, view 0 of train-000000: its rows have other keys" in line


def test_views_of_other_images_are_found(copy: Path, verify: Callable[..., Report]) -> None:
    views = forge(manifest(copy, VIEWS, 0, "train-000000"), assign("image_index", swap))
    for name in ("alpha", "beta"):
        where = manifest(copy, name, 0, "train-000000")
        forge(where, lambda folder: None, views=views.seal())
    (line,) = verify(copy, rows=0, quick=True).problems
    assert "its rows are not the images of" in line


@pytest.mark.parametrize("bit", [0, 22])
def test_weights_changed_by_one_bit_are_refused(
    feats: Path, tmp_path: Path, encoders: dict[str, Path], verify: Callable[..., Report], bit: int
) -> None:
    other = Path(shutil.copytree(encoders["alpha"], tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["norm.weight"].view(torch.int32)[5] ^= 1 << bit
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    teachers = {"alpha": str(other), "beta": str(encoders["beta"])}
    (line,) = verify(feats, teachers=teachers).problems
    stored = Cache(feats).encoder("alpha").weights_sha256
    assert f"weights_sha256 {stored!r} in the cache" in line and "--teacher alpha=" in line


def test_a_tar_changed_in_place_is_found(
    feats: Path, tmp_path: Path, tars: list[Path], verify: Callable[..., Report]
) -> None:
    mine = [Path(shutil.copy(tar, tmp_path)) for tar in tars]
    flip(mine[1], index_tar(mine[1]).samples[3].members["cls"].offset)
    data = tuple(map(str, mine))
    assert verify(feats, data=data, quick=True).problems == []
    (line,) = verify(feats, data=data).problems
    assert str(mine[1]) in line and "its sha256 is not the one in the cache" in line
    mine[1].write_bytes(mine[1].read_bytes() + bytes(512))
    problems = verify(feats, data=data, rows=0, quick=True).problems
    assert any(str(mine[1]) in line and "bytes" in line for line in problems)


def test_what_cannot_be_recomputed_is_an_error_unless_left_out(
    copy: Path, verify: Callable[..., Report], encoders: dict[str, Path]
) -> None:
    alone = {"alpha": str(encoders["alpha"])}
    (line,) = verify(copy, teachers=alone).problems
    assert "beta/unic@48" in line and "--teacher beta=FOLDER" in line and "--rows 0" in line
    report = verify(copy, teachers={}, rows=0)
    assert report.problems == [] and any("--rows 0" in note for note in report.notes)
    lost = verify(copy, data=())
    assert lost.problems and all("--data" in line for line in lost.problems)
    assert any("2 tars that are not where" in note for note in lost.notes)


def test_a_checkpoint_file_names_the_weights_too(
    feats: Path, encoders: dict[str, Path], verify: Callable[..., Report]
) -> None:
    """Of a plain timm architecture; this one's has other arguments, so it is refused by name."""
    teachers = {
        "alpha": str(encoders["alpha"] / "model.safetensors"),
        "beta": str(encoders["beta"]),
    }
    (line,) = verify(feats, teachers=teachers).problems
    assert "alpha/unic@48: the weights could not be loaded" in line and "safetensors" in line


def test_an_incomplete_cache_is_intact_and_says_so(
    copy: Path, verify: Callable[..., Report]
) -> None:
    where = manifest(copy, "beta", 1, "train-000001")
    shutil.rmtree(group(where))
    where.unlink()
    report = verify(copy)
    assert report.problems == []
    assert report.notes == [f"incomplete: beta/{LABEL} lacks 1 units (unic-extract info)"]


def test_comparison_is_in_standardized_space() -> None:
    """A large common mean would hide any difference from a plain cosine."""
    rng = np.random.default_rng(0)
    live = torch.from_numpy(rng.normal(size=(2, 3, 8))).float() + 100
    stored = live.clone()
    stored[1, 2] = live[1, 1]
    moments = Moments.of(live.numpy())
    cosine_BT, error_BT, beyond_B = compare(stored, live, moments, torch.full_like(live, 0.01))
    assert beyond_B.tolist() == [False, True]
    assert cosine_BT[1, 2] < 0.9 and error_BT[1, 2] > 0.1
    assert cosine_BT.flatten()[:5].min() > 0.9999
    live[0, 0] = stored[0, 0] = torch.from_numpy(moments.mean).float()
    assert compare(stored, live, moments, torch.full_like(live, 0.01))[0][0, 0] == 1
    stored[0, 0, 0] = float("nan")
    assert compare(stored, live, moments, torch.full_like(live, 0.01))[2].tolist() == [True, True]


def test_one_rounding_to_float16_is_allowed_however_large_the_mean() -> None:
    rng = np.random.default_rng(0)
    live = torch.from_numpy(rng.normal(500, 0.1, (64, 8))).float()
    moments = Moments.of(live.numpy())
    allowed = tolerance(live, moments, 0.02)
    assert ((live.half().float() - live).abs() <= allowed).all()
    assert not ((live.half().float() - live).abs() <= 0.02 * 0.1).all()
    assert allowed.max() < 0.6


def test_a_copied_encoder_folder_is_found(copy: Path, verify: Callable[..., Report]) -> None:
    shutil.copytree(copy / "alpha", copy / "gamma")
    (line,) = verify(copy, rows=0).problems
    assert line == "gamma/teacher.json: it is of an encoder named 'alpha'"


def test_a_renamed_group_is_found(copy: Path, verify: Callable[..., Report]) -> None:
    where = manifest(copy, "alpha", 0, "train-000000")
    record = UnitRecord.read(where)
    group(where).rename(where.parent / "other.zarr")
    where.write_bytes(sealed_bytes(replace(record, group="other.zarr").__dict__))
    (line,) = verify(copy, rows=0).problems
    assert "name and content of the group" in line and "other.zarr" in line


def test_a_tar_with_other_keys_is_found_without_its_hash(
    feats: Path, tmp_path: Path, tars: list[Path], verify: Callable[..., Report]
) -> None:
    index, other = index_tar(tars[0]), {3: 7, 7: 3}
    mine = tmp_path / tars[0].name
    with wds.TarWriter(str(mine), mtime=0) as out:
        for i, sample in enumerate(index.samples):
            members = {ext: index.read(sample, ext) for ext in sample.members}
            out.write({"__key__": index.samples[other.get(i, i)].key, **members})
    assert mine.stat().st_size == tars[0].stat().st_size
    problems = verify(feats, data=(str(mine), str(tars[1])), rows=0, quick=True).problems
    assert problems == [f"{mine}: its keys are not those of tars/train-000000.json"]
