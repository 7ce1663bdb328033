"""Features and labels of a data set, through the extraction stage and its cache.

The only door of this stage to `extract` and `distill`: students and teachers come in the same way.
N = images, S = view size, D = channels, P = patch tokens. The path of one data set:
  1. `extract`      every encoder over the centre view of every image, into
                    `<cache>/eval/<set>-<split>-<recipe>`; what is there already is not done again;
  2. `Split`        that cache opened: `cls [N, D]`, patch tokens on demand, float32;
  3. labels         read from the tars: `.cls` (a number), `.seg.png` (a mask, cut like the view).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from console.device import torch_device
from console.locations import below
from extract.cache.dataset import CachedViews
from extract.cache.errors import ImageError, UserError
from extract.cache.images import decode_mask, is_image_folder
from extract.cache.reader import Cache, Selection, Unit, select
from extract.cache.schema import VIEWS
from extract.cache.views import parse_recipe
from extract.config import ExtractConfig
from extract.encoders.encoder import Encoder
from extract.packing import list_pictures
from extract.run import extract, find_tars
from extract.teachers import encoder_folder, load_encoder

__all__ = [
    "Encoder",
    "EvaluationError",
    "PatchTokens",
    "Split",
    "UserError",
    "check_classes",
    "encoder_folder",
    "extract_split",
    "load_encoders",
]

IGNORE = 255
# Tokens of a split that are fewer bytes are read once; a probe asks for them dozens of times.
KEPT_BYTES = 2**30


class EvaluationError(UserError):
    """A data set or an encoder that cannot be evaluated as asked."""


@dataclass(frozen=True)
class PatchTokens:
    """Patch tokens of one encoder over a split, read from the cache when they are indexed.

    Those of `KEPT_BYTES` and less are read at once, when the first of them are wanted.
    """

    dataset: CachedViews
    encoder: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Tokens float32 `[B, P, D]` of the rows `[B]`."""
        rows = torch.as_tensor(rows)
        return (self._kept[rows] if self._fits else self._read(rows.tolist())).float()

    def _read(self, rows: Sequence[int]) -> Tensor:
        return self.dataset.__getitems__(rows)["targets"][self.encoder]["patches"]

    @cached_property
    def _fits(self) -> bool:
        return self._read([0]).nbytes * len(self) <= KEPT_BYTES

    @cached_property
    def _kept(self) -> Tensor:
        return self._read(range(len(self)))


class Split:
    """One split of a data set, with the features of every encoder; rows are in the tars' order."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self._pictures = CachedViews(selection, arrays=())

    def __len__(self) -> int:
        return self._pictures.rows

    def cls(self, encoder: str) -> Tensor:
        """Global tokens float32 `[N, D]`."""
        dataset = self._features(encoder, "cls")
        batch = dataset.__getitems__(range(len(dataset)))
        return batch["targets"][encoder]["cls"].float()

    def patches(self, encoder: str) -> PatchTokens:
        """Patch tokens, on demand."""
        return PatchTokens(self._features(encoder, "patches"), encoder)

    def _features(self, encoder: str, array: str) -> CachedViews:
        one = Selection(
            self.selection.cache, self.selection.recipe, (encoder,), (0,), self.selection.tars
        )
        return CachedViews(one, arrays=(array,), pixels=False)

    def grid(self, encoder: str) -> tuple[int, int]:
        """Rows and columns of the encoder's patch tokens."""
        rows, columns = self.selection.cache.encoder(encoder).grid
        return rows, columns

    def weights_sha256(self, encoder: str) -> str:
        """Hash of the encoder's weights."""
        return self.selection.cache.encoder(encoder).weights_sha256

    def pictures(self, rows: Sequence[int]) -> Tensor:
        """The views of some rows, uint8 `[n, 3, S, S]`."""
        return self._pictures.__getitems__(list(rows))["views"]

    @cached_property
    def labels(self) -> Tensor:
        """Class numbers int64 `[N]` from the `.cls` members; raises `EvaluationError` without."""
        return torch.tensor([self._label(tar, ordinal) for tar, _, ordinal in self._places()])

    @cached_property
    def masks(self) -> Tensor:
        """Category masks uint8 `[N, S, S]` from `.seg.png`, 255 = ignored, cut like the views."""
        recipe = parse_recipe(self.selection.recipe)
        units = {tar: self._views(tar) for tar in self.selection.tars}
        masks = []
        for tar, row, ordinal in self._places():
            where, data = self._member(tar, ordinal, "seg.png", "unic-eval segmentation")
            mask = decode_mask(data, where)
            if mask.max() > IGNORE:
                raise EvaluationError(
                    f"{where}: category {mask.max()} found; masks hold categories up to "
                    f"{IGNORE - 1}, and {IGNORE} where a pixel is ignored"
                )
            parameters = {name: units[tar].column(name)[row] for name in recipe.columns}
            try:
                masks.append(recipe.apply_mask(mask, parameters).to(torch.uint8))
            except ImageError:
                raise EvaluationError(
                    f"{where}: a mask of {mask.shape[0]} x {mask.shape[1]} pixels is not the shape "
                    "of its image; masks must have the height and width of their images"
                ) from None
        return torch.stack(masks)

    def _places(self) -> list[tuple[str, int, int]]:
        """Tar, row and ordinal of every image; the last two differ where images are skipped."""
        places = []
        for tar in self.selection.tars:
            ordinals = self._views(tar).column("image_index").tolist()
            places += [(tar, row, ordinal) for row, ordinal in enumerate(ordinals)]
        return places

    def _views(self, tar: str) -> Unit:
        return self.selection.cache.unit(VIEWS, self.selection.recipe, 0, tar)

    def _label(self, tar: str, ordinal: int) -> int:
        where, data = self._member(tar, ordinal, "cls", "knn and classification")
        try:
            return int(data)
        except ValueError:
            raise EvaluationError(
                f"{where}: its label {data[:20]!r} is no number; .cls members hold class numbers"
            ) from None

    def _member(self, tar: str, ordinal: int, extension: str, task: str) -> tuple[str, bytes]:
        index = self._pictures.tars.index(tar)
        sample = index.samples[ordinal]
        where = f"{index.path.name}:{sample.key}.{extension}"
        if extension not in sample.members:
            raise EvaluationError(
                f"{where} is missing, and {task} needs it: the tars must hold labels beside their "
                f"images; this sample has {', '.join(sorted(sample.members))}"
            )
        return where, index.read(sample, extension)


