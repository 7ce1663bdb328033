"""Views as data: draw the parameters of an augmentation once, store them, apply them anywhere.

    draw_view(recipe, seed, tar, ordinal, key, view, height, width)  -> params, one row
    recipe.apply(image [3, H, W] uint8, params)                      -> view [3, size, size] uint8
    fingerprint(view)                                                -> grid [16, 16, 3], hash

What is stored are the resolved parameters, in the dtypes of `recipe.columns`; `apply` reads nothing
else, so a view drawn now and a view loaded later are the same pixels. The seed is provenance.

A recipe is a name and a size (`unic@224`): everything else about it is fixed, because two caches
with the same label must hold the same views.
"""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from extract.cache.errors import ImageError, UserError
from extract.cache.randomness import uniforms

Params: TypeAlias = Mapping[str, NDArray[Any]]
Uniforms: TypeAlias = NDArray[np.float64]

GRID = 16
# Another instruction set rounds a few pixels of a blur or a jitter one level up or down; a moved
# crop or another resampling filter changes some pixel of a photograph by far more than this.
TOLERANCE = 2
# A strip one pixel high passes the check on decoding, yet resizing its short side makes it huge.
MAX_RESIZED_PIXELS = 100_000_000


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


# The 54 uniforms of a `unic` view, by index. The number is fixed, whichever branch is taken: a
# change in one operation shifts no other, and a rejected crop consumes nothing of its neighbours.
_FLIP = 0
_JITTER = 1
_ORDER = slice(2, 6)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 6, 7, 8, 9
_GRAY = 10
_BLUR, _SIGMA = 11, 12
_SOLARIZE = 13
_CROP = 14  # ten tries of (area, ratio, top, left)
_TRIES = 10

_SCALE = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Unic(Recipe):
    """The training view of UNIC (arXiv 2408.05088): crop, flip, jitter, grey, blur, solarize.

    RandomResizedCrop (scale .08 to 1, ratio 3/4 to 4/3, bicubic, antialiased), horizontal flip
    p .5, ColorJitter(.4, .4, .2, .1) p .8 in a drawn order, greyscale p .2, GaussianBlur (kernel 9,
    sigma .1 to 5) p .2, solarize from level 128 p .2: all on uint8 by torchvision's functions.
    """

    columns: ClassVar[dict[str, Column]] = {
        "crop_top": Column("int32"),
        "crop_left": Column("int32"),
        "crop_height": Column("int32"),
        "crop_width": Column("int32"),
        "flip": Column("uint8"),
        "jitter": Column("uint8"),
        "jitter_order": Column("uint8", (4,)),
        "brightness": Column("float32"),
        "contrast": Column("float32"),
        "saturation": Column("float32"),
        "hue": Column("float32"),
        "gray": Column("uint8"),
        "blur": Column("uint8"),
        "blur_sigma": Column("float32"),
        "solarize": Column("uint8"),
    }
    draws: ClassVar[int] = _CROP + 4 * _TRIES

    @property
    def label(self) -> str:
        """`unic@SIZE`."""
        return f"unic@{self.size}"

    def draw(self, height: int, width: int, uniforms: Uniforms) -> dict[str, NDArray[Any]]:
        """Resolve one view; factors are drawn even where their flag is off."""
        u = uniforms
        top, left, crop_height, crop_width = _draw_crop(height, width, u[_CROP:])
        return self._row(
            crop_top=top,
            crop_left=left,
            crop_height=crop_height,
            crop_width=crop_width,
            flip=u[_FLIP] < 0.5,
            jitter=u[_JITTER] < 0.8,
            jitter_order=np.argsort(u[_ORDER], kind="stable"),
            brightness=_between(u[_BRIGHTNESS], 0.6, 1.4),
            contrast=_between(u[_CONTRAST], 0.6, 1.4),
            saturation=_between(u[_SATURATION], 0.8, 1.2),
            hue=_between(u[_HUE], -0.1, 0.1),
            gray=u[_GRAY] < 0.2,
            blur=u[_BLUR] < 0.2,
            blur_sigma=_between(u[_SIGMA], 0.1, 5.0),
            solarize=u[_SOLARIZE] < 0.2,
        )

    def apply(self, image: Tensor, params: Params) -> Tensor:
        """Turn `image` `[3, H, W]` uint8 into the view `[3, size, size]` uint8.

        Raises:
            ImageError: the crop box lies outside the image, so the row belongs to another one.
        """
        _check_image(image)
        view = self._place(image, params, InterpolationMode.BICUBIC)
        if params["jitter"]:
            view = _jitter(view, params)
        if params["gray"]:
            view = tvf.rgb_to_grayscale(view, num_output_channels=3)
        if params["blur"]:
            sigma = float(params["blur_sigma"])
            view = tvf.gaussian_blur(view, [9, 9], [sigma, sigma])
        if params["solarize"]:
            view = tvf.solarize(view, 128)
        return view.contiguous()

    def apply_mask(self, mask: Tensor, params: Params) -> Tensor:
        """Crop, resize (nearest pixel centre) and flip a mask `[H, W]` as `apply` does the image.

        Raises:
            ImageError: the crop box lies outside the mask.
        """
        return self._place(mask[None], params, InterpolationMode.NEAREST_EXACT)[0].contiguous()

    def _place(self, pixels: Tensor, params: Params, interpolation: InterpolationMode) -> Tensor:
        box = [int(params[f"crop_{edge}"]) for edge in ("top", "left", "height", "width")]
        _check_box(*box, *pixels.shape[-2:])
        size = [self.size, self.size]
        view = tvf.resized_crop(pixels, *box, size, interpolation, antialias=True)
        return tvf.horizontal_flip(view) if params["flip"] else view


