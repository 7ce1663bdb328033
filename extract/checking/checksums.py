"""Every byte of a cache: checksums of files and chunks, and keys against views and image tars."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from console.progress import ProgressBar
from extract.cache.direct import DirectArray
from extract.cache.errors import UserError
from extract.cache.images import index_tar, key_id, keys_digest, tar_sha256
from extract.cache.reader import Cache
from extract.cache.schema import VIEWS, TarRecord
from extract.cache.writer import file_sha256
from extract.checking.structure import Contents, Faults, StoredUnit
from extract.rendering import kept_samples

BLOCK_BYTES = 32 * 1024**2


def check_contents(contents: Contents, faults: Faults) -> int:
    """Read every byte of every unit and compare all checksums; returns the bytes read."""
    units = list(contents.units.values())
    total = sum(unit.bytes for unit in units)
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ProgressBar("checksums", max(total >> 20, 1), "MiB") as progress,
    ):
        done = 0
        for unit, found in zip(units, pool.map(content_faults, units), strict=True):
            for what in found:
                faults.add(unit, what)
            before, done = done, done + unit.bytes
            progress.advance((done >> 20) - (before >> 20), str(unit))
    return total


def content_faults(unit: StoredUnit) -> list[str]:
    """Files with another sha256 than the manifest says; then damaged, or never written, chunks."""
    found = []
    for name, (_, checksum) in unit.record.objects.items():
        path = unit.folder / name
        if path.is_file() and file_sha256(path) != checksum:
            found.append(f"{path} was changed: its sha256 is not the manifest's")
    if found:
        return found
    for name in unit.record.arrays:
        try:
            array = DirectArray(unit.folder / name)
            for block in _blocks(array):
                if _unwritten(block):
                    found.append(f"array {name} has values that were never written")
                    break
        except UserError as error:
            found.append(str(error))
    return found


def _blocks(array: DirectArray) -> Iterator[np.ndarray[Any, Any]]:
    row_bytes = array.dtype.itemsize * max(1, int(np.prod(array.row_shape)))
    step = max(array.chunk_rows, BLOCK_BYTES // row_bytes // array.chunk_rows * array.chunk_rows)
    for start in range(0, len(array), step):
        yield array.read_range(start, min(start + step, len(array)))


def _unwritten(block: np.ndarray[Any, Any]) -> bool:
    """Whether a value is one that the writer never writes: NaN or an infinity, or -128 in int8."""
    if block.dtype.kind == "f":
        return not np.isfinite(block).all()
    return block.dtype == np.int8 and bool((block == -128).any())


def check_keys(
    contents: Contents, moved: Mapping[str, Path], hashes: bool, faults: Faults
) -> list[str]:
    """Rows of every unit are those of its views, and those of the tar; returns tars not found.

    With `hashes`, each tar's sha256 is compared too.
    """
    for unit in contents.units.values():
        views = contents.units.get((VIEWS, *unit.place[1:]))
        if unit.owner != VIEWS and views is not None:
            with faults.caught(unit):
                if not np.array_equal(
                    _column(contents, unit, "key"), _column(contents, views, "key")
                ):
                    faults.add(unit, "its rows have other keys than the views")
    lacking = []
    with ProgressBar("tars", len(contents.tars), "tars") as progress:
        for stem, tar in contents.tars.items():
            path = _find(contents.cache, tar, moved)
            if path is None:
                lacking.append(stem)
            else:
                with faults.caught(path):
                    _check_tar(contents, tar, path, hashes, faults)
            progress.advance(1)
    return lacking


def _find(cache: Cache, tar: TarRecord, moved: Mapping[str, Path]) -> Path | None:
    places = [cache.root / location for location in tar.locations]
    candidates = [moved[tar.stem]] if tar.stem in moved else places
    return next((path for path in candidates if path.is_file()), None)


def _check_tar(
    contents: Contents, tar: TarRecord, path: Path, hashes: bool, faults: Faults
) -> None:
    if path.stat().st_size != tar.bytes:
        faults.add(path, f"has {path.stat().st_size} bytes, not the {tar.bytes} of extraction")
        return
    if hashes and tar_sha256(path) != tar.sha256:
        faults.add(path, "was changed since extraction: its sha256 is not the one in the cache")
    index = index_tar(path)
    keys = [sample.key for sample in kept_samples(index, tar)]
    if len(keys) != tar.rows or keys_digest(keys) != tar.keys_digest:
        faults.add(path, f"its keys are not those of tars/{tar.stem}.json")
        return
    ids = np.array([key_id(sample.key) for sample in index.samples])
    for unit in contents.units.values():
        if unit.owner == VIEWS and unit.tar == tar.stem:
            with faults.caught(unit):
                images = _column(contents, unit, "image_index")
                beyond = len(images) and (images.min() < 0 or images.max() >= len(ids))
                if beyond or not np.array_equal(ids[images], _column(contents, unit, "key")):
                    faults.add(unit, f"its rows are not the images of {path}")


def _column(contents: Contents, unit: StoredUnit, name: str) -> np.ndarray[Any, Any]:
    if contents.cache.mirror is not None:
        return contents.cache.unit(*unit.place).column(name)
    # Without the checks on opening a unit: those were made, and would be told twice.
    return DirectArray(unit.folder / name).read_all()
