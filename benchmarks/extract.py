"""What does extraction cost beside the teachers' own work?

    uv run python -m benchmarks.extract [--model vit_base_patch16_224] [--images 16]

For one and three teachers, one and four views, fp16 and int8: a whole extraction of photograph-
sized JPEGs (decoding, views, forward, codec, writing, fsync) over the bare forward of the same
teachers on the same crops, already in memory, in the same batches. Both are measured in one run, in
turn. CPU seconds are those of the whole process, so that overlapping work is counted and waiting is
not; on a GPU, wall-clock seconds are what counts. The teachers have random weights: that costs the
same.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from rich.console import Console
from rich.table import Table

from console.device import torch_device
from extract.cache.dataset import CachedViews
from extract.cache.reader import Cache, select
from extract.config import ExtractConfig
from extract.run import extract
from extract.teachers import load_encoder

SIZE = 224


def write_photographs(path: Path, count: int) -> Path:
    """A tar of JPEGs of 500 x 375 pixels, ImageNet's usual size, smooth and noisy."""
    rng = np.random.default_rng(0)
    with wds.TarWriter(str(path), mtime=0) as tar:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
            noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
            tar.write({"__key__": f"{i:06d}", "jpg": noisy})
    return path


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall-clock seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch_device(options.device)
    names = [f"t{i}=random:{options.model}" for i in range(3)]
    encoders = {name: load_encoder(name, size=SIZE, device=device) for name in names}
    table = Table(
        title=f"{options.images} images, {options.model} on {device}, "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    )
    for column in ("teachers", "views", "codec", "extraction, CPU s", "bare forward, CPU s"):
        table.add_column(column, justify="right")
    for column in ("ratio", "ratio, wall", "views/s"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        tar = write_photographs(folder / "images.tar", options.images)
        for teachers in (1, 3):
            for views in (1, 4):
                for codec in ("fp16", "int8"):
                    config = ExtractConfig(
                        data=(str(tar),),
                        cache=folder / f"{teachers}-{views}-{codec}",
                        teachers=tuple(names[:teachers]),
                        recipe=f"unic@{SIZE}",
                        views=views,
                        batch_size=options.batch_size,
                        workers=options.threads,
                        codec=codec,
                        device=options.device,
                    )
                    table.add_row(*measure(config, encoders, options.batch_size))
    Console(width=120).print(table)


def measure(config: ExtractConfig, encoders: dict, batch_size: int) -> list[str]:
    """One row of the table; the two take turns, the better of two counts for each."""
    chosen = {name: encoders[name] for name in config.teachers}
    whole = [seconds(lambda: extract(config, chosen))]
    dataset = CachedViews(select(Cache(config.cache), views=config.views), arrays=())
    crops = dataset.__getitems__(range(len(dataset)))["views"].split(batch_size)

    def bare() -> None:
        for views in crops:
            for encoder in chosen.values():
                encoder(views)

    forward = [seconds(bare)]
    shutil.rmtree(config.cache)
    whole.append(seconds(lambda: extract(config, chosen)))
    forward.append(seconds(bare))
    (cpu, wall), (bare_cpu, bare_wall) = (np.min(pair, axis=0) for pair in (whole, forward))
    made = len(dataset) * len(chosen)
    return [
        *(str(len(chosen)), str(config.views), config.codec or "", f"{cpu:.1f}"),
        *(f"{bare_cpu:.1f}", f"{cpu / bare_cpu:.2f}", f"{wall / bare_wall:.2f}"),
        f"{made / wall:.1f}",
    ]


if __name__ == "__main__":
    main()
