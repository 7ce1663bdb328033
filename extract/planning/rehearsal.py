"""A short measured run before the long one: what decoding, views, encoders and the disk cost here.

B = views of a forward pass, S = view size. Every figure is taken from the real thing: images of the
data, views of the recipe, forward passes at the run's own batch size (less on a CPU), and bytes
flushed to the cache's disk. Figures are of one core where the name says so; nothing is kept.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from extract.cache.errors import ImageError
from extract.cache.images import decode
from extract.cache.pictures import encode_jpeg
from extract.cache.views import Recipe, draw_view, fingerprint
from extract.encoders.encoder import Encoder
from extract.planning.sizes import existing

FORWARD_SECONDS = 1.0
FORWARDS = 8
CPU_BATCH = 8
DISK_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Source:
    """One image of the data: where it is in its tar, and how its bytes are read."""

    stem: str
    ordinal: int
    key: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class ViewCost:
    """Measured on one core: milliseconds to read and decode an image, and to make one view.

    `jpeg_bytes` is the mean size of a view as the JPEG that `--store-views jpeg` keeps.
    """

    images: int
    decode_ms: float
    view_ms: float
    jpeg_bytes: float


@dataclass(frozen=True)
class Rehearsal:
    """All measured figures. `forward_ms` is a view's time by encoder; the disk may be unknown."""

    device: str
    cores: int
    views: ViewCost
    forward_ms: Mapping[str, float]
    disk_bytes_per_s: float | None


def rehearse(
    sources: Sequence[Source],
    recipe: Recipe,
    seed: int,
    views: int,
    encoders: Mapping[str, Encoder],
    batch_size: int,
    device: torch.device,
    folder: Path | None,
) -> Rehearsal:
    """Measure on the images `sources`, the encoders (already on `device`) and the disk of `folder`.

    Raises `ImageError` when not one of the images can be decoded.
    """
    cost, made = measure_views(sources, recipe, seed, views)
    batch = batch_size if device.type == "cuda" else min(batch_size, CPU_BATCH)
    views_B3SS = torch.stack([made[i % len(made)] for i in range(batch)])
    return Rehearsal(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        cores=available_cores(),
        views=cost,
        forward_ms={name: forward_ms(encoder, views_B3SS) for name, encoder in encoders.items()},
        disk_bytes_per_s=write_rate(folder) if folder else None,
    )


def measure_views(
    sources: Sequence[Source], recipe: Recipe, seed: int, views: int
) -> tuple[ViewCost, list[Tensor]]:
    """Decode the images and make up to 4 views of each, on one core; the cost, and the views.

    Images that cannot be decoded are passed over: they are the long run's business. The first
    image warms up and is not counted, where there are others.
    """
    decoding, making, pixels, fault = [], [], [], None
    with one_thread():
        for source in (sources[0], *sources):
            try:
                began = time.perf_counter()
                image = decode(source.read(), f"{source.stem}.tar:{source.key}")
                decoded = time.perf_counter()
                made = list(_views(source, image, recipe, seed, min(views, 4)))
            except ImageError as error:
                fault = error
                continue
            decoding.append(decoded - began)
            making.append((time.perf_counter() - decoded) / len(made))
            pixels += made
    if fault is not None and not decoding:
        raise fault
    counted = slice(1, None) if len(decoding) > 1 else slice(None)
    cost = ViewCost(
        images=len(decoding[counted]),
        decode_ms=_mean(decoding[counted]) * 1e3,
        view_ms=_mean(making[counted]) * 1e3,
        jpeg_bytes=_mean([len(encode_jpeg(view)) for view in pixels[:32]]),
    )
    return cost, pixels


def _views(
    source: Source, image: Tensor, recipe: Recipe, seed: int, views: int
) -> Iterator[Tensor]:
    for view in range(views):
        place = (source.stem, source.ordinal, source.key, view)
        made = recipe.apply(image, draw_view(recipe, seed, *place, *image.shape[-2:]))
        fingerprint(made)
        yield made


@torch.inference_mode()
def forward_ms(encoder: Encoder, views_B3SS: Tensor) -> float:
    """Milliseconds a view: passes of one batch for about a second, after one to warm up.

    Copying the features back in float16 is part of it.
    """

    def run() -> None:
        for tokens in encoder(views_B3SS).values():
            tokens.half().cpu()

    run()
    began, passes = time.perf_counter(), 0
    while passes < FORWARDS and time.perf_counter() - began < FORWARD_SECONDS:
        run()
        passes += 1
    return (time.perf_counter() - began) / (passes * len(views_B3SS)) * 1e3


def write_rate(folder: Path) -> float | None:
    """Bytes a second that the disk of `folder` (or of its nearest existing parent) takes, flushed.

    Writes 64 MiB to a nameless file. None where nothing can be written.
    """
    data = os.urandom(DISK_BYTES // 16)
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as file:
            began = time.perf_counter()
            for _ in range(16):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return DISK_BYTES / (time.perf_counter() - began)
    except OSError:
        return None


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
