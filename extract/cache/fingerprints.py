"""What proves that a view was made again: single pixels of it, and a hash of all of them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.cache.errors import ImageError

GRID = 16
# Another instruction set rounds a few pixels of a blur or a jitter one level up or down; a moved
# crop or another resampling filter changes some pixel of a photograph by far more than this.
TOLERANCE = 2


def fingerprint(view: Tensor) -> tuple[NDArray[np.uint8], np.uint64]:
    """Return what proves later that a view was made again: a sparse look and an exact hash.

    Single pixels are kept because means hide what must be found: an 8 x 8 mean does not tell
    bilinear from bicubic.

    Args:
        view: `[3, size, size]` uint8.

    Returns:
        The pixels at the centres of a 16 x 16 grid, `[16, 16, 3]` uint8, and the first 8 bytes
        (little-endian) of the SHA-256 of all its bytes.
    """
    check_image(view)
    rows, columns = (
        (2 * torch.arange(GRID) + 1) * length // (2 * GRID) for length in view.shape[1:]
    )
    grid = view[:, rows][:, :, columns].permute(1, 2, 0).contiguous().numpy()
    digest = hashlib.sha256(view.contiguous().numpy().tobytes()).digest()
    return grid, np.uint64(int.from_bytes(digest[:8], "little"))


def deviation(stored: NDArray[np.uint8], made: NDArray[np.uint8]) -> int:
    """Return the largest difference in levels between two grids of the same shape."""
    if stored.shape != made.shape:
        raise ValueError(f"grids of different shapes: {stored.shape} and {made.shape}")
    return int(np.abs(stored.astype(np.int16) - made.astype(np.int16)).max(initial=0))


def check_fingerprint(stored: NDArray[np.uint8], made: NDArray[np.uint8], where: str) -> None:
    """Refuse a view that is not the one the teachers saw.

    Args:
        stored: grids from the cache, `[..., 16, 16, 3]` uint8.
        made: grids of the views made now, the same shape.
        where: what the message calls them, such as `unic@224/0/000000 row 7`.

    Raises:
        ImageError: a pixel differs by more than `TOLERANCE` levels.
    """
    difference = deviation(stored, made)
    if difference > TOLERANCE:
        raise ImageError(
            f"{where}: the view is not the one in the cache: pixels differ by up to {difference} "
            f"levels, at most {TOLERANCE} are expected. Check that the image tars are the ones the "
            f"cache was made from and that torchvision and Pillow have not changed how they resize"
        )


def check_image(image: Tensor) -> None:
    """Raise `ValueError` unless `image` is `[3, H, W]` uint8."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"expected an image [3, H, W] of uint8, got {list(image.shape)} of {image.dtype}"
        )
