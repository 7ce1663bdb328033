"""How fast are cached features read? The direct reader beside what else could read them.

    uv run python -m benchmarks.read [--rows 256] [--repeats 7] [--threads 1]

One run makes stores of the same random features in every form, reads each several times in turn,
and prints medians: megabytes of float16-equivalent features a second (an int8 row and a float16 row
at the same figure give the same images a second), by wall clock and by CPU time, and the ratio to
`readinto` a preallocated buffer of the same file. Files are in the page cache: this measures
software, not disks. Wall clock on shared machines is noisy; ratios within a run are what counts.
"""

import argparse
import functools
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
import zarr
from rich.console import Console
from rich.table import Table

from extract.cache.codecs import Codec, calibrate
from extract.cache.direct import DirectArray
from extract.cache.schema import ArraySpec, feature_specs
from extract.cache.writer import UnitWriter

PATCHES, CHANNELS, BATCH = 196, 768, 32


@dataclass
class Reader:
    """One way to read: `read(rows, out)` fills float16-equivalent features of those rows."""

    name: str
    form: str
    order: str
    read: Callable[[np.ndarray], Any]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def write_array(folder: Path, spec: ArraySpec, rows: np.ndarray) -> Path:
    """One stored array, made by the cache's writer."""
    writer = UnitWriter(folder, len(rows), {"patches": spec})
    writer.append("patches", rows)
    writer.finish()
    return folder / "patches"


def make_stores(root: Path, rows: int) -> tuple[dict[str, Path], dict[str, Codec], np.ndarray]:
    """The same features in every form: by name, `codec/chunk rows`."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(rows, PATCHES, CHANNELS, generator=rng)
    stores, codecs = {}, {}
    for name in ("fp16", "int8", "int8-zstd", "int4"):
        codecs[name] = calibrate(name, tokens[:32].half())
        stored = torch.cat(
            [codecs[name].encode("patches", part, str)[0]["patches"] for part in tokens.split(32)]
        ).numpy()
        spec = feature_specs({"patches": (PATCHES, CHANNELS)}, name)["patches"]
        for chunk in (1, 8, 32) if name in ("fp16", "int8") else (1,):
            cut = replace(spec, chunk=chunk)
            stores[f"{name}/{chunk}"] = write_array(root / f"{name}-{chunk}", cut, stored)
    half = tokens.half().numpy()
    half.tofile(root / "raw.bin")
    with wds.TarWriter(str(root / "features.tar")) as tar:
        for i, row in enumerate(half):
            out = io.BytesIO()
            np.save(out, row)
            tar.write({"__key__": f"{i:06d}", "npy": out.getvalue()})
    return stores, codecs, half


def limits(root: Path, rows: int) -> list[Reader]:
    """What the machine gives: copying memory, and reading files into memory that is there."""
    row_bytes = PATCHES * CHANNELS * 2
    buffer = np.empty((BATCH, PATCHES, CHANNELS), np.float16)
    source = np.fromfile(root / "raw.bin", np.float16).reshape(-1, PATCHES, CHANNELS)
    file = os.open(root / "raw.bin", os.O_RDONLY)
    mapped = np.memmap(root / "raw.bin", np.float16, "r").reshape(rows, PATCHES, CHANNELS)

    def copy(wanted: np.ndarray) -> None:
        np.take(source, wanted, axis=0, out=buffer)

    def readinto(wanted: np.ndarray) -> None:
        for place, row in enumerate(wanted.tolist()):
            os.preadv(file, [buffer[place].reshape(-1).view(np.uint8).data], row * row_bytes)

    def memmap(wanted: np.ndarray) -> None:
        np.take(mapped, wanted, axis=0, out=buffer)

    return [
        Reader("memory copy", "raw", "random", copy),
        Reader("readinto", "raw", "random", readinto),
        Reader("np.memmap", "raw", "random", memmap),
    ]


def direct(path: Path, form: str, order: str, threads: int) -> Reader:
    """The cache's own reader, rows into a buffer that is there, on so many threads."""
    array = DirectArray(path)
    buffer = np.empty((BATCH, *array.row_shape), array.dtype)
    pool = ThreadPoolExecutor(threads)

    def read(wanted: np.ndarray) -> None:
        if threads == 1:
            array.read_into(wanted, buffer)
            return
        places = np.array_split(np.arange(len(wanted)), threads)
        list(pool.map(lambda part: array.read_into(wanted[part], buffer, part), places))

    return Reader(f"direct, {threads} thread{'s' * (threads > 1)}", form, order, read)


