"""Reading rows of a stored array directly: `preadv` into the result, every chunk checked.

Plain zarr-python reads these arrays too (a test holds the two together) at about a third of the
speed of the disk; a training loop that reads random rows needs the rest. The path of a row:
  1. `DirectArray.read_into`  groups the wanted rows by shard and inner chunk;
  2. `_index`                 a shard's index (offset and length of each inner chunk), read once;
  3. `_read_chunk`            one `preadv` a chunk: straight into the result where the chunk's rows
                              are wanted as they lie, else by way of a buffer; crc32c compared; zstd
                              undone where the array has it.
Anything missing, torn or changed is a `CacheError` that names the file, never fill values. Reading
and checking release the interpreter's lock, so that threads read side by side.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from extract.cache.errors import CacheError

CRC_BYTES = 4
FETCHES = 5
MISSING = 2**64 - 1
CHAINS = {("bytes", "crc32c"): False, ("bytes", "zstd", "crc32c"): True}
Buffer = NDArray[np.uint8]


class DirectArray:
    """One Zarr array `[N, *row_shape]` cut along its first axis only.

    Holds no open files; it can be pickled and used from threads and forked workers. `fetch` is
    asked for a shard's file that is not there (of a cache in a bucket). Raises `CacheError` when
    the array is not of the kind that the cache's writer makes.
    """

    def __init__(self, path: Path, fetch: Callable[[Path], None] | None = None) -> None:
        self.path, self._fetch = path, fetch
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
        names = tuple(codec["name"] for codec in (inner["codecs"] if self.sharded else codecs))
        if names not in CHAINS or tuple(outer[1:]) != self.row_shape:
            raise CacheError(
                f"{path} is stored as {list(names)} in chunks {outer}; expected whole rows as one "
                f"of {[list(chain) for chain in CHAINS]}: it was not written by this version's "
                "unic-extract"
            )
        self.compressed = CHAINS[names]
        self._indices: dict[int, list[tuple[int, int]]] = {}

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

    def read_range(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop - 1`, for arrays whose elements are too many to be named singly."""
        first, last = start // self.chunk_rows, -(-stop // self.chunk_rows)
        buffer = np.empty(((last - first) * self.chunk_rows, *self.row_shape), dtype=self.dtype)
        with _Files(self) as files:
            for number, chunk in enumerate(range(first, last)):
                place = slice(number * self.chunk_rows, (number + 1) * self.chunk_rows)
                self._read_chunk(files, chunk, _bytes(buffer[place]))
        return buffer[start - first * self.chunk_rows : stop - first * self.chunk_rows]

    def read_into(
        self, rows: NDArray[np.int64], out: NDArray[Any], places: NDArray[np.int64] | None = None
    ) -> None:
        """As `read`, into `out[places]`, or `out [n, *row_shape]` without places.

        Raises `CacheError` for rows out of range and for damage.
        """
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise CacheError(f"{self.path} has {len(self)} rows; rows {rows} were asked for")
        if places is None:
            places = np.arange(len(rows))
        fits = out.flags.c_contiguous and out.dtype == self.dtype
        with _Files(self) as files:
            if self.chunk_rows == 1 and fits:
                flat = out.reshape(len(out), -1).view(np.uint8)
                for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                    self._read_chunk(files, row, flat[place])
            else:
                self._read_chunks(files, rows, out, places, fits)

    def _read_chunks(
        self,
        files: "_Files",
        rows: NDArray[np.int64],
        out: NDArray[Any],
        places: NDArray[np.int64],
        fits: bool,
    ) -> None:
        """Chunks of several rows: into `out` where one is wanted as it lies, else by a buffer."""
        order = np.argsort(rows, kind="stable")
        chunks, starts = np.unique(rows[order] // self.chunk_rows, return_index=True)
        buffer = np.empty((self.chunk_rows, *self.row_shape), dtype=self.dtype)
        for chunk, chosen in zip(chunks.tolist(), np.split(order, starts[1:]), strict=True):
            if fits and self._is_whole(rows[chosen], places[chosen]):
                start = int(places[chosen[0]])
                self._read_chunk(files, chunk, _bytes(out[start : start + self.chunk_rows]))
                continue
            self._read_chunk(files, chunk, _bytes(buffer))
            out[places[chosen]] = buffer[rows[chosen] % self.chunk_rows]

    def _is_whole(self, rows: NDArray[np.int64], places: NDArray[np.int64]) -> bool:
        """Whether these rows are one whole chunk, wanted in order and side by side."""
        in_order = np.all(np.diff(rows) == 1) and np.all(np.diff(places) == 1)
        return len(rows) == self.chunk_rows and bool(in_order)

    def _read_chunk(self, files: "_Files", chunk: int, target: Buffer) -> None:
        """Inner chunk number `chunk` of the array, its bytes into `target`."""
        shard, within = divmod(chunk, self.file_rows // self.chunk_rows)
        offset, length = self._index(files, shard)[within] if self.sharded else (0, None)
        if offset == MISSING:
            raise CacheError(f"{self._name(shard)} lacks chunk {within}: {REMEDY}")
        if self.compressed:
            whole = self._unpack(files, shard, offset, length, target)
        else:
            right = length is None or length == len(target) + CRC_BYTES
            whole = right and _checked(files.open(shard), offset, target)
        if not whole:
            raise CacheError(f"{self._name(shard)}: chunk {within} is damaged: {REMEDY}")

    def _unpack(
        self, files: "_Files", shard: int, offset: int, length: int | None, target: Buffer
    ) -> bool:
        """Read and decompress into `target`; False for damage."""
        handle = files.open(shard)
        if length is None:
            length = os.fstat(handle).st_size
        packed = np.empty(max(length - CRC_BYTES, 0), np.uint8)
        if not _checked(handle, offset, packed):
            return False
        try:
            Zstd().decode(packed, out=target)
        except (RuntimeError, ValueError):
            return False
        return True

    def _open(self, path: Path) -> int:
        for _ in range(FETCHES):
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                if self._fetch is None:
                    break
            # Another thread that needs room may remove it again before it is opened.
            self._fetch(path)
        raise CacheError(f"{path} is missing: {REMEDY}")

    def _index(self, files: "_Files", shard: int) -> list[tuple[int, int]]:
        """Offset and length of each inner chunk of a shard, `MISSING` for absent ones."""
        if shard not in self._indices:
            data = np.empty(self.file_rows // self.chunk_rows * 16, np.uint8)
            if not _checked(files.open(shard), -len(data) - CRC_BYTES, data):
                raise CacheError(f"{self._name(shard)}: the shard index is damaged: {REMEDY}")
            self._indices[shard] = [
                tuple(pair) for pair in data.view("<u8").reshape(-1, 2).tolist()
            ]
        return self._indices[shard]

    def _name(self, shard: int) -> Path:
        return self.path.joinpath("c", str(shard), *["0"] * len(self.row_shape))


class _Files:
    """The shards that one call reads, open until it ends: a cache may have 20,000 of them."""

    def __init__(self, array: DirectArray) -> None:
        self._array = array
        self._handles: dict[int, int] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def open(self, shard: int) -> int:
        """A file descriptor of the shard's file."""
        handle = self._handles.get(shard)
        if handle is None:
            handle = self._handles[shard] = self._array._open(self._array._name(shard))
        return handle


def _bytes(rows: NDArray[Any]) -> Buffer:
    return rows.reshape(-1).view(np.uint8)


def _checked(handle: int, offset: int, target: Buffer) -> bool:
    """Fill `target` and compare the crc32c behind it; False when either is not as written.

    An `offset` from the end of the file is negative.
    """
    stored = bytearray(CRC_BYTES)
    start = offset if offset >= 0 else max(os.fstat(handle).st_size + offset, 0)
    got = os.preadv(handle, [target.data, stored], start)
    # The kernel hands over 2 GiB at most, and less when it is interrupted.
    while 0 < got < len(target):
        more = os.preadv(handle, [target[got:].data, stored], start + got)
        got = got + more if more else 0
    whole = got == len(target) + CRC_BYTES
    return whole and crc32c(target.data) == int.from_bytes(stored, "little")


REMEDY = "delete the unit's .json (its manifest), and run unic-extract again"


def _metadata(path: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((path / "zarr.json").read_bytes())
        return meta
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}/zarr.json cannot be read ({error}): {REMEDY}") from None
