"""Writer and readers of one unit: equal to zarr-python, and every kind of damage is found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from extract.cache.direct import DirectArray
from extract.cache.errors import CacheError
from extract.cache.reader import Unit
from extract.cache.schema import (
    CHUNK_BYTES,
    ArraySpec,
    Layout,
    UnitRecord,
    feature_specs,
    subset_specs,
    view_specs,
)
from extract.cache.staging import Staging
from extract.cache.writer import UnitWriter, commit, group_name

ROWS = 83


def write_unit(
    root: Path, specs: dict[str, ArraySpec], data: dict[str, NDArray], step: int = 7
) -> Unit:
    layout = Layout(root)
    rows = len(next(iter(data.values())))
    with Staging(root) as staging:
        writer = UnitWriter(staging.folder / "unit.zarr", rows, specs)
        for start in range(0, rows, step):
            for name, values in data.items():
                writer.append(name, values[start : start + step])
        objects = writer.finish()
        record = UnitRecord(
            tar="a",
            tar_sha256="",
            recipe="unic@224",
            view=0,
            rows=rows,
            keys_digest="",
            group=group_name("a", objects),
            arrays=writer.array_table(),
            objects=objects,
        )
        commit(layout, "dino", writer, record, staging.folder)
    return Unit(layout.manifest("dino", "unic@224", 0, "a"))


def made(specs: dict[str, ArraySpec], rows: int = ROWS) -> dict[str, NDArray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(-100, 100, (rows, *spec.row_shape)).astype(spec.dtype)
        for name, spec in specs.items()
    }


SMALL = feature_specs({"cls": (8,), "patches": (9, 8)})


@pytest.fixture
def unit(tmp_path: Path) -> Unit:
    return write_unit(tmp_path / "feats", SMALL, made(SMALL))


def test_a_unit_reads_back_and_zarr_reads_the_same(unit: Unit) -> None:
    group = zarr.open_group(unit.folder, mode="r")
    for name, values in made(SMALL).items():
        array = unit.array(name)
        assert np.array_equal(array.read_all(), values)
        assert np.array_equal(np.asarray(group[name]), values)
        rows = np.random.default_rng(1).integers(0, ROWS, 50)
        assert np.array_equal(array.read(rows), values[rows])


def test_many_shards_and_ragged_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extract.cache.schema.SHARD_BYTES", 32 * 9 * 8 * 2)
    unit = write_unit(tmp_path / "feats", SMALL, made(SMALL), step=19)
    assert len(list((unit.folder / "patches" / "c").iterdir())) == 3
    assert np.array_equal(unit.array("patches").read_all(), made(SMALL)["patches"])
    assert np.array_equal(zarr.open_group(unit.folder, mode="r")["patches"], made(SMALL)["patches"])


def test_every_optional_column_can_be_stored(tmp_path: Path) -> None:
    specs = {
        **view_specs({"crop_top": ArraySpec("int32")}, size=16, pixels="raw"),
        **subset_specs(4),
        **feature_specs({"cls": (8,), "patches": (4, 8), "registers": (2, 8)}, codec="int8"),
        "mean_patch": ArraySpec("float16", (8,), sharded=True),
    }
    data = made(specs)
    unit = write_unit(tmp_path / "feats", specs, data)
    group = zarr.open_group(unit.folder, mode="r")
    for name, values in data.items():
        assert np.array_equal(unit.array(name).read_all(), values, equal_nan=True), name
        assert np.array_equal(np.asarray(group[name]), values, equal_nan=True), name
    assert specs["patches"].dtype == "int8" and specs["scale_patches"].row_shape == (4,)


def test_a_row_or_a_chunk_fits_the_unit_of_random_access() -> None:
    assert ArraySpec("float16", (196, 768), True).chunk_rows == 1
    assert ArraySpec("float16", (768,), True).chunk_rows == 32
    for shape in ((768,), (36, 96), (196, 384), (257, 1536)):
        spec = ArraySpec("float16", shape, True)
        assert spec.chunk_rows == 1 or spec.chunk_rows * spec.row_bytes <= CHUNK_BYTES
        for length in (1, 32, 1000, 10**6):
            rows = spec.shard_rows(length)
            assert rows % 32 == 0 and rows % spec.chunk_rows == 0
            assert rows * spec.row_bytes <= 64 * 1024**2 and rows < length + 32


def test_missing_data_are_nan_or_minus_128() -> None:
    assert np.isnan(ArraySpec("float16").fill_value)
    assert ArraySpec("int8").fill_value == -128


def manifest_of(unit: Unit) -> Path:
    return unit.folder.parent / f"{unit.record.tar}.json"


def damaged(unit: Unit, path: Path) -> Exception | None:
    """What opening the unit again and reading all of it raises."""
    try:
        again = Unit(manifest_of(unit))
        for name in SMALL:
            again.array(name).read_all()
    except CacheError as error:
        return error
    return None


def stored_files(unit: Unit) -> list[Path]:
    return sorted(path for path in unit.folder.rglob("*") if path.is_file())


def test_any_missing_file_is_found(unit: Unit, tmp_path: Path) -> None:
    for path in [*stored_files(unit), manifest_of(unit)]:
        kept = tmp_path / "kept"
        shutil.move(path, kept)
        error = damaged(unit, path)
        assert error is not None and path.name in str(error), path
        shutil.move(kept, path)
    assert damaged(unit, unit.folder) is None


def test_any_cut_file_is_found(unit: Unit) -> None:
    for path in stored_files(unit):
        content = path.read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            assert damaged(unit, path) is not None, (path, length)
        path.write_bytes(content)


def test_any_flipped_bit_is_found(unit: Unit) -> None:
    rng = np.random.default_rng(2)
    files = [*stored_files(unit), manifest_of(unit)]
    for path in files:
        content = bytearray(path.read_bytes())
        for bit in rng.choice(len(content) * 8, size=min(30, len(content)), replace=False):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(flipped)
            assert damaged(unit, path) is not None, (path, bit)
        path.write_bytes(content)
    assert damaged(unit, unit.folder) is None


def test_a_hole_in_a_shard_is_an_error_and_not_fill_values(unit: Unit, tmp_path: Path) -> None:
    """A shard of which half the inner chunks were never written, index and all in order."""
    source = DirectArray(unit.folder / "patches")
    half = zarr.create_array(
        store=tmp_path / "half",
        shape=source.shape,
        chunks=(32, 9, 8),
        shards=(source.file_rows, 9, 8),
        dtype="float16",
        compressors=[zarr.codecs.Crc32cCodec()],
        fill_value=float("nan"),
    )
    half[:32] = source.read(np.arange(32))
    array = DirectArray(tmp_path / "half")
    assert np.array_equal(array.read(np.arange(32)), source.read(np.arange(32)))
    with pytest.raises(CacheError, match="lacks chunk 1"):
        array.read(np.arange(32, 64))


def test_rows_out_of_range_are_an_error(unit: Unit) -> None:
    for row in (-1, ROWS):
        with pytest.raises(CacheError, match=f"has {ROWS} rows"):
            unit.array("cls").read(np.array([row]))


def test_an_incomplete_unit_is_not_published(tmp_path: Path) -> None:
    writer = UnitWriter(tmp_path / "unit", ROWS, SMALL)
    for name, values in made(SMALL).items():
        writer.append(name, values[:-1])
    with pytest.raises(CacheError, match=f"of {ROWS} rows; an incomplete unit"):
        writer.finish()


def test_rows_of_another_shape_or_dtype_are_refused(tmp_path: Path) -> None:
    writer = UnitWriter(tmp_path / "unit", ROWS, SMALL)
    with pytest.raises(CacheError, match="'cls' holds rows of float16"):
        writer.append("cls", np.zeros((3, 8), np.float32))
    with pytest.raises(CacheError, match="'patches' holds rows of float16"):
        writer.append("patches", np.zeros((3, 8, 9), np.float16))


def test_an_array_cut_otherwise_is_refused(tmp_path: Path) -> None:
    zarr.create_array(store=tmp_path / "plain", shape=(4, 4), chunks=(2, 2), dtype="float16")
    with pytest.raises(CacheError, match="not written by this version"):
        DirectArray(tmp_path / "plain")


def test_the_first_of_two_writers_wins_and_orphans_are_replaced(tmp_path: Path) -> None:
    root, data = tmp_path / "feats", made(SMALL)
    unit = write_unit(root, SMALL, data)
    second = write_unit(root, SMALL, {**data, "cls": data["cls"] + 1})
    assert np.array_equal(second.array("cls").read_all(), data["cls"])
    manifest_of(unit).unlink()
    third = write_unit(root, SMALL, {**data, "cls": data["cls"] + 1})
    assert np.array_equal(third.array("cls").read_all(), data["cls"] + 1)
    assert not list(root.glob(".staging-*"))


def test_an_abandoned_staging_folder_is_removed_and_a_living_one_is_not(tmp_path: Path) -> None:
    abandoned = tmp_path / ".staging-dead"
    abandoned.mkdir()
    (abandoned / "half").write_text("x")
    with Staging(tmp_path) as first:
        assert not abandoned.exists()
        with Staging(tmp_path):
            assert first.folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_json_files_are_strict(unit: Unit, tmp_path: Path) -> None:
    manifest = manifest_of(unit)
    record = UnitRecord.read(manifest)
    assert record.seal() == json.loads(manifest.read_text())["content_sha256"]
    with Staging(tmp_path / "other") as staging:
        from extract.cache.sealed import publish

        publish(tmp_path / "x.json", {"tar": "a", "surprise": 1}, staging.folder)
    with pytest.raises(CacheError, match=r"unknown fields \['surprise'\]"):
        UnitRecord.read(tmp_path / "x.json")