def decoded(path: Path, form: str, codec: Codec) -> Reader:
    """The same, and then float16 again, on one thread."""
    inner = direct(path, form, "random", 1)
    array = DirectArray(path)
    buffer = np.empty((BATCH, *array.row_shape), array.dtype)
    scale = torch.ones((BATCH, PATCHES), dtype=torch.float16)

    def read(wanted: np.ndarray) -> None:
        array.read_into(wanted, buffer)
        codec.decode({"patches": torch.from_numpy(buffer), "scale_patches": scale}, "patches")

    return replace(inner, name="direct and decoded", read=read)


def array_rows(array: Any, wanted: np.ndarray) -> None:
    array.oindex[wanted]


def array_slice(array: Any, wanted: np.ndarray) -> None:
    array[wanted[0] : wanted[-1] + 1]


def readers(root: Path, rows: int, threads: int) -> list[Reader]:
    """Everything that is compared."""
    stores, codecs, _ = make_stores(root, rows)
    found = limits(root, rows)
    for form, path in stores.items():
        for order in ("random", "in order"):
            found.append(direct(path, form, order, 1))
        if threads > 1:
            found.append(direct(path, form, "random", threads))
        if form.endswith("/1"):
            found.append(decoded(path, form, codecs[form.split("/")[0]]))
    for form in ("fp16/1", "fp16/8", "fp16/32", "int8/1"):
        array: Any = zarr.open_array(stores[form], mode="r")
        for order in ("random", "in order"):
            read = array_rows if order == "random" else array_slice
            found.append(Reader("zarr-python", form, order, functools.partial(read, array)))
    tar = root / "features.tar"

    def webdataset(wanted: np.ndarray) -> None:
        stream = iter(wds.WebDataset(str(tar), shardshuffle=False))
        for _ in range(len(wanted)):
            np.load(io.BytesIO(next(stream)["npy"]))

    found.append(Reader("WebDataset .npy", "raw", "in order", webdataset))
    return found


def measure(found: list[Reader], rows: int, repeats: int) -> None:
    """Each reader in turn, again and again, so that busy moments strike all alike."""
    rng = np.random.default_rng(0)
    shuffled, ordered = rng.permutation(rows), np.arange(rows)
    for repeat in range(repeats + 1):
        for reader in found:
            order = shuffled if reader.order == "random" else ordered
            batches = order[: rows // BATCH * BATCH].reshape(-1, BATCH)
            if reader.name.startswith("WebDataset"):
                batches = batches[:1]
            wall, cpu = time.perf_counter(), time.process_time()
            for wanted in batches:
                reader.read(wanted)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if repeat:  # The first round fills the page cache.
                size = batches.size * PATCHES * CHANNELS * 2 / 1e6
                reader.wall.append(size / wall)
                reader.cpu.append(size / max(cpu, 1e-9))


def print_table(found: list[Reader], rows: int) -> None:
    base = next(reader for reader in found if reader.name == "readinto")
    per_image = PATCHES * CHANNELS * 2 / 1e6
    table = Table(title=f"{rows} rows of {PATCHES} x {CHANNELS}, batches of {BATCH}")
    for column in ("reader", "codec/chunk rows", "rows", "MB/s", "MB/s of CPU", "x readinto"):
        table.add_column(column, justify="right" if column[:1] in "Mx" else "left")
    table.add_column("x, CPU", justify="right")
    table.add_column("images/s", justify="right")
    for reader in found:
        wall, cpu = statistics.median(reader.wall), statistics.median(reader.cpu)
        table.add_row(
            *(reader.name, reader.form, reader.order, f"{wall:,.0f}", f"{cpu:,.0f}"),
            f"{statistics.median(np.divide(reader.wall, base.wall)):.2f}",
            f"{statistics.median(np.divide(reader.cpu, base.cpu)):.2f}",
            f"{wall / per_image:,.0f}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        found = readers(Path(folder), options.rows, options.threads)
        measure(found, options.rows, options.repeats)
    print_table(found, options.rows)


if __name__ == "__main__":
    main()
