"""Codecs, kept patches, CLS tokens alone and stored pixels, from extraction to the reader."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZE, open_unit

from extract.cache.dataset import Batch, CachedViews
from extract.cache.errors import CacheError, UserError
from extract.cache.images import decode
from extract.cache.reader import Cache, select
from extract.cache.schema import CodecRecord, UnitRecord
from extract.config import ExtractConfig
from extract.run import extract

LABEL = f"unic@{SIZE}"


@pytest.fixture
def make(tmp_path: Path, tars: list[Path], encoders: dict[str, Path]) -> Any:
    """Extracts with changes to a plain configuration; returns the cache's folder."""

    def run(folder: str = "feats", names: tuple[str, ...] = ("alpha",), **changes: Any) -> Path:
        plain = ExtractConfig(
            data=tuple(map(str, tars)),
            cache=tmp_path / folder,
            teachers=tuple(f"{name}={encoders[name]}" for name in names),
            recipe=LABEL,
            views=2,
            batch_size=16,
            workers=2,
            device="cpu",
        )
        extract(replace(plain, **changes))
        return tmp_path / folder

    return run


def everything(cache: Path, **options: Any) -> Batch:
    dataset = CachedViews(select(Cache(cache)), **options)
    return dataset.__getitems__(range(len(dataset)))


@pytest.mark.parametrize(("codec", "bound"), [("int8", 0.03), ("int8-zstd", 0.05), ("int4", 0.14)])
def test_quantised_features_are_read_back(make: Any, feats: Path, codec: str, bound: float) -> None:
    cache = make(codec=codec)
    plain, coded = everything(feats)["targets"]["alpha"], everything(cache)["targets"]["alpha"]
    assert torch.equal(plain["cls"], coded["cls"])
    assert coded["patches"].dtype == torch.float16
    record = Cache(cache).codec("alpha", LABEL)
    mean, std = (torch.tensor(record.calibration[key]) for key in ("mean", "std"))
    before, after = ((t["patches"].float() - mean) / std for t in (plain, coded))
    assert 0.2 * bound < (after - before).norm() / before.norm() < bound
    assert 0 < record.fidelity["relative_l2"] < bound
    moments, exact = (select(Cache(c)).statistics("alpha") for c in (cache, feats))
    np.testing.assert_array_equal(moments["patches"].mean, exact["patches"].mean)
    # The trainer's way: as stored, decoded later.
    dataset = CachedViews(select(Cache(cache)), decode=False)
    raw = dataset.__getitems__([5, 99])
    assert raw["targets"]["alpha"]["patches"].dtype in (torch.int8, torch.uint8)
    assert torch.equal(
        dataset.decoded(raw)["targets"]["alpha"]["patches"], coded["patches"][[5, 99]]
    )


def test_the_calibration_is_of_the_first_rows_of_the_first_tar(
    make: Any, feats: Path, tars: list[Path]
) -> None:
    record = Cache(make(codec="int8")).codec("alpha", LABEL)
    first = np.asarray(open_unit(feats, "alpha", 0, tars[0].stem)["patches"][:256])
    flat = first.astype(np.float64).reshape(-1, first.shape[-1])
    np.testing.assert_allclose(record.calibration["mean"], flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(record.calibration["std"], flat.std(0, ddof=1), rtol=1e-5)


def test_the_way_of_storing_is_chosen_once(make: Any) -> None:
    cache = make(codec="int8")
    make()  # Without a word, as the cache has it.
    for changes, flag in (
        ({"codec": "int4"}, "--codec"),
        ({"tokens": "cls"}, "--tokens"),
        ({"patches": 4}, "--patches"),
    ):
        with pytest.raises(
            CacheError, match=rf"stored as int8 with all patch tokens, which {flag}"
        ):
            make(**changes)
    assert Cache(cache).codec("alpha", LABEL).codec == "int8"


def test_a_way_of_storing_that_nothing_relies_on_may_change(make: Any, tmp_path: Path) -> None:
    cache = make(codec="int8")
    for path in (cache / "alpha" / LABEL).glob("*/*.json"):
        path.unlink()
    make(codec="int4")
    assert Cache(cache).codec("alpha", LABEL).codec == "int4"


@pytest.mark.parametrize(
    "changes",
    [{"codec": "zip"}, {"tokens": "some"}, {"store_views": "png"}, {"patches": 0}, {"patches": 99}],
)
def test_impossible_wishes_are_refused(make: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(changes)).replace('_', '-')}"):
        make(**changes)


