"""Crop boxes: RandomResizedCrop's rule, and the check that a stored box fits its image."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from extract.cache.errors import ImageError

Uniforms: TypeAlias = NDArray[np.float64]

TRIES = 10

_SCALE = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)


def between(u: float, low: float, high: float) -> float:
    """The number that a uniform `u` in [0, 1) picks between `low` and `high`."""
    return low + (high - low) * float(u)


def draw_crop(height: int, width: int, u: Uniforms) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) by RandomResizedCrop's rule: ten tries, then the centre.

    `u [40]` holds (area, ratio, top, left) of each try.
    """
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for area_u, ratio_u, top_u, left_u in u.reshape(TRIES, 4).tolist():
        area = height * width * between(area_u, *_SCALE)
        ratio = math.exp(between(ratio_u, low, high))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_u * (height - crop_height + 1))
            left = int(left_u * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    return _central_crop(height, width)


def _central_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """Return the largest central box within the allowed ratios."""
    crop_height, crop_width = height, width
    if width / height < _RATIO[0]:
        crop_height = max(1, round(width / _RATIO[0]))
    elif width / height > _RATIO[1]:
        crop_width = max(1, round(height * _RATIO[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def check_box(top: int, left: int, height: int, width: int, rows: int, columns: int) -> None:
    """Raise `ImageError` unless the box lies within `rows` x `columns` pixels."""
    # torchvision fills what lies outside an image with black and says nothing.
    inside = 0 <= top <= rows - height and 0 <= left <= columns - width
    if not (inside and height > 0 and width > 0):
        raise ImageError(
            f"stored crop (top {top}, left {left}, {height} x {width}) does not lie within "
            f"{rows} x {columns} pixels: the row belongs to another image"
        )
