"""Pictures of patch tokens: their first three principal components as colours, side by side.

Shapes: N images, H x W pixels, P = h * w patches, D channels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

IGNORE = 255
Grid = int | tuple[int, int]


def pca_panel(
    images_N3HW: Tensor,
    patches: Mapping[str, Tensor],
    grid: Grid | Mapping[str, Grid],
    masks_NHW: Tensor | None = None,
    path: str | Path | None = None,
    *,
    cell_pixels: int = 160,
    interpolation: str = "bicubic",
) -> Image.Image:
    """One row an image: the input, its mask if given, and every encoder's patch tokens as colours.

    Images are uint8 `[N, 3, H, W]`, tokens `[N, P, D]` by encoder name, masks integers `[N, H, W]`
    with 255 for ignored (shown black). `grid` is the patch grid, (rows, columns) or the side of a
    square one, of all encoders or by name. Colours compare between rows of a column, not between
    columns: each encoder has its own components, see `pca_colours`. `interpolation` is "bicubic"
    or "nearest". Also saved as PNG where `path` is given; folders on the way are created.

    Raises ValueError for shapes that do not match.
    """
    if images_N3HW.ndim != 4 or images_N3HW.shape[1] != 3 or images_N3HW.dtype != torch.uint8:
        found = f"{list(images_N3HW.shape)} {images_N3HW.dtype}"
        raise ValueError(f"expected images [N, 3, H, W] of uint8, found {found}")
    columns = [_Column("image", images_N3HW.permute(0, 2, 3, 1).cpu().numpy(), "nearest")]
    if masks_NHW is not None:
        _expect_rows(len(masks_NHW), len(images_N3HW), "masks")
        columns.append(_Column("ground truth", _mask_colours(masks_NHW), "nearest"))
    for name, patches_NPD in patches.items():
        _expect_rows(len(patches_NPD), len(images_N3HW), name)
        own_grid = grid[name] if isinstance(grid, Mapping) else grid
        columns.append(_Column(name, pca_colours(patches_NPD, own_grid), interpolation))
    picture = _draw(columns, images_N3HW.shape[2] / images_N3HW.shape[3], cell_pixels)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="PNG")
    return picture


def pca_colours(patches_NPD: Tensor, grid: Grid) -> np.ndarray:
    """Colours `[N, h, w, 3]` in 0..1 of tokens `[N, P, D]`: three principal components as RGB.

    The components are those of all tokens of all images together, each with the sign that makes
    its largest loading positive, scaled from its 2nd to its 98th percentile; values beyond are
    clipped. The same tokens give the same colours.

    Raises ValueError where P is not the grid's, or tokens are not finite.
    """
    height, width = (grid, grid) if isinstance(grid, int) else grid
    if patches_NPD.ndim != 3 or patches_NPD.shape[1] != height * width:
        found = list(patches_NPD.shape)
        raise ValueError(f"expected tokens [N, {height * width}, D] for {grid=}, found {found}")
    if not patches_NPD.isfinite().all():
        raise ValueError("NaN or infinity in the patch tokens; verify the cache they come from")
    tokens = patches_NPD.detach().cpu().double().flatten(0, 1)
    tokens = tokens - tokens.mean(0)
    _, vectors = torch.linalg.eigh(tokens.T @ tokens / len(tokens))
    axes = vectors.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    values = tokens @ axes
    # numpy's: torch.quantile refuses more than 2^24 values.
    low, high = torch.from_numpy(np.percentile(values.numpy(), (2, 98), axis=0))
    # Constant components (and the missing ones of fewer than three channels) become mid-grey.
    flat = high - low < 1e-9
    colours = ((values - low) / (high - low).masked_fill(flat, 1)).clamp(0, 1)
    colours[:, flat] = 0.5
    missing = torch.full((len(tokens), 3 - colours.shape[1]), 0.5, dtype=colours.dtype)
    return torch.cat([colours, missing], 1).view(-1, height, width, 3).numpy()


def _expect_rows(found: int, expected: int, name: str) -> None:
    if found != expected:
        raise ValueError(f"{name}: expected {expected} rows, one an image, found {found}")


def _mask_colours(masks_NHW: Tensor) -> np.ndarray:
    masks = masks_NHW.cpu().long().numpy()
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    # Even entries are the strong colours, odd ones their pale twins: strong ones first.
    ordered = np.array(palette[::2] + palette[1::2])
    colours = ordered[masks % len(ordered)]
    colours[masks == IGNORE] = 0
    return colours


class _Column(NamedTuple):
    title: str
    pictures: np.ndarray
    interpolation: str


def _draw(columns: list[_Column], cell_height: float, cell_pixels: int) -> Image.Image:
    # In units of a cell's width: cells keep the image's shape, gaps and the title are thin.
    gap, title = 0.04, 0.16
    wide = len(columns) * (1 + gap) + gap
    high = title + len(columns[0].pictures) * (cell_height + gap) + gap
    figure = Figure(figsize=(wide, high), dpi=cell_pixels, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for i, column in enumerate(columns):
        left = gap + i * (1 + gap)
        for row, picture in enumerate(column.pictures):
            bottom = high - title - (row + 1) * (cell_height + gap)
            box = (left / wide, bottom / high, 1 / wide, cell_height / high)
            axes = figure.add_axes(box)
            axes.set_axis_off()
            axes.imshow(picture, aspect="auto", interpolation=column.interpolation)
        x, y = (left + 0.5) / wide, 1 - (title + gap) / 2 / high
        figure.text(x, y, _short(column.title), ha="center", va="center", fontsize=6.5)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."