def load_encoders(encoders: Sequence[str], size: int, device: str) -> dict[str, Encoder]:
    """Load every encoder for square views of `size`, once for all splits that need it.

    Raises `UserError` for one that cannot be loaded, and for a size that no view can have.
    """
    parse_recipe(f"center@{size}")
    where = torch_device(device)
    return {name: load_encoder(name, size=size, device=where) for name in encoders}


def extract_split(
    encoders: Sequence[str],
    data: Sequence[str],
    cache: Path | str,
    *,
    name: str,
    split: str,
    size: int,
    batch_size: int,
    workers: int,
    device: str,
    loaded: Mapping[str, Encoder] | None = None,
) -> Split:
    """Extract a split with every encoder (what is missing of it), and open it.

    `name` is the data set's; without one the split's folder is named by a digest of the paths.
    `loaded` holds encoders by their names in `encoders`; those that are not there are loaded.
    """
    recipe = f"center@{size}"
    digest = hashlib.sha256("\n".join(str(Path(d).absolute()) for d in data).encode()).hexdigest()
    folder = re.sub(r"\W+", "-", name) or f"data-{digest[:8]}"
    root = below(cache, "eval", f"{folder}-{split}-{recipe}")
    extract(
        ExtractConfig(
            data=tuple(data),
            cache=root,
            teachers=tuple(encoders),
            recipe=recipe,
            views=1,
            batch_size=batch_size,
            workers=workers,
            device=device,
            replace=True,
        ),
        loaded,
    )
    names = [encoder_folder(encoder) for encoder in encoders]
    opened = Cache(root)
    # Those of this call: the cache keeps tars that an earlier call of the same name had.
    tars = [path.name.removesuffix(".tar") for path in find_tars(tuple(data), opened, seed=0)]
    return Split(select(opened, names, recipe, tars=tars))


def check_classes(train: Sequence[str], test: Sequence[str]) -> None:
    """Require the same class folders of two ImageFolders, because folders number their classes.

    Raises `EvaluationError` that shows what differs; tars are let pass, they hold the numbers.
    """
    train_classes, test_classes = _class_folders(train), _class_folders(test)
    if None in (train_classes, test_classes) or train_classes == test_classes:
        return
    raise EvaluationError(
        f"--train and --test have different class folders, so that their classes would be numbered "
        f"differently: train {', '.join(train[:1])} has {_listed(train_classes)}; test "
        f"{', '.join(test[:1])} has {_listed(test_classes)}; give both the same class folders"
    )


def _class_folders(data: Sequence[str]) -> list[str] | None:
    if len(data) != 1 or not is_image_folder(Path(data[0])):
        return None
    return list_pictures(Path(data[0]))[0]


def _listed(names: list[str] | None) -> str:
    if not names:
        return "none"
    return ", ".join(names[:10]) + (f", … ({len(names)})" if len(names) > 10 else "")


def count_categories(masks_NSS: Tensor) -> int:
    """Categories in masks: the largest index that is not 255, plus one; raises for empty masks."""
    indices = np.unique(masks_NSS.numpy())
    indices = indices[indices != IGNORE]
    if not len(indices):
        raise ImageError("the masks hold nothing but 255 (ignored)")
    return int(indices.max()) + 1
