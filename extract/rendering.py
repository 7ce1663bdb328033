"""The views of one tar's images, made once for all encoders, ahead of the encoders' work.

B = batch, S = view size. The path of one image:
  1. `_decode`     its bytes from the tar become uint8 [3, H, W], once for all views;
  2. `_render`     each wanted view: parameters drawn (or read, where the view is stored already),
                   applied to the pixels, made a JPEG and decoded where views are stored as such,
                   fingerprinted: uint8 [3, S, S];
  3. `batches`     rows are stacked: columns of the views group [B, ...], pixels [B, 3, S, S].
Views whose pixels are in the cache are read from there instead. Threads make the next batch while
the caller uses this one.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from crc32c import crc32c
from numpy.typing import NDArray
from torch import Tensor

from extract.cache.errors import ImageError
from extract.cache.images import Sample, TarIndex, decode, image_extension, key_id
from extract.cache.pictures import encode_jpeg
from extract.cache.reader import Unit
from extract.cache.schema import VIEWS, TarRecord
from extract.cache.views import check_fingerprint, draw_view, fingerprint
from extract.job import Job

AHEAD = 2


@dataclass(frozen=True)
class View:
    """One view of one image: its row in the views group (none if stored), pixels, its JPEG."""

    columns: dict[str, Any]
    pixels: Tensor
    jpeg: bytes = b""


@dataclass(frozen=True)
class ViewBatch:
    """The same for B images: columns `[B, ...]`, `pixels` uint8 `[B, 3, S, S]`, B JPEGs or none."""

    columns: dict[str, NDArray[Any]]
    pixels: Tensor
    jpegs: list[bytes]


class Rendering:
    """Makes the views `wanted` of one tar; `samples` are its rows, without skipped images."""

    def __init__(self, job: Job, index: TarIndex, record: TarRecord, wanted: Sequence[int]) -> None:
        self.job, self.index, self.stem = job, index, record.stem
        self.wanted = tuple(wanted)
        self.samples = kept_samples(index, record)
        stored = job.cache.units(VIEWS, job.recipe.label)
        self.stored: dict[int, Unit] = {
            view: job.cache.unit(VIEWS, job.recipe.label, view, self.stem)
            for view in self.wanted
            if (view, self.stem) in stored
        }

    def batches(
        self, size: int, workers: int, rows: int | None = None
    ) -> Iterator[tuple[range, dict[int, ViewBatch]]]:
        """The first `rows` rows (default: all) in batches of `size`, in order, by view.

        Raises `ImageError` naming the image that cannot be had.
        """
        total = len(self.samples) if rows is None else min(rows, len(self.samples))
        batches = [range(i, min(i + size, total)) for i in range(0, total, size)]
        # Images are the unit of parallel work: threads within one would only get in the way.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ahead: list[list[Future[dict[int, View]]]] = []
            try:
                for number, batch in enumerate(batches):
                    for later in batches[number + len(ahead) : number + AHEAD]:
                        ahead.append([pool.submit(self.image, row) for row in later])
                    yield batch, self._collate([future.result() for future in ahead.pop(0)])
            finally:
                for future in (future for later in ahead for future in later):
                    future.cancel()

    def _collate(self, images: list[dict[int, View]]) -> dict[int, ViewBatch]:
        collated = {}
        for view in self.wanted:
            rows = [image[view] for image in images]
            columns = {
                name: np.stack([row.columns[name] for row in rows]) for name in rows[0].columns
            }
            pixels = torch.stack([row.pixels for row in rows])
            collated[view] = ViewBatch(columns, pixels, [row.jpeg for row in rows if row.jpeg])
        return collated

    def image(self, row: int) -> dict[int, View]:
        """Every wanted view of one image."""
        views = {
            view: View({}, pixels)
            for view, unit in self.stored.items()
            if (pixels := stored_pixels(unit, row)) is not None
        }
        if len(views) < len(self.wanted):
            data, image = self._decode(self.samples[row])
            for view in self.wanted:
                if view not in views:
                    views[view] = self._render(row, view, data, image)
        return views

    def bad(self) -> dict[int, str]:
        """Ordinals of the images that cannot be decoded or cut into views, with the reasons."""
        found = {}
        for row, sample in enumerate(self.samples):
            try:
                self.image(row)
            except ImageError as error:
                found[sample.ordinal] = str(error)
        return found

    def _where(self, sample: Sample) -> str:
        return f"{self.index.path.name}:{sample.key}"

    def _decode(self, sample: Sample) -> tuple[bytes, Tensor]:
        data = self.index.read(sample, image_extension(sample))
        return data, decode(data, self._where(sample))

    def _render(self, row: int, view: int, data: bytes, image: Tensor) -> View:
        sample = self.samples[row]
        parameters = self._parameters(row, view, image)
        pixels, jpeg = self.job.recipe.apply(image, parameters), b""
        if self.job.pixels == "jpeg" and view not in self.stored:
            jpeg = encode_jpeg(pixels)
            pixels = decode(jpeg, self._where(sample))
        grid, exact = fingerprint(pixels)
        if view in self.stored:
            stored = self.stored[view].column("fingerprint_grid")[row]
            check_fingerprint(stored, grid, f"{self._where(sample)}, view {view}")
        columns = {
            "key": key_id(sample.key),
            "image_index": np.int32(sample.ordinal),
            "image_crc32c": np.uint32(crc32c(data)),
            "fingerprint_grid": grid,
            "fingerprint_hash": exact,
            **parameters,
        }
        return View(columns, pixels, jpeg)

    def _parameters(self, row: int, view: int, image: Tensor) -> dict[str, NDArray[Any]]:
        if view in self.stored:
            unit = self.stored[view]
            return {name: unit.column(name)[row] for name in self.job.recipe.columns}
        sample, seed = self.samples[row], self.job.cache.record.seed
        height, width = image.shape[-2:]
        place = (self.stem, sample.ordinal, sample.key, view)
        return draw_view(self.job.recipe, seed, *place, height, width)


def kept_samples(index: TarIndex, record: TarRecord) -> tuple[Sample, ...]:
    """The tar's samples without those that its record says are skipped."""
    skipped = {ordinal for ordinal, _, _ in record.skipped}
    return tuple(sample for sample in index.samples if sample.ordinal not in skipped)


def stored_pixels(unit: Unit, row: int) -> Tensor | None:
    """One view uint8 `[3, S, S]` from a views group that holds pixels, else None."""
    if "pixels" in unit.record.arrays:
        return torch.from_numpy(unit.array("pixels").read(np.array([row]))[0])
    if unit.has_jpegs:
        return decode(unit.jpeg(row), f"{unit.folder}: view {row}")
    return None
