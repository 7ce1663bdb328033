"""What every recipe of views is: named columns of parameters, drawn once and applied anywhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from extract.cache.crops import Uniforms
from extract.cache.errors import UserError
from extract.cache.fingerprints import GRID

Params: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Column:
    """One stored array of a recipe: `[N, *shape]` of `dtype`, one row a view."""

    dtype: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recipe(ABC):
    """How an image becomes a square view; the base of all recipes.

    Attributes:
        size: height and width of the view in pixels.
        columns: the stored parameters, by name.
        draws: how many uniforms `draw` is given.
    """

    size: int
    columns: ClassVar[dict[str, Column]]
    draws: ClassVar[int]

    def __post_init__(self) -> None:
        if self.size < GRID:
            raise UserError(
                f"a view of {self.size} px is too small: expected at least {GRID} px, the side of "
                f"the fingerprint's grid"
            )

    @property
    @abstractmethod
    def label(self) -> str:
        """The recipe's name in paths and on the command line, such as `unic@224`."""

    @abstractmethod
    def draw(self, height: int, width: int, uniforms: Uniforms) -> dict[str, NDArray[Any]]:
        """Resolve one view of an image of `height` x `width` from `[draws]` uniforms."""

    @abstractmethod
    def apply(self, image: Tensor, params: Params) -> Tensor:
        """Turn `image` `[3, H, W]` uint8 into the view `[3, size, size]` uint8."""

    @abstractmethod
    def apply_mask(self, mask: Tensor, params: Params) -> Tensor:
        """Put an integer mask `[H, W]` through the same geometry, to `[size, size]`, unblended."""

    def _row(self, **values: Any) -> dict[str, NDArray[Any]]:
        """Cast drawn values to what is stored, so that applying them now or later is the same."""
        return {
            name: np.asarray(values[name], dtype=column.dtype).reshape(column.shape)
            for name, column in self.columns.items()
        }
