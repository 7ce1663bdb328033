"""Writing one unit: a Zarr group made aside, whole shards only, and its manifest last.

The path of a block of rows:
  1. `append`   rows of one array collect in memory until a whole shard is there;
  2. `_flush`   one assignment writes that shard (shards written in pieces are read and rewritten);
  3. `commit`   every file is flushed to the disk, the group is renamed to a name made from its
                content, and the manifest that names it, with each file's size and sha256, appears.
Killed anywhere before the end of 3, the unit does not exist. Writers of one unit on different
hardware make groups of different names, of which the one whose manifest came first counts; groups
that no manifest names are removed by the next writer of the unit.
"""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from extract.cache.errors import CacheError
from extract.cache.mirror import Mirror
from extract.cache.schema import ArraySpec, Layout, UnitRecord, jpeg_specs
from extract.cache.sealed import content_sha256, sync_folder, sync_tree

COMPRESSORS: dict[str, list[Any]] = {"": [], "zstd": [ZstdCodec(level=1)]}


class UnitWriter:
    """One unit under construction in `aside`; nothing is visible before `commit`."""

    def __init__(self, aside: Path, rows: int, specs: dict[str, ArraySpec]) -> None:
        self.folder = aside
        self.rows = rows
        self.specs = dict(specs)
        self._jpegs: list[bytes] = []
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
        if spec.sharded and self._pending_rows(name) >= self._shard_rows(name):
            self._flush(name, self._shard_rows(name))

    def append_jpegs(self, pictures: Sequence[bytes]) -> None:
        """Add one encoded picture a row; kept in memory until the unit is finished."""
        self._jpegs += pictures

    def _add_jpegs(self) -> None:
        bounds = np.cumsum([0, *map(len, self._jpegs)], dtype=np.uint64)
        self.specs |= jpeg_specs(self.rows, int(bounds[-1]))
        data: dict[str, NDArray[Any]] = {
            "jpeg": np.frombuffer(b"".join(self._jpegs), np.uint8),
            "jpeg_offset": bounds,
        }
        for name, values in data.items():
            self._pending[name], self._written[name] = [values], 0

    def _length(self, name: str) -> int:
        extent = self.specs[name].extent
        return self.rows if extent is None else extent

    def _shard_rows(self, name: str) -> int:
        return self.specs[name].shard_rows(self._length(name))

    def _pending_rows(self, name: str) -> int:
        return sum(len(block) for block in self._pending[name])

    def _flush(self, name: str, step: int) -> None:
        rows = np.concatenate(self._pending[name])
        start = self._written[name]
        length = self._length(name)
        while len(rows) >= step or (len(rows) and start + len(rows) == length):
            block, rows = rows[:step], rows[step:]
            self._array(name)[start : start + len(block)] = block
            start += len(block)
        self._pending[name], self._written[name] = [rows], start

    def _array(self, name: str) -> "zarr.Array[Any]":
        """The Zarr array: raw bytes with crc32c, in shards where rows are read at random."""
        if name not in self._arrays:
            spec, length = self.specs[name], self._length(name)
            shards = (self._shard_rows(name), *spec.row_shape)
            self._arrays[name] = zarr.create_array(
                store=self.folder,
                name=name,
                shape=(length, *spec.row_shape),
                chunks=(spec.chunk_rows if spec.sharded else length, *spec.row_shape),
                shards=shards if spec.sharded else None,
                dtype=spec.dtype,
                compressors=[*COMPRESSORS[spec.compression], Crc32cCodec()],
                fill_value=spec.fill_value,
                config={"write_empty_chunks": True},
            )
        return self._arrays[name]

    def finish(self) -> dict[str, list[Any]]:
        """Write what is pending, flush to disk; `{file: [bytes, sha256]}` of the whole group."""
        if self._jpegs:
            self._add_jpegs()
        for name, spec in self.specs.items():
            length = self._length(name)
            if self._pending_rows(name):
                self._flush(name, self._shard_rows(name) if spec.sharded else length)
            if self._written[name] != length:
                raise CacheError(
                    f"array {name!r} has {self._written[name]} of {length} rows; "
                    "an incomplete unit is not published"
                )
        sync_tree(self.folder)
        return object_table(self.folder)

    def array_table(self) -> dict[str, list[Any]]:
        """`{array: [dtype, row shape]}` for the manifest."""
        return {name: [spec.dtype, list(spec.row_shape)] for name, spec in self.specs.items()}


def object_table(folder: Path) -> dict[str, list[Any]]:
    """`{relative path: [bytes, sha256]}` of every file below `folder`, sorted.

    Not crc32c: a chunk is followed by its own, and the crc32c of both together is the same number
    whatever the chunk holds.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, file_sha256(path)]
        for path in files
    }


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def group_name(stem: str, objects: dict[str, list[Any]]) -> str:
    """The name of a group with these files: another content has another name."""
    return f"{stem}-{content_sha256(objects)[:12]}.zarr"


def commit(
    layout: Layout,
    owner: str,
    writer: UnitWriter,
    record: UnitRecord,
    aside: Path,
    mirror: Mirror | None = None,
) -> bool:
    """Move a finished group into place and publish its manifest; the first writer of a unit wins.

    `record.objects` must be what `writer.finish()` returned, `record.group` what `group_name` makes
    of it. With a `mirror`, both go to its bucket. Returns whether this writer was the first.
    """
    manifest = layout.manifest(owner, record.recipe, record.view, record.tar)
    if manifest.exists():
        return False
    target = layout.group(manifest, record.group)
    target.parent.mkdir(parents=True, exist_ok=True)
    if mirror is not None:
        mirror.publish_group(writer.folder, target, record.objects)
        first = mirror.publish(manifest, record.content(), first=True)
    else:
        _place(writer.folder, target, record.objects, aside)
        first = record.publish_first(manifest, aside)
    _remove_others(manifest, aside, mirror)
    return first


def _remove_others(manifest: Path, aside: Path, mirror: Mirror | None) -> None:
    """Groups that the manifest does not name: of killed runs, or of a writer that came second."""
    record = UnitRecord.read(manifest)
    for other in manifest.parent.glob(f"{glob.escape(record.tar)}-{'[0-9a-f]' * 12}.zarr"):
        if other.name != record.group:
            _discard(other, aside)
    if mirror is not None:
        mirror.bucket.delete(mirror.other_groups(manifest, record.group))


def _place(folder: Path, target: Path, objects: dict[str, list[Any]], aside: Path) -> None:
    """Put the group under its name, unless another writer left the very same there."""
    if target.exists():
        # The same name is the same content, unless the disk lost some of it.
        if object_table(target) == objects:
            return
        _discard(target, aside)
    try:
        os.rename(folder, target)
    except OSError as error:
        # Another writer of the same content was faster by a moment.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    sync_folder(target.parent)


def _discard(group: Path, aside: Path) -> None:
    """Out of sight in one step; deleted with the staging folder."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(group, aside / f"orphan-{group.name}-{uuid.uuid4().hex}")
