"""One tar through every encoder: the units that are missing, made together and published.

B = batch, N = rows of the tar, S = view size. The path of one image:
  1. `_decode`     its bytes from the tar become uint8 [3, H, W], once for all views and encoders;
  2. `_render`     each wanted view: parameters drawn (or read, where the views are already stored),
                   applied to the pixels, fingerprinted: uint8 [3, S, S];
  3. `_features`   every encoder that lacks this view gets the batch [B, 3, S, S], padded to one
                   shape so that a row's features do not depend on where its tar ends;
  4. writers       rows go to their unit aside; statistics are of the float32 features;
  5. `_publish`    views first, then the features that name them.
Steps 1 and 2 of the next batch run in threads while the encoders work on this one.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from console.progress import ProgressBar
from extract.cache.codecs import encode_fp16
from extract.cache.images import TarIndex, decode, image_extension, key_id
from extract.cache.reader import Cache, Unit
from extract.cache.schema import (
    VIEWS,
    ArraySpec,
    EncoderRecord,
    TarRecord,
    UnitRecord,
    feature_specs,
    view_specs,
)
from extract.cache.staging import Staging
from extract.cache.statistics import Moments
from extract.cache.views import Recipe, check_fingerprint, draw_view, fingerprint
from extract.cache.writer import UnitWriter, commit
from extract.encoder import Encoder

Rows = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Job:
    """What extraction needs for any tar: the cache, the recipe, the encoders and how to run them.

    `encoders` maps folder names to (record, encoder); `views` is the number of views.
    """

    cache: Cache
    recipe: Recipe
    views: int
    encoders: Mapping[str, tuple[EncoderRecord, Encoder]]
    batch_size: int
    workers: int
    store_views: bool

    def missing(self, stem: str) -> dict[str, list[int]]:
        """View numbers that each encoder, and `views` itself, lacks for this tar."""
        owners = [VIEWS, *self.encoders]
        label = self.recipe.label
        return {
            owner: [
                view
                for view in range(self.views)
                if not self.cache.layout.manifest(owner, label, view, stem).exists()
            ]
            for owner in owners
        }


class TarExtraction:
    """The missing units of one tar."""

    def __init__(self, job: Job, index: TarIndex, record: TarRecord, staging: Staging) -> None:
        self.job, self.index, self.record, self.staging = job, index, record, staging
        self.missing = job.missing(record.stem)
        self.stored = {
            view: job.cache.unit(VIEWS, job.recipe.label, view, record.stem)
            for view in range(job.views)
            if view not in self.missing[VIEWS]
        }
        self.wanted = sorted({view for views in self.missing.values() for view in views})
        self.writers = {
            (owner, view): UnitWriter(
                staging.folder / f"{owner}-{view}-{record.stem}.zarr", record.rows, specs
            )
            for owner, specs in self._specs().items()
            for view in self.missing[owner]
        }
        self.statistics: dict[tuple[str, int], dict[str, Moments]] = {}

    def _specs(self) -> dict[str, dict[str, ArraySpec]]:
        recipe = self.job.recipe
        columns = {n: ArraySpec(c.dtype, c.shape) for n, c in recipe.columns.items()}
        specs = {VIEWS: view_specs(columns, recipe.size, self.job.store_views)}
        for name, (record, _) in self.job.encoders.items():
            specs[name] = feature_specs({n: tuple(s) for n, s in record.arrays.items()})
        return specs

    @property
    def work(self) -> int:
        """Rows times units of features to make: what the progress bar counts."""
        return self.record.rows * sum(len(self.missing[name]) for name in self.job.encoders)

    def run(self, progress: ProgressBar) -> None:
        """Make and publish every missing unit of the tar.

        Raises `ImageError` or `FeatureError` naming the key; nothing of the tar is published then.
        """
        for rows, rendered in self._batches():
            for view, (parameters, views_B3SS) in rendered.items():
                self._keep_views(view, rows, parameters, views_B3SS)
                for name in self.job.encoders:
                    if view in self.missing[name]:
                        self._keep_features(name, view, rows, views_B3SS)
                        progress.advance(len(rows), f"{name}, tar {self.record.stem}")
        self._publish()

    def _batches(self) -> Iterator[tuple[range, dict[int, tuple[Rows, Tensor]]]]:
        """Rendered batches in order; the next one is made while the caller uses this one."""
        size, total = self.job.batch_size, self.record.rows
        batches = [range(i, min(i + size, total)) for i in range(0, total, size)]
        # Images are the unit of parallel work: threads within one would only get in the way.
        with ThreadPoolExecutor(
            self.job.workers, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            ahead: list[list[Future[Any]]] = []
            for number, rows in enumerate(batches):
                for batch in batches[number + len(ahead) : number + 2]:
                    ahead.append([pool.submit(self._render_image, row) for row in batch])
                yield rows, self._collate([future.result() for future in ahead.pop(0)])

    def _collate(self, images: list[dict[int, tuple[dict[str, Any], Tensor]]]) -> dict[int, Any]:
        collated = {}
        for view in self.wanted:
            rows = [image[view][0] for image in images]
            columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            collated[view] = (columns, torch.stack([image[view][1] for image in images]))
        return collated

    def _render_image(self, row: int) -> dict[int, tuple[dict[str, Any], Tensor]]:
        """Every wanted view of one image: its stored row (parameters, fingerprint) and pixels."""
        sample = self.index.samples[row]
        where = f"{self.index.path.name}:{sample.key}"
        data = self.index.read(sample, image_extension(sample))
        image = decode(data, where)
        rendered = {}
        for view in self.wanted:
            parameters = self._parameters(row, view, image)
            pixels = self.job.recipe.apply(image, parameters)
            grid, exact = fingerprint(pixels)
            if view in self.stored:
                stored = self.stored[view].column("fingerprint_grid")[row]
                check_fingerprint(stored, grid, f"{where}, view {view}")
            columns = {
                "key": key_id(sample.key),
                "image_index": np.int32(row),
                "image_crc32c": np.uint32(google_crc32c.value(data)),
                "fingerprint_grid": grid,
                "fingerprint_hash": exact,
                **parameters,
            }
            rendered[view] = (columns, pixels)
        return rendered

    def _parameters(self, row: int, view: int, image: Tensor) -> dict[str, NDArray[Any]]:
        if view in self.stored:
            unit: Unit = self.stored[view]
            return {name: unit.column(name)[row] for name in self.job.recipe.columns}
        key = self.index.samples[row].key
        seed, (height, width) = self.job.cache.record.seed, image.shape[-2:]
        return draw_view(self.job.recipe, seed, self.record.stem, row, key, view, height, width)

    def _keep_views(
        self, view: int, rows: range, columns: dict[str, NDArray[Any]], views_B3SS: Tensor
    ) -> None:
        writer = self.writers.get((VIEWS, view))
        if writer is None:
            return
        for name, values in columns.items():
            writer.append(name, values)
        if "pixels" in writer.specs:
            writer.append("pixels", views_B3SS.numpy())

    def _keep_features(self, name: str, view: int, rows: range, views_B3SS: Tensor) -> None:
        writer, encoder = self.writers[name, view], self.job.encoders[name][1]
        features = self._features(encoder, views_B3SS)
        writer.append("key", np.array([key_id(self.index.samples[row].key) for row in rows]))
        statistics = self.statistics.setdefault((name, view), {})
        for array, tokens in features.items():

            def where(i: int, array: str = array) -> str:
                key = self.index.samples[rows[i]].key
                return f"{name}: {array} of {key!r} (tar {self.record.stem}, view {view})"

            writer.append(array, encode_fp16(tokens, where))
            moments = Moments.of(tokens.cpu().numpy())
            statistics[array] = statistics[array].merge(moments) if array in statistics else moments

    def _features(self, encoder: Encoder, views_B3SS: Tensor) -> dict[str, Tensor]:
        size = min(self.job.batch_size, self.record.rows)
        padding = size - len(views_B3SS)
        if padding:
            blank = torch.zeros((padding, *views_B3SS.shape[1:]), dtype=torch.uint8)
            features = encoder(torch.cat([views_B3SS, blank]))
            return {name: tokens[: len(views_B3SS)] for name, tokens in features.items()}
        return dict(encoder(views_B3SS))

    def _publish(self) -> None:
        layout, label, stem = self.job.cache.layout, self.job.recipe.label, self.record.stem
        for view in self.missing[VIEWS]:
            self._commit(VIEWS, view)
        for name, (encoder, _) in self.job.encoders.items():
            for view in self.missing[name]:
                views = UnitRecord.read(layout.manifest(VIEWS, label, view, stem))
                self._commit(name, view, views=views.seal(), encoder=encoder.seal(), codec="fp16")

    def _commit(self, owner: str, view: int, **origin: Any) -> None:
        writer = self.writers[owner, view]
        statistics = self.statistics.get((owner, view), {})
        record = UnitRecord(
            tar=self.record.stem,
            tar_sha256=self.record.sha256,
            recipe=self.job.recipe.label,
            view=view,
            rows=self.record.rows,
            keys_digest=self.record.keys_digest,
            arrays=writer.array_table(),
            objects=writer.finish(),
            statistics={name: moments.to_json() for name, moments in statistics.items()},
            **origin,
        )
        commit(self.job.cache.layout, owner, writer, record, self.staging.folder)
