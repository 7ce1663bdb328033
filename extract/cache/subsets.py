"""Which patch tokens of a view are kept where a cache does not keep all of them."""

import numpy as np
from numpy.typing import NDArray

from extract.cache.randomness import permutation


def kept_patches(
    seed: int, tar: str, ordinal: int, key: str, view: int, grid: tuple[int, int], kept: int
) -> NDArray[np.uint16]:
    """Positions `[kept]` uint16 of a random subset of a grid's patches, row-major, ascending.

    A pure function of its arguments, and the same for every encoder of that grid. A smaller subset
    is part of a larger one.
    """
    count = grid[0] * grid[1]
    order = permutation(seed, "patches", tar, ordinal, key, view, f"{grid[0]}x{grid[1]}", n=count)
    return np.sort(order[:kept]).astype(np.uint16)
