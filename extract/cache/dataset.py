"""The public reader: a torch `Dataset` of (view, targets of every encoder) over a feature cache.

B = batch, S = view size, D = channels of an encoder, P = its patch tokens. The path of one sample:
  1. `index`           number of the sample: row * views + view, rows counted over the chosen tars;
  2. `_groups`         samples of a batch that lie in the same unit (tar, view) are read together;
  3. `_targets`        rows of `cls [B, D]`, `patches [B, P, D]`, float16 as stored, crc32c checked;
  4. `_views`          the very pixels that the encoders saw, uint8 [B, 3, S, S]: stored ones where
                       the cache has them, else decoded from the tar and cut by the stored
                       parameters of the view.

    selection = select(Cache("feats"), encoders=["dino", "deit3"])
    dataset = CachedViews(selection)
    loader = DataLoader(dataset, batch_size=64, shuffle=True, collate_fn=CachedViews.collate)
    for batch in loader:
        batch["views"], batch["targets"]["dino"]["cls"], batch["targets"]["dino"]["patches"]
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from extract.cache.errors import CacheError
from extract.cache.reader import Selection, Unit
from extract.cache.schema import VIEWS, patch_index_name
from extract.cache.tars import TarSource
from extract.cache.views import Recipe, check_fingerprint, fingerprint, parse_recipe

OPEN_UNITS = 4096


class Group(NamedTuple):
    """Samples of a batch that lie in one unit: their places in the batch, and rows in the unit."""

    places: NDArray[np.int64]
    view: int
    tar: str
    rows: NDArray[np.int64]


class Batch(TypedDict):
    """One batch: pixels, targets by encoder and array, kept patches by encoder, sample numbers.

    `views` uint8 [B, 3, S, S]; `targets[encoder]["cls"]` float16 [B, D] and `["patches"]` float16
    [B, P, D]; `positions[encoder]` int64 [B, P] only for encoders stored as a patch subset;
    `index` int64 [B].
    """

    views: Tensor
    targets: dict[str, dict[str, Tensor]]
    positions: dict[str, Tensor]
    index: Tensor


class CachedViews(Dataset[Batch]):
    """Samples of a checked `Selection`: every view of every row of the chosen tars.

    `arrays` names what is read of each encoder; `pixels=False` leaves the views out (for probes
    that need features only); `data` maps tar stems to paths where the tars have moved. Raises
    `CacheError` when an image tar is needed and cannot be found.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        arrays: Sequence[str] = ("cls", "patches"),
        pixels: bool = True,
        data: Mapping[str, Path] | None = None,
    ) -> None:
        self.selection = selection
        self.arrays = tuple(arrays)
        self.pixels = pixels
        self.recipe: Recipe = parse_recipe(selection.recipe)
        self.rows = int(selection.rows_per_tar.sum())
        self.num_views = len(selection.views)
        self._first_row = np.concatenate([[0], np.cumsum(selection.rows_per_tar)])
        self._subsets = [
            name
            for name in selection.encoders
            if selection.cache.codec(name, selection.recipe).patches is not None
        ]
        self.tars = TarSource(selection.cache, selection.tars, data or {})
        self._units: dict[tuple[str, int, str], Unit] = {}

    def __len__(self) -> int:
        return self.rows * self.num_views

    def __getitem__(self, index: int) -> Batch:
        """One sample as a batch of size 1."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples `indices` as one batch; what a `DataLoader` calls."""
        index_B = np.asarray(indices, dtype=np.int64)
        if not len(index_B):
            raise ValueError("a batch needs at least one sample")
        groups = list(self._groups(index_B))
        return Batch(
            views=self._views(index_B, groups) if self.pixels else torch.empty(0),
            targets={
                name: {a: self._gather(name, a, groups, len(index_B)) for a in self.arrays}
                for name in self.selection.encoders
            },
            positions={name: self._positions(name, groups, len(index_B)) for name in self._subsets},
            index=torch.from_numpy(index_B),
        )

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """For `DataLoader(collate_fn=...)`: batches are made whole by the dataset itself."""
        return batch

    def _groups(self, index_B: NDArray[np.int64]) -> Iterator[Group]:
        """Samples by unit: places in the batch, view, tar, and rows within that tar."""
        row_B, view_B = np.divmod(index_B, self.num_views)
        tar_B = np.searchsorted(self._first_row, row_B, side="right") - 1
        unit_B = tar_B * self.num_views + view_B
        order = np.argsort(unit_B, kind="stable")
        _, starts = np.unique(unit_B[order], return_index=True)
        for places in np.split(order, starts[1:]):
            tar = int(tar_B[places[0]])
            view = self.selection.views[int(view_B[places[0]])]
            yield Group(
                places, view, self.selection.tars[tar], row_B[places] - self._first_row[tar]
            )

    def _unit(self, owner: str, group: Group) -> Unit:
        """The open unit; the least recently opened of more than `OPEN_UNITS` is forgotten."""
        key = (owner, group.view, group.tar)
        unit = self._units.get(key)
        if unit is None:
            while len(self._units) >= OPEN_UNITS:
                self._units.pop(next(iter(self._units)), None)
            unit = self.selection.cache.unit(owner, self.selection.recipe, group.view, group.tar)
            if owner != VIEWS and not np.array_equal(unit.keys, self._unit(VIEWS, group).keys):
                raise CacheError(
                    f"{unit.folder}: its rows have other keys than the views they are joined with"
                )
            self._units[key] = unit
        return unit

    def _positions(self, encoder: str, groups: list[Group], size: int) -> Tensor:
        rows, columns = self.selection.cache.encoder(encoder).grid
        name = patch_index_name((rows, columns))
        return self._gather(VIEWS, name, groups, size).long()

    def _gather(self, owner: str, name: str, groups: list[Group], size: int) -> Tensor:
        out: NDArray[Any] | None = None
        for group in groups:
            array = self._unit(owner, group).array(name)
            if out is None:
                out = np.empty((size, *array.row_shape), dtype=array.dtype)
            out[group.places] = array.read(group.rows)
        if out is None:
            raise ValueError("a batch needs at least one sample")
        return torch.from_numpy(out.astype(np.int64) if out.dtype == np.uint16 else out)

    def _views(self, index_B: NDArray[np.int64], groups: list[Group]) -> Tensor:
        size = self.recipe.size
        out = torch.empty((len(index_B), 3, size, size), dtype=torch.uint8)
        for group in groups:
            unit = self._unit(VIEWS, group)
            if "pixels" in unit.record.arrays:
                block = torch.from_numpy(unit.array("pixels").read(group.rows))
            else:
                block = torch.stack([self._render(unit, group.tar, int(r)) for r in group.rows])
            out[torch.from_numpy(group.places)] = block
        return out

    def _render(self, unit: Unit, tar: str, row: int) -> Tensor:
        """The view of one row, made again from its image and its stored parameters."""
        image = self.tars.image(tar, int(unit.column("image_index")[row]), unit.keys[row])
        return self.recipe.apply(image, {n: unit.column(n)[row] for n in self.recipe.columns})

    def check_pixels(self, count: int = 64, seed: int = 0) -> None:
        """Make `count` seeded views and compare them with the fingerprints of what encoders saw.

        Raises `ImageError` naming the first row whose 16x16 grid of pixels differs by more than
        2 levels: other crops, another resize, another decoder, or images that changed.
        """
        rng = np.random.default_rng(seed)
        chosen = np.sort(rng.choice(len(self), size=min(count, len(self)), replace=False))
        for group in self._groups(chosen):
            grids = self._unit(VIEWS, group).array("fingerprint_grid").read(group.rows)
            here = group._replace(places=np.arange(len(group.rows)))
            views = self._views(chosen[group.places], [here])
            for row, stored, view in zip(group.rows, grids, views, strict=True):
                where = f"{self.selection.recipe}, view {group.view}, row {row} of tar {group.tar}"
                check_fingerprint(stored, fingerprint(view)[0], where)
