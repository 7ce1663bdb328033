"""Random rows of a cache against the live encoder: the proof that features belong to their images.

B = rows, T = tokens of a row, K = kept patches, D = channels. The path of a row:
  1. `CachedViews`   its view, made again from its image and its stored parameters (or its stored
                     pixels), and its features as stored and decoded;
  2. `unit`          the view is compared with its fingerprint;
  3. the encoder     with the very weights of the cache, gives the features again;
  4. `compare`       these go through the codec too, and are compared in standardized space.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from console.progress import ProgressBar
from extract.cache.codecs import Codec
from extract.cache.dataset import Batch, CachedViews
from extract.cache.errors import UserError
from extract.cache.reader import Selection, Unit
from extract.cache.schema import VIEWS, UnitRecord
from extract.cache.statistics import Moments, merged
from extract.cache.views import check_fingerprint, fingerprint
from extract.checking.live import live_encoder
from extract.checking.structure import Contents, Faults, StoredUnit
from extract.encoders.encoder import Encoder

# What a value may differ by, in standard deviations of its channel, beyond one rounding to float16
# and one step of the codec. Kernels of another batch size or machine round otherwise; bfloat16
# everywhere, features by a relative 0.010 to 0.015.
FP32_ERROR, BF16_ERROR = 2e-2, 0.25
# One step of each codec, in standard deviations.
STEP = {"fp16": 0.0, "int8": 1 / 16, "int8-zstd": 1 / 8, "int4": 2.75 / 8}
FP16_ROUNDING = 2.0**-10
BATCH = 16


@dataclass(frozen=True)
class Agreement:
    """How far the stored features of one encoder agree with the live ones.

    Cosines are of single tokens, in standardized space; `error` is the largest of any value, in
    standard deviations of its channel.
    """

    rows: int
    cosine_min: float
    cosine_p1: float
    error: float


def recompute(
    contents: Contents,
    rows: int,
    seed: int,
    teachers: Mapping[str, str],
    moved: Mapping[str, Path],
    device: str,
    min_cosine: float,
    faults: Faults,
) -> dict[tuple[str, str], Agreement]:
    """Compute `rows` random rows of every (encoder, recipe) again; what differs becomes a fault.

    `teachers` says where the weights of encoders are whose record does not tell; `moved` where
    image tars are. Encoders that cannot be had are faults too.
    """
    features = contents.features()
    counts = {key: min(rows, sum(u.record.rows for u in units)) for key, units in features.items()}
    agreements = {}
    with ProgressBar("recompute", sum(counts.values()), "rows") as progress:
        for (name, recipe), units in features.items():
            record = contents.encoders.get(name)
            if record is None:
                continue
            with faults.caught(f"{name}/{recipe}"):
                encoder = live_encoder(record, teachers, device)
                selected = list(choose(units, counts[name, recipe], seed))
                moments = _moments([unit for unit, _ in selected])
                check = _Check(contents, name, recipe, encoder, moments, min_cosine, moved, faults)
                for unit, chosen in selected:
                    check.unit(unit, chosen)
                    progress.advance(len(chosen), str(unit))
                agreements[name, recipe] = check.agreement()
    return agreements


def choose(
    units: Sequence[StoredUnit], rows: int, seed: int
) -> Iterator[tuple[StoredUnit, NDArray[np.int64]]]:
    """Seeded random rows `[n]`, sorted, by unit; every row of the units is equally likely."""
    first = np.concatenate([[0], np.cumsum([unit.record.rows for unit in units])])
    chosen = np.sort(np.random.default_rng(seed).choice(first[-1], size=rows, replace=False))
    for number, unit in enumerate(units):
        inside = chosen[(chosen >= first[number]) & (chosen < first[number + 1])]
        if len(inside):
            yield unit, inside - first[number]


def _moments(units: Sequence[StoredUnit]) -> dict[str, Moments]:
    """Moments of each token type over whole units, from their manifests."""
    contents = [UnitRecord.read(unit.manifest).statistics for unit in units]
    return {array: merged(Moments.from_json(c[array]) for c in contents) for array in contents[0]}


class _Check:
    """Compares rows of one encoder under one recipe, unit by unit."""

    def __init__(
        self,
        contents: Contents,
        name: str,
        recipe: str,
        encoder: Encoder,
        moments: dict[str, Moments],
        min_cosine: float,
        moved: Mapping[str, Path],
        faults: Faults,
    ) -> None:
        self.contents, self.name, self.recipe, self.encoder = contents, name, recipe, encoder
        self.min_cosine, self.moved, self.faults = min_cosine, dict(moved), faults
        stored = contents.codecs[name, recipe]
        self.arrays = tuple(stored.arrays)
        self.codec = Codec(stored.codec, stored.calibration)
        self.moments = moments
        precisions = {contents.encoders[name].precision, encoder.spec.precision}
        self.error = FP32_ERROR if precisions == {"fp32"} else BF16_ERROR
        self._cosines: list[Tensor] = []
        self._errors: list[float] = []
        self._rows = 0

    def unit(self, unit: StoredUnit, rows: NDArray[np.int64]) -> None:
        """Check rows `[n]` of one unit."""
        selection = Selection(
            self.contents.cache, self.recipe, (self.name,), (unit.view,), (unit.tar,)
        )
        for start in range(0, len(rows), BATCH):
            chosen = rows[start : start + BATCH]
            with self.faults.caught(unit):
                dataset = CachedViews(selection, arrays=self.arrays, decode=False, data=self.moved)
                batch = dataset.__getitems__(chosen.tolist())
                views = self.contents.cache.unit(VIEWS, self.recipe, unit.view, unit.tar)
                names = [_row_name(dataset, unit, views, row) for row in chosen.tolist()]
                grids = views.array("fingerprint_grid").read(chosen)
                for view, grid, name in zip(batch["views"], grids, names, strict=True):
                    with self.faults.caught():
                        check_fingerprint(grid, fingerprint(view)[0], name)
                self._check_features(dataset, batch, names)
                self._rows += len(chosen)

    def agreement(self) -> Agreement:
        """Of all rows checked so far."""
        cosines = torch.cat(self._cosines) if self._cosines else torch.ones(1)
        return Agreement(
            rows=self._rows,
            cosine_min=cosines.min().item(),
            cosine_p1=cosines.kthvalue(max(1, round(0.01 * len(cosines)))).values.item(),
            error=max(self._errors, default=0.0),
        )

    def _check_features(self, dataset: CachedViews, batch: Batch, names: list[str]) -> None:
        stored = dataset.decoded(batch)["targets"][self.name]
        coded = batch["targets"][self.name]
        with torch.inference_mode():
            live = {name: tokens.cpu() for name, tokens in self.encoder(batch["views"]).items()}
        for array in self.arrays:
            tokens = live[array]
            if array == "patches" and self.name in batch["positions"]:
                places_BK1 = batch["positions"][self.name].long()[..., None]
                tokens = tokens.gather(1, places_BK1.expand(-1, -1, tokens.shape[-1]))
            again = self._through_codec(array, tokens)
            allowed = tolerance(again, self.moments[array], self.error)
            if array == "patches" and "scale_patches" in coded:
                step_D = STEP[self.codec.name] * torch.tensor(self.codec.calibration["std"])
                allowed = allowed + step_D * coded["scale_patches"].float()[..., None]
            cosine_BT, error_BT, beyond_B = compare(
                stored[array].float(), again, self.moments[array], allowed
            )
            self._cosines.append(cosine_BT.flatten())
            self._errors.append(error_BT.max().item())
            for name, cosine, error, beyond in zip(
                names, cosine_BT.amin(1), error_BT.amax(1), beyond_B, strict=True
            ):
                if beyond or not cosine >= self.min_cosine:
                    self.faults.add(
                        name,
                        f"{array} differ from the live encoder's: cosine {cosine:.4f} (expected "
                        f"{self.min_cosine} or more), largest error {error:.3g} standard "
                        f"deviations ({self.error + STEP[self.codec.name]:.3g} or less)",
                    )

    def _through_codec(self, array: str, tokens: Tensor) -> Tensor:
        coded, _ = self.codec.encode(array, tokens, lambda i: f"the live {array} of row {i}")
        return self.codec.decode(coded, array).float()


def _row_name(dataset: CachedViews, unit: StoredUnit, views: Unit, row: int) -> str:
    """The row and its key, as far as the tar is there to tell it."""
    ordinal = int(views.column("image_index")[row])
    try:
        key = repr(dataset.tars.index(unit.tar).samples[ordinal].key)
    except UserError:
        key = f"image {ordinal}"
    return f"{unit}, row {row} ({key})"


def tolerance(live: Tensor, moments: Moments, error: float) -> Tensor:
    """Largest difference allowed for every value of `live` [..., D]: `error` standard deviations of
    its channel, and one rounding to float16, which is more than that where means are large.
    """
    return error * torch.from_numpy(moments.std()).float() + FP16_ROUNDING * live.abs()


def compare(
    stored: Tensor, live: Tensor, moments: Moments, allowed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Stored against live tokens `[B, T, D]` (or `[B, D]`: one token).

    Returns:
        cosine of every token `[B, T]` and its largest error `[B, T]`, both in standardized space,
        and whether a value of the row differs by more than `allowed` `[B]` (NaN counts).
    """
    mean_D, std_D = (torch.from_numpy(v).float() for v in (moments.mean, moments.std()))
    std_D = torch.where(std_D > 0, std_D, torch.ones_like(std_D))
    before_BTD, after_BTD = (
        ((tokens - mean_D) / std_D).reshape(len(tokens), -1, tokens.shape[-1])
        for tokens in (live, stored)
    )
    difference_BTD = (after_BTD - before_BTD).abs()
    cosine_BT = functional.cosine_similarity(before_BTD, after_BTD, dim=-1)
    # A token at the mean has no direction; it agrees if it did not move.
    still_BT = difference_BTD.amax(-1) < FP16_ROUNDING
    cosine_BT = torch.where(still_BT, torch.ones_like(cosine_BT), cosine_BT)
    within = (stored - live).abs() <= allowed
    return cosine_BT, difference_BTD.amax(-1), ~within.flatten(1).all(1)
