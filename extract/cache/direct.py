"""Reading rows straight from the files of an uncompressed Zarr v3 array, every byte checked.

zarr-python reads the same bytes (a test holds the two together) at about a third of the speed of
the disk; a training loop that reads random rows needs the rest. The path of a row:
  1. `ShardedArray.read`  groups the wanted rows by shard and inner chunk;
  2. `_index`             a shard's index (offset, length of each inner chunk; crc32c) is read once;
  3. `_chunk`             one `pread` a chunk, its crc32c compared, viewed as `[chunk_rows, ...]`;
  4. rows are copied to their places in the result `[n, *row_shape]`.
Anything missing, torn or changed is a `CacheError` that names the file, never fill values.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from extract.cache.errors import CacheError

CRC_BYTES = 4
MISSING = np.uint64(2**64 - 1)


def crc32c_ok(data: bytes | memoryview) -> bool:
    """True when the last four bytes are the little-endian crc32c of the rest."""
    body = bytes(data[:-CRC_BYTES]) if isinstance(data, memoryview) else data[:-CRC_BYTES]
    return google_crc32c.value(body) == int.from_bytes(data[-CRC_BYTES:], "little")


class DirectArray:
    """One Zarr array `[N, *row_shape]` cut along its first axis only, read by `pread`.

    Holds no open files; it can be pickled and used from threads and forked workers.
    Raises `CacheError` when the array is not of the kind that the cache's writer makes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        meta = _metadata(path)
        self.shape = tuple(meta["shape"])
        self.dtype = np.dtype(meta["data_type"])
        self.row_shape = self.shape[1:]
        outer = meta["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = meta["codecs"]
        self.sharded = codecs[0]["name"] == "sharding_indexed"
        inner = codecs[0]["configuration"] if self.sharded else {}
        self.file_rows = int(outer[0])
        self.chunk_rows = int(inner["chunk_shape"][0]) if self.sharded else self.file_rows
        names = [codec["name"] for codec in (inner["codecs"] if self.sharded else codecs)]
        if names != ["bytes", "crc32c"] or tuple(outer[1:]) != self.row_shape:
            raise CacheError(
                f"{path} is stored as {names} in chunks {outer}; expected whole rows as "
                "['bytes', 'crc32c']: it was not written by this version's unic-extract"
            )
        self._indices: dict[int, NDArray[np.uint64]] = {}

    def __len__(self) -> int:
        return int(self.shape[0])

    def read_all(self) -> NDArray[Any]:
        """All rows `[N, *row_shape]`."""
        return self.read(np.arange(len(self)))

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows `[n, *row_shape]` in the order of `rows [n]`, each chunk read once."""
        out = np.empty((len(rows), *self.row_shape), dtype=self.dtype)
        self.read_into(rows, out)
        return out

    def read_into(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """As `read`, into `out [n, *row_shape]`; raises `CacheError` for rows out of range."""
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise CacheError(f"{self.path} has {len(self)} rows; rows {rows} were asked for")
        order = np.argsort(rows // self.chunk_rows, kind="stable")
        chunks, starts = np.unique(rows[order] // self.chunk_rows, return_index=True)
        for chunk, places in zip(chunks, np.split(order, starts[1:]), strict=True):
            block = self._chunk(int(chunk))
            out[places] = block[rows[places] % self.chunk_rows]

    def _chunk(self, chunk: int) -> NDArray[Any]:
        """Inner chunk number `chunk` of the array, `[chunk_rows, *row_shape]`."""
        shard, within = divmod(chunk, self.file_rows // self.chunk_rows)
        size = self.chunk_rows * math.prod(self.row_shape) * self.dtype.itemsize + CRC_BYTES
        offset, length = self._index(shard)[within] if self.sharded else (0, size)
        if offset == MISSING:
            raise CacheError(f"{self._name(shard)} lacks chunk {within}: {REMEDY}")
        data = self._pread(shard, size, int(offset)) if int(length) == size else b""
        if len(data) != size or not crc32c_ok(data):
            raise CacheError(f"{self._name(shard)}: chunk {within} is damaged: {REMEDY}")
        rows = np.frombuffer(
            data, dtype=self.dtype, count=(size - CRC_BYTES) // self.dtype.itemsize
        )
        return rows.reshape(self.chunk_rows, *self.row_shape)

    def _index(self, shard: int) -> NDArray[np.uint64]:
        """Shard index `[inner chunks, 2]`: offset and length, `MISSING` for absent chunks."""
        if shard not in self._indices:
            size = self.file_rows // self.chunk_rows * 16 + CRC_BYTES
            data = self._pread(shard, size, -size)
            if len(data) != size or not crc32c_ok(data):
                raise CacheError(f"{self._name(shard)}: the shard index is damaged: {REMEDY}")
            index = np.frombuffer(data, dtype="<u8", count=(size - CRC_BYTES) // 8)
            self._indices[shard] = index.reshape(-1, 2)
        return self._indices[shard]

    def _name(self, shard: int) -> Path:
        return self.path.joinpath("c", str(shard), *["0"] * len(self.row_shape))

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        """`size` bytes of a shard's file from `offset`, which counts from the end if negative.

        The file is opened for each read (some microseconds), so that a cache of 20,000 shards
        needs no more file handles than there are threads.
        """
        try:
            handle = os.open(self._name(shard), os.O_RDONLY)
        except FileNotFoundError:
            raise CacheError(f"{self._name(shard)} is missing: {REMEDY}") from None
        try:
            start = offset if offset >= 0 else max(os.fstat(handle).st_size + offset, 0)
            return os.pread(handle, size, start)
        finally:
            os.close(handle)


REMEDY = "delete the unit's .zarr folder and its .json, and run unic-extract again"


def _metadata(path: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((path / "zarr.json").read_bytes())
        return meta
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}/zarr.json cannot be read ({error}): {REMEDY}") from None
