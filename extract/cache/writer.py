"""Writing one unit: a Zarr group made aside, whole shards only, and its manifest last.

The path of a block of rows:
  1. `append`   rows of one array collect in memory until a whole shard is there;
  2. `_flush`   one assignment writes that shard (shards written in pieces are read and rewritten);
  3. `commit`   every file is flushed to the disk, the group is renamed into place, and the
                manifest with each file's size and crc32c is published.
Killed anywhere before the end of 3, the unit does not exist: without a manifest, a group is an
orphan that the next writer of the unit replaces.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from extract.cache.errors import CacheError
from extract.cache.schema import ArraySpec, Layout, UnitRecord
from extract.cache.sealed import sync_folder, sync_tree


class UnitWriter:
    """One unit under construction in `aside`; nothing is visible before `commit`."""

    def __init__(self, aside: Path, rows: int, specs: dict[str, ArraySpec]) -> None:
        self.folder = aside
        self.rows = rows
        self.specs = specs
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._pending: dict[str, list[NDArray[Any]]] = {name: [] for name in specs}
        self._written: dict[str, int] = dict.fromkeys(specs, 0)
        shutil.rmtree(aside, ignore_errors=True)
        zarr.create_group(store=aside, zarr_format=3)

    def append(self, name: str, rows: NDArray[Any]) -> None:
        """Add rows `[n, *row_shape]` to array `name`, in order, in the stored dtype.

        Raises `CacheError` when dtype or row shape are not those of the array.
        """
        spec = self.specs[name]
        if rows.dtype != np.dtype(spec.dtype) or rows.shape[1:] != spec.row_shape:
            raise CacheError(
                f"array {name!r} holds rows of {spec.dtype} {spec.row_shape}, "
                f"not of {rows.dtype} {rows.shape[1:]}"
            )
        self._pending[name].append(rows)
        if spec.sharded and self._pending_rows(name) >= spec.shard_rows:
            self._flush(name, spec.shard_rows)

    def _pending_rows(self, name: str) -> int:
        return sum(len(block) for block in self._pending[name])

    def _flush(self, name: str, step: int) -> None:
        rows = np.concatenate(self._pending[name])
        start = self._written[name]
        while len(rows) >= step or (len(rows) and start + len(rows) == self.rows):
            block, rows = rows[:step], rows[step:]
            self._array(name)[start : start + len(block)] = block
            start += len(block)
        self._pending[name], self._written[name] = [rows], start

    def _array(self, name: str) -> "zarr.Array[Any]":
        """The Zarr array: raw bytes with crc32c, in shards where rows are read at random."""
        if name not in self._arrays:
            spec = self.specs[name]
            rows, shards = (spec.chunk_rows, (spec.shard_rows, *spec.row_shape))
            self._arrays[name] = zarr.create_array(
                store=self.folder,
                name=name,
                shape=(self.rows, *spec.row_shape),
                chunks=(rows if spec.sharded else self.rows, *spec.row_shape),
                shards=shards if spec.sharded else None,
                dtype=spec.dtype,
                compressors=[Crc32cCodec()],
                fill_value=spec.fill_value,
                config={"write_empty_chunks": True},
            )
        return self._arrays[name]

    def finish(self) -> dict[str, list[int]]:
        """Write what is pending, flush to disk; `{file: [bytes, crc32c]}` of the whole group."""
        for name, spec in self.specs.items():
            if self._pending_rows(name):
                self._flush(name, spec.shard_rows if spec.sharded else self.rows)
            if self._written[name] != self.rows:
                raise CacheError(
                    f"array {name!r} has {self._written[name]} of {self.rows} rows; "
                    "an incomplete unit is not published"
                )
        sync_tree(self.folder)
        return object_table(self.folder)

    def array_table(self) -> dict[str, list[Any]]:
        """`{array: [dtype, row shape]}` for the manifest."""
        return {name: [spec.dtype, list(spec.row_shape)] for name, spec in self.specs.items()}


def object_table(folder: Path) -> dict[str, list[int]]:
    """`{relative path: [bytes, crc32c]}` of every file below `folder`, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, file_crc32c(path)]
        for path in files
    }


def file_crc32c(path: Path) -> int:
    """CRC-32C of a file's bytes, read in pieces of 4 MiB."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while piece := file.read(4 * 1024**2):
            checksum.update(piece)
    return int.from_bytes(checksum.digest(), "big")


def commit(layout: Layout, owner: str, writer: UnitWriter, record: UnitRecord, aside: Path) -> None:
    """Move a finished group into place and publish its manifest; the first writer of a unit wins.

    `record.objects` must be what `writer.finish()` returned.
    """
    target = layout.unit(owner, record.recipe, record.view, record.tar)
    manifest = layout.manifest(owner, record.recipe, record.view, record.tar)
    if manifest.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        # An orphan: its writer was killed between this rename and the manifest.
        os.rename(target, aside / f"orphan-{target.name}")
    os.rename(writer.folder, target)
    sync_folder(target.parent)
    record.write(manifest, aside)