@dataclass(frozen=True)
class Center(Recipe):
    """The evaluation view: the short side resized to `resize`, then the central `size` square.

    Equal to the bit to torchvision's `Resize(resize, BICUBIC, antialias=True)` and
    `CenterCrop(size)` on uint8 tensors. Nothing is random.
    """

    resize: int

    columns: ClassVar[dict[str, Column]] = {
        "resized_height": Column("int32"),
        "resized_width": Column("int32"),
        "crop_top": Column("int32"),
        "crop_left": Column("int32"),
    }
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize < self.size:
            raise UserError(
                f"recipe {self.label}: the resized short side ({self.resize} px) is smaller than "
                f"the crop ({self.size} px); use center@{self.size} or a larger number after r"
            )

    @property
    def label(self) -> str:
        """`center@SIZE`, or `center@SIZErRESIZE` where the short side is resized to another."""
        suffix = "" if self.resize == self.size else f"r{self.resize}"
        return f"center@{self.size}{suffix}"

    def draw(self, height: int, width: int, uniforms: Uniforms) -> dict[str, NDArray[Any]]:
        """Compute the resized size and the crop's corner; `uniforms` is empty.

        Raises:
            ImageError: the image is so long and thin that resizing it would fill the memory.
        """
        resized_height, resized_width = self._resized(height, width)
        if resized_height * resized_width > MAX_RESIZED_PIXELS:
            raise ImageError(
                f"an image of {height} x {width} pixels would become {resized_height} x "
                f"{resized_width} when its short side is resized to {self.resize}; leave it out"
            )
        return self._row(
            resized_height=resized_height,
            resized_width=resized_width,
            crop_top=round((resized_height - self.size) / 2),
            crop_left=round((resized_width - self.size) / 2),
        )

    def apply(self, image: Tensor, params: Params) -> Tensor:
        """Turn `image` `[3, H, W]` uint8 into the view `[3, size, size]` uint8.

        Raises:
            ImageError: the stored sizes do not follow from the image's.
        """
        _check_image(image)
        return self._place(image, params, InterpolationMode.BICUBIC)

    def apply_mask(self, mask: Tensor, params: Params) -> Tensor:
        """Resize (nearest pixel centre) and crop a mask `[H, W]` as `apply` does the image.

        Raises:
            ImageError: the stored sizes do not follow from the mask's.
        """
        return self._place(mask[None], params, InterpolationMode.NEAREST_EXACT)[0]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        long = int(self.resize * max(height, width) / min(height, width))
        return (self.resize, long) if height <= width else (long, self.resize)

    def _place(self, pixels: Tensor, params: Params, interpolation: InterpolationMode) -> Tensor:
        resized = (int(params["resized_height"]), int(params["resized_width"]))
        height, width = pixels.shape[-2:]
        if resized != self._resized(height, width):
            raise ImageError(
                f"stored view resizes to {resized[0]} x {resized[1]}, but an image of {height} x "
                f"{width} becomes {self._resized(height, width)}: the row belongs to another image"
            )
        top, left = int(params["crop_top"]), int(params["crop_left"])
        _check_box(top, left, self.size, self.size, *resized)
        view = tvf.resize(pixels, list(resized), interpolation, antialias=True)
        view = view[..., top : top + self.size, left : left + self.size]
        # A copy, even where nothing was resized: a view never shares memory with its image.
        return view.clone(memory_format=torch.contiguous_format)


