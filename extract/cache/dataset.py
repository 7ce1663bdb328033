"""The public reader: a torch `Dataset` of (view, targets of every encoder) over a feature cache.

B = batch, S = view size, D = channels of an encoder, P = its patch tokens. The path of one sample:
  1. `index`           number of the sample: row * views + view, rows counted over the chosen tars;
  2. `_groups`         samples of a batch that lie in the same unit (tar, view) are read together;
  3. `_stored`         rows of the arrays as they are stored, crc32c checked;
  4. `decoded`         `cls [B, D]`, `patches [B, P, D]` float16, whatever the codec: here, or on
                       the device of the trainer, which then moves half the bytes or fewer;
  5. `_views`          the very pixels that the encoders saw, uint8 [B, 3, S, S]: stored ones where
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
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from extract.cache.codecs import Codec
from extract.cache.errors import CacheError
from extract.cache.images import decode
from extract.cache.reader import Selection, Unit
from extract.cache.schema import VIEWS
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
    [B, P, D], where the cache has them; `positions[encoder]` int64 [B, P] only for encoders stored
    as a patch subset; `index` int64 [B].
    """

    views: Tensor
    targets: dict[str, dict[str, Tensor]]
    positions: dict[str, Tensor]
    index: Tensor


class CachedViews(Dataset[Batch]):
    """Samples of a checked `Selection`: every view of every row of the chosen tars.

    `arrays` names what is read of each encoder, as far as it is stored; `pixels=False` leaves the
    views out (for probes that need features only); `decode=False` leaves targets as stored, for
    `decoded` to undo elsewhere; `data` maps tar stems to paths where the tars have moved. Raises
    `CacheError` when an image tar is needed and cannot be found.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        arrays: Sequence[str] = ("cls", "patches"),
        pixels: bool = True,
        decode: bool = True,
        data: Mapping[str, Path] | None = None,
    ) -> None:
        self.selection = selection
        self.pixels, self.decode = pixels, decode
        self.recipe: Recipe = parse_recipe(selection.recipe)
        self.rows = int(selection.rows_per_tar.sum())
        self.num_views = len(selection.views)
        self._first_row = np.concatenate([[0], np.cumsum(selection.rows_per_tar)])
        self.codecs: dict[str, Codec] = {}
        self.arrays: dict[str, tuple[str, ...]] = {}
        self._subsets: dict[str, str] = {}
        for name in selection.encoders:
            record = selection.cache.codec(name, selection.recipe)
            self.codecs[name] = Codec(record.codec, record.calibration)
            self.arrays[name] = tuple(array for array in arrays if array in record.arrays)
            subset = selection.cache.subset(name, selection.recipe)
            if subset is not None and "patches" in self.arrays[name]:
                self._subsets[name] = subset
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
        batch = Batch(
            views=self._views(index_B, groups) if self.pixels else torch.empty(0),
            targets={name: self._stored(name, groups, len(index_B)) for name in self.arrays},
            positions={
                name: self._gather(owner, "patch_index", groups, len(index_B)).long()
                for name, owner in self._subsets.items()
            },
            index=torch.from_numpy(index_B),
        )
        return self.decoded(batch) if self.decode else batch

    def decoded(self, batch: Batch) -> Batch:
        """The batch with targets as float16 tokens instead of what is stored, on its device."""
        targets = {
            name: {array: codec.decode(batch["targets"][name], array) for array in arrays}
            for name, codec, arrays in (
                (name, self.codecs[name], arrays) for name, arrays in self.arrays.items()
            )
        }
        return Batch(
            views=batch["views"],
            targets=targets,
            positions=batch["positions"],
            index=batch["index"],
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

    def _stored(self, encoder: str, groups: list[Group], size: int) -> dict[str, Tensor]:
        """Every stored array that the wanted ones are decoded from, `[B, ...]` each."""
        codec = self.codecs[encoder]
        needed = [stored for array in self.arrays[encoder] for stored in codec.needs(array)]
        return {stored: self._gather(encoder, stored, groups, size) for stored in needed}

    def _gather(self, owner: str, name: str, groups: list[Group], size: int) -> Tensor:
        first = self._unit(owner, groups[0]).array(name)
        out = np.empty((size, *first.row_shape), dtype=first.dtype)
        for group in groups:
            self._unit(owner, group).array(name).read_into(group.rows, out, group.places)
        return torch.from_numpy(out.astype(np.int32) if out.dtype == np.uint16 else out)

    def _views(self, index_B: NDArray[np.int64], groups: list[Group]) -> Tensor:
        size = self.recipe.size
        out = torch.empty((len(index_B), 3, size, size), dtype=torch.uint8)
        for group in groups:
            unit = self._unit(VIEWS, group)
            if "pixels" in unit.record.arrays:
                unit.array("pixels").read_into(group.rows, out.numpy(), group.places)
                continue
            for place, row in zip(group.places.tolist(), group.rows.tolist(), strict=True):
                out[place] = (
                    decode(unit.jpeg(row), f"{unit.folder}: view {row}")
                    if unit.has_jpegs
                    else self._render(unit, group, row)
                )
        return out

    def _render(self, unit: Unit, group: Group, row: int) -> Tensor:
        """The view of one row, made again from its image and its stored parameters."""
        ordinal, checksum = (int(unit.column(n)[row]) for n in ("image_index", "image_crc32c"))
        image = self.tars.image(group.tar, ordinal, unit.keys[row], checksum)
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
