"""The training stream: which samples at which step, and their targets; the only door to the cache.

B = batch, D = channels of a teacher, P = its patch tokens, V = cached views. The path of a step:
  1. `indices`   the samples of step s: pure arithmetic on (seed, epoch), so that a resumed run, or
                 one with another number of threads, sees the same ones;
  2. `iterate`   threads read whole batches ahead (a few large tensors each);
  3. the batch   views uint8 [B, 3, S, S]; per teacher what is stored of CLS and patch tokens;
  4. `decoded`   CLS [B, D] and patches [B, P, D], float16, on the device where the batch then is.
An epoch shows every image once; its V views take turns over the epochs, from a seeded first one.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.cache.dataset import Batch, CachedViews
from extract.cache.errors import CacheError, UserError
from extract.cache.images import expand
from extract.cache.randomness import permutation, stream_words
from extract.cache.reader import Cache, select

__all__ = ["Batch", "TeacherTargets", "TrainingBatches", "UserError"]


@dataclass(frozen=True)
class TeacherTargets:
    """All that the trainer knows of a teacher, from the cache: widths, grid, exact statistics.

    `statistics[token]` is (mean [D], std [D]) float32 for `cls` and `patches`; a teacher of which
    only CLS tokens are cached has no `patch_width` and no statistics of patches.
    """

    name: str
    cls_width: int
    patch_width: int | None
    grid: tuple[int, int]
    statistics: dict[str, tuple[Tensor, Tensor]]
    licence: str
    fingerprint: str


class TrainingBatches:
    """The samples of a run, checked before the first step.

    Raises `UserError` when the cache is not whole, does not agree with itself, or when 64 views
    made again are not the pixels that the teachers saw.
    """

    def __init__(
        self,
        cache: Path | str,
        *,
        teachers: Sequence[str] = (),
        recipe: str | None = None,
        views: int | None = None,
        data: Sequence[str] = (),
        batch_size: int,
        seed: int,
    ) -> None:
        selection = select(Cache(cache), teachers or None, recipe, views)
        moved = {path.stem: path for path in expand(list(data))} if data else {}
        self.dataset = CachedViews(selection, data=moved, decode=False)
        self.dataset.check_pixels()
        self.seed = seed
        self.rows, self.views = self.dataset.rows, self.dataset.num_views
        self.batch_size = min(batch_size, self.rows)
        self.steps_per_epoch = self.rows // self.batch_size
        self.view_size = self.dataset.recipe.size
        self.recipe = selection.recipe
        self.teachers = {name: self._targets(name) for name in selection.encoders}
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        self._first_view = stream_words(self.rows, "first view", seed).astype(np.int64) % self.views

    def _targets(self, name: str) -> TeacherTargets:
        selection = self.dataset.selection
        record = selection.cache.encoder(name)
        stored = selection.cache.codec(name, selection.recipe).arrays
        if "cls" not in stored:
            raise CacheError(f"{name} has no CLS tokens in the cache; it has {sorted(stored)}")
        moments = selection.statistics(name)
        return TeacherTargets(
            name=name,
            cls_width=record.arrays["cls"][-1],
            patch_width=record.arrays["patches"][-1] if "patches" in stored else None,
            grid=(record.grid[0], record.grid[1]),
            statistics={
                token: (
                    torch.from_numpy(moments[token].mean).float(),
                    torch.from_numpy(moments[token].std()).float(),
                )
                for token in ("cls", "patches")
                if token in stored
            },
            licence=record.licence,
            fingerprint=record.seal(),
        )

    def indices(self, step: int) -> NDArray[np.int64]:
        """Sample numbers `[B]` of a step: row * V + view. The last images short of a batch wait."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        row_B = self._order(epoch)[start : start + self.batch_size]
        view_B = (self._first_view[row_B] + epoch) % self.views
        return row_B * self.views + view_B

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, permutation(self.seed, "epoch", epoch, n=self.rows))
        return self._epoch[1]

    def decoded(self, batch: Batch) -> Batch:
        """The batch with tokens instead of what is stored of them, on its device."""
        return self.dataset.decoded(batch)

    def iterate(self, start: int, stop: int, workers: int) -> Iterator[Batch]:
        """Batches of the steps `start` to `stop - 1` in order, read ahead by `workers` threads."""
        # Batches are the unit of parallel work: threads within one would only get in the way.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ahead: list[Future[Batch]] = []
            try:
                for step in range(start, stop):
                    while len(ahead) <= workers and step + len(ahead) < stop:
                        wanted = self.indices(step + len(ahead)).tolist()
                        ahead.append(pool.submit(self.dataset.__getitems__, wanted))
                    yield ahead.pop(0).result()
            finally:
                for future in ahead:
                    future.cancel()