def parse_recipe(label: str) -> Recipe:
    """Return the recipe that a label such as `unic@224` or `center@224r256` names.

    Raises:
        UserError: there is no such recipe; the message lists those that exist.
    """
    match = re.fullmatch(r"(unic|center)@([0-9]{1,5})(?:r([0-9]{1,5}))?", label)
    if match is None or (match[1] == "unic" and match[3]):
        raise UserError(
            f"no recipe {label!r}; expected unic@SIZE (UNIC's training augmentation), center@SIZE "
            f"(resize and centre crop) or center@SIZErRESIZE, such as unic@224 or center@224r256"
        )
    size = int(match[2])
    return Unic(size) if match[1] == "unic" else Center(size, int(match[3] or size))


def draw_view(
    recipe: Recipe,
    seed: int,
    tar: str,
    ordinal: int,
    key: str,
    view: int,
    height: int,
    width: int,
) -> dict[str, NDArray[Any]]:
    """Draw one view of one image: one row of every column of the recipe.

    Args:
        recipe: what to draw.
        seed: the cache's seed.
        tar: stem of the image tar.
        ordinal: position of the sample in its tar, from 0.
        key: key of the sample.
        view: number of the view, from 0.
        height: height of the decoded image in pixels.
        width: width of the decoded image in pixels.

    Returns:
        Arrays of the shapes and dtypes of `recipe.columns`.

    Raises:
        ImageError: the recipe cannot be applied to an image of this shape.
    """
    try:
        return recipe.draw(height, width, uniforms(seed, tar, ordinal, key, view, recipe.draws))
    except ImageError as error:
        raise ImageError(f"{tar}.tar: {key}: {error}") from None


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
    _check_image(view)
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


def _between(u: float, low: float, high: float) -> float:
    return low + (high - low) * float(u)


def _draw_crop(height: int, width: int, u: Uniforms) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) by RandomResizedCrop's rule: ten tries, then the centre."""
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for area_u, ratio_u, top_u, left_u in u.reshape(_TRIES, 4).tolist():
        area = height * width * _between(area_u, *_SCALE)
        ratio = math.exp(_between(ratio_u, low, high))
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


def _jitter(view: Tensor, params: Params) -> Tensor:
    steps = (
        (tvf.adjust_brightness, "brightness"),
        (tvf.adjust_contrast, "contrast"),
        (tvf.adjust_saturation, "saturation"),
        (tvf.adjust_hue, "hue"),
    )
    for index in params["jitter_order"]:
        adjust, name = steps[int(index)]
        view = adjust(view, float(params[name]))
    return view


def _check_image(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"expected an image [3, H, W] of uint8, got {list(image.shape)} of {image.dtype}"
        )


def _check_box(top: int, left: int, height: int, width: int, rows: int, columns: int) -> None:
    # torchvision fills what lies outside an image with black and says nothing.
    inside = 0 <= top <= rows - height and 0 <= left <= columns - width
    if not (inside and height > 0 and width > 0):
        raise ImageError(
            f"stored crop (top {top}, left {left}, {height} x {width}) does not lie within "
            f"{rows} x {columns} pixels: the row belongs to another image"
        )