def test_a_subset_keeps_the_same_patches_for_every_encoder(make: Any, feats: Path) -> None:
    cache = make(patches=4)
    make(names=("beta",), patches=4)
    batch, plain = everything(cache), everything(feats)
    positions = batch["positions"]["alpha"]
    assert torch.equal(positions, batch["positions"]["beta"])
    assert positions.shape == (102, 4)
    assert torch.all(positions[:, 1:] > positions[:, :-1])
    # Every position of the grid is kept about as often as any other, and views differ.
    counts = torch.bincount(positions.flatten(), minlength=9)
    assert counts.min() > 25 and counts.max() < 70
    assert not torch.equal(positions[0], positions[1])
    for name in ("alpha", "beta"):
        whole = plain["targets"][name]["patches"]
        wanted = whole.gather(1, positions[..., None].expand(-1, -1, whole.shape[-1]))
        assert torch.equal(batch["targets"][name]["patches"], wanted)
        moments = select(Cache(cache)).statistics(name)["patches"]
        np.testing.assert_array_equal(
            moments.mean, select(Cache(feats)).statistics(name)["patches"].mean
        )


def test_another_subset_of_the_same_grid_is_refused(make: Any, encoders: dict[str, Path]) -> None:
    make(patches=4)
    with pytest.raises(CacheError, match=r"alpha keeps 4 patch tokens of its 3x3 grid.*beta .* 5"):
        make(names=("beta",), patches=5)
    make(names=("wide",), patches=5)


def test_a_lost_subset_is_named(make: Any) -> None:
    cache = make(patches=4)
    next((cache / "patches@3x3").rglob("*.json")).unlink()
    with pytest.raises(CacheError, match=f"patches@3x3/{LABEL} lacks 1 of 4 units"):
        select(Cache(cache))


def test_features_of_other_positions_are_refused(
    make: Any, tmp_path: Path, tars: list[Path]
) -> None:
    cache = make(patches=4)
    path = Cache(cache).layout.manifest("patches@3x3", LABEL, 1, tars[0].stem)
    record = UnitRecord.read(path)
    path.unlink()
    (tmp_path / "aside").mkdir()
    replace(record, keys_digest="0").write(path, tmp_path / "aside")
    with pytest.raises(CacheError, match="kept patches do not match"):
        select(Cache(cache))


def test_cls_tokens_alone(make: Any, feats: Path) -> None:
    cache = make(tokens="cls")
    batch = everything(cache)
    assert list(batch["targets"]["alpha"]) == ["cls"] and not batch["positions"]
    assert torch.equal(
        batch["targets"]["alpha"]["cls"], everything(feats)["targets"]["alpha"]["cls"]
    )
    assert list(select(Cache(cache)).statistics("alpha")) == ["cls"]
    assert Cache(cache).codec("alpha", LABEL) == CodecRecord("fp16", {"cls": [32]})
    make(tokens="cls", codec="int8")  # A codec is for patch tokens: nothing to disagree about.


def test_jpeg_views_are_what_the_encoders_saw(
    make: Any, tars: list[Path], encoders: dict[str, Path], tmp_path: Path
) -> None:
    cache = make(store_views="jpeg")
    unit = Cache(cache).unit("views", LABEL, 1, tars[0].stem)
    jpeg = unit.jpeg(7)
    assert jpeg[:2] == b"\xff\xd8" and unit.column("jpeg_offset").shape == (31,)
    group = open_unit(cache, "views", 1, tars[0].stem)
    bounds = group["jpeg_offset"][7:9]
    assert bytes(group["jpeg"][bounds[0] : bounds[1]]) == jpeg
    batch = everything(cache)
    assert torch.equal(batch["views"][2 * 7 + 1], decode(jpeg, ""))
    CachedViews(select(Cache(cache))).check_pixels(1000)
    # An encoder that comes later sees the same JPEGs: as if it had been there from the start.
    make(names=("beta",))
    both = make("both", names=("alpha", "beta"), store_views="jpeg")
    later, first = everything(cache)["targets"]["beta"], everything(both)["targets"]["beta"]
    assert torch.equal(later["patches"], first["patches"])


def test_jpegs_are_not_the_exact_pixels_but_close(make: Any, feats: Path) -> None:
    exact, lossy = everything(feats)["views"], everything(make(store_views="jpeg"))["views"]
    difference = (exact.float() - lossy.float()).abs()
    assert 0 < difference.mean() < 6


def test_an_encoder_added_later_reads_stored_pixels(
    make: Any, feats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make(store_views="raw")

    def fail(data: bytes, where: str) -> torch.Tensor:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr("extract.rendering.decode", fail)
    make(names=("beta",))
    later, plain = everything(cache)["targets"]["beta"], everything(feats)["targets"]["beta"]
    assert torch.equal(later["patches"], plain["patches"])
