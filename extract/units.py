"""One tar through every encoder: the units that are missing, made together and published.

B = batch, N = rows of the tar, S = view size, P = patch tokens, K = kept ones. The path of a batch:
  1. `Rendering`   every wanted view of every image, uint8 [B, 3, S, S] (extract.rendering);
  2. `_forward`    every encoder that lacks this view gets the batch, padded to one shape so that a
                   row's features do not depend on where its tar ends;
  3. `_features`   statistics of the float32 features, kept patches [B, K, D], the codec: all on the
                   encoder's device;
  4. writers       rows go to their unit aside, in a thread of their own;
  5. `_publish`    views first, then kept patches, then the features that name both.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from console.progress import ProgressBar
from extract.cache.images import TarIndex, key_id
from extract.cache.schema import (
    VIEWS,
    ArraySpec,
    TarRecord,
    UnitRecord,
    subset_specs,
    view_specs,
)
from extract.cache.staging import Staging
from extract.cache.statistics import Moments
from extract.cache.subsets import kept_patches
from extract.cache.writer import UnitWriter, commit, group_name
from extract.encoders.encoder import Encoder
from extract.job import Job
from extract.rendering import Rendering, ViewBatch

PENDING = 4


class TarExtraction:
    """The missing units of one tar."""

    def __init__(self, job: Job, index: TarIndex, record: TarRecord, staging: Staging) -> None:
        self.job, self.record, self.staging = job, record, staging
        self.missing = job.missing(record.stem)
        wanted = sorted({view for views in self.missing.values() for view in views})
        self.rendering = Rendering(job, index, record, wanted)
        self.keys = np.array([key_id(sample.key) for sample in self.rendering.samples])
        self.statistics: dict[tuple[str, int], dict[str, Moments]] = {}
        self.rescaled: dict[tuple[str, int], int] = {}

    def _specs(self) -> dict[str, dict[str, ArraySpec]]:
        recipe = self.job.recipe
        columns = {n: ArraySpec(c.dtype, c.shape) for n, c in recipe.columns.items()}
        specs = {VIEWS: view_specs(columns, recipe.size, self.job.pixels)}
        specs |= {owner: subset_specs(kept) for owner, (_, kept) in self.job.subsets.items()}
        return specs | {name: t.stored.specs() for name, t in self.job.teachers.items()}

    def run(self, progress: ProgressBar) -> bool:
        """Make and publish every missing unit of the tar.

        Returns False where another process published other views of the tar meanwhile (from
        hardware that rounds otherwise), so that features have to be made again, from those. Raises
        `ImageError` or `FeatureError` naming the key; nothing of the tar is published then.
        """
        folder, stem = self.staging.folder, self.record.stem
        self.writers = {
            (owner, view): UnitWriter(
                folder / f"{owner}-{view}-{stem}.zarr", self.record.rows, specs
            )
            for owner, specs in self._specs().items()
            for view in self.missing[owner]
        }
        with WritingThread() as writing:
            for rows, views in self.rendering.batches(self.job.batch_size, self.job.workers):
                for view, batch in views.items():
                    self._keep_views(view, rows, batch, writing)
                    for name in self.job.teachers:
                        if view in self.missing[name]:
                            self._keep_features(name, view, rows, batch.pixels, writing)
                            progress.advance(len(rows), f"{name}, tar {stem}")
        return self._publish()

    def _keep_views(
        self, view: int, rows: range, batch: ViewBatch, writing: "WritingThread"
    ) -> None:
        writer = self.writers.get((VIEWS, view))
        if writer is not None:
            arrays = dict(batch.columns)
            if "pixels" in writer.specs:
                arrays["pixels"] = batch.pixels.numpy()
            writing.append(writer, arrays)
            if batch.jpegs:
                writing.submit(writer.append_jpegs, batch.jpegs)
        for owner in self.job.subsets:
            if view in self.missing[owner]:
                arrays = {
                    "key": self.keys[list(rows)],
                    "patch_index": self._kept(owner, view, rows),
                }
                writing.append(self.writers[owner, view], arrays)

    def _kept(self, owner: str, view: int, rows: range) -> NDArray[np.uint16]:
        """Positions `[B, K]` of the patches to keep."""
        grid, kept = self.job.subsets[owner]
        seed, samples = self.job.cache.record.seed, self.rendering.samples
        place = [(self.record.stem, samples[row].ordinal, samples[row].key) for row in rows]
        return np.stack([kept_patches(seed, *sample, view, grid, kept) for sample in place])

    def _keep_features(
        self, name: str, view: int, rows: range, views_B3SS: Tensor, writing: "WritingThread"
    ) -> None:
        teacher = self.job.teachers[name]
        size = min(self.job.batch_size, self.record.rows)
        tokens = padded(teacher.encoder, views_B3SS, size)
        arrays: dict[str, Tensor] = {}
        for array in teacher.stored.arrays:

            def where(i: int, array: str = array) -> str:
                key = self.rendering.samples[rows[i]].key
                return f"{name}: {array} of {key!r} (tar {self.record.stem}, view {view})"

            kept = tokens[array]
            if array == "patches" and teacher.subset is not None:
                kept = take(kept, self._kept(teacher.subset, view, rows))
            coded, rescaled = teacher.codec.encode(array, kept, where)
            arrays |= coded
            self.rescaled[name, view] = self.rescaled.get((name, view), 0) + rescaled
            statistics = self.statistics.setdefault((name, view), {})
            part = Moments.of_tensor(tokens[array])
            statistics[array] = statistics[array].merge(part) if array in statistics else part
        stored = {array: coded.cpu().numpy() for array, coded in arrays.items()}
        writing.append(self.writers[name, view], {"key": self.keys[list(rows)], **stored})

    def _publish(self) -> bool:
        layout, label, stem = self.job.cache.layout, self.job.recipe.label, self.record.stem
        for view in self.missing[VIEWS]:
            made = self._commit(VIEWS, view)
            if UnitRecord.read(layout.manifest(VIEWS, label, view, stem)).group != made.group:
                return False

        def seal(owner: str | None, view: int) -> str | None:
            return owner and UnitRecord.read(layout.manifest(owner, label, view, stem)).seal()

        for owner in self.job.subsets:
            for view in self.missing[owner]:
                self._commit(owner, view, views=seal(VIEWS, view))
        for name, teacher in self.job.teachers.items():
            for view in self.missing[name]:
                self._commit(
                    name,
                    view,
                    views=seal(VIEWS, view),
                    subset=seal(teacher.subset, view),
                    encoder=teacher.record.seal(),
                    codec=teacher.stored.seal(),
                    rescaled=self.rescaled[name, view],
                )
        return True

    def _commit(self, owner: str, view: int, **origin: Any) -> UnitRecord:
        writer = self.writers[owner, view]
        statistics = self.statistics.get((owner, view), {})
        objects = writer.finish()
        record = UnitRecord(
            tar=self.record.stem,
            tar_sha256=self.record.sha256,
            recipe=self.job.recipe.label,
            view=view,
            rows=self.record.rows,
            keys_digest=self.record.keys_digest,
            group=group_name(self.record.stem, objects),
            arrays=writer.array_table(),
            objects=objects,
            statistics={name: moments.to_json() for name, moments in statistics.items()},
            **origin,
        )
        cache = self.job.cache
        commit(cache.layout, owner, writer, record, self.staging.folder, cache.mirror)
        return record


class WritingThread:
    """Writes rows in order beside the encoders' work, a few batches behind it at most."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []

    def __enter__(self) -> "WritingThread":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._settle(0)

    def append(self, writer: UnitWriter, arrays: dict[str, NDArray[Any]]) -> None:
        """Add rows to several arrays of a unit."""
        for name, rows in arrays.items():
            self.submit(writer.append, name, rows)

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Have something done after what was submitted before; raises what went wrong there."""
        self._pending.append(self._pool.submit(work, *arguments))
        self._settle(PENDING * 8)

    def _settle(self, left: int) -> None:
        while len(self._pending) > left or (self._pending and self._pending[0].done()):
            self._pending.pop(0).result()


def padded(encoder: Encoder, views_B3SS: Tensor, size: int) -> dict[str, Tensor]:
    """The encoder's tokens of a batch that is filled up to `size` rows with blank ones."""
    padding = size - len(views_B3SS)
    if padding <= 0:
        return dict(encoder(views_B3SS))
    blank = torch.zeros((padding, *views_B3SS.shape[1:]), dtype=torch.uint8)
    features = encoder(torch.cat([views_B3SS, blank]))
    return {name: tokens[: len(views_B3SS)] for name, tokens in features.items()}


def take(patches_BPD: Tensor, positions_BK: NDArray[np.uint16]) -> Tensor:
    """The patch tokens `[B, K, D]` at each row's positions."""
    index_BK = torch.from_numpy(positions_BK.astype(np.int64)).to(patches_BPD.device)
    return patches_BPD.gather(1, index_BK[..., None].expand(-1, -1, patches_BPD.shape[-1]))
