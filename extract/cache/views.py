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

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from extract.cache.crops import TRIES, Uniforms, between, check_box, draw_crop
from extract.cache.errors import ImageError, UserError
from extract.cache.fingerprints import (
    GRID,
    TOLERANCE,
    check_fingerprint,
    check_image,
    deviation,
    fingerprint,
)
from extract.cache.randomness import uniforms
from extract.cache.recipes import Column, Params, Recipe

__all__ = [
    "GRID",
    "TOLERANCE",
    "Center",
    "Column",
    "Params",
    "Recipe",
    "Unic",
    "check_fingerprint",
    "deviation",
    "draw_view",
    "fingerprint",
    "parse_recipe",
]

# A strip one pixel high passes the check on decoding, yet resizing its short side makes it huge.
MAX_RESIZED_PIXELS = 100_000_000

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
    draws: ClassVar[int] = _CROP + 4 * TRIES

    @property
    def label(self) -> str:
        """`unic@SIZE`."""
        return f"unic@{self.size}"

    def draw(self, height: int, width: int, uniforms: Uniforms) -> dict[str, NDArray[Any]]:
        """Resolve one view; factors are drawn even where their flag is off."""
        u = uniforms
        top, left, crop_height, crop_width = draw_crop(height, width, u[_CROP:])
        return self._row(
            crop_top=top,
            crop_left=left,
            crop_height=crop_height,
            crop_width=crop_width,
            flip=u[_FLIP] < 0.5,
            jitter=u[_JITTER] < 0.8,
            jitter_order=np.argsort(u[_ORDER], kind="stable"),
            brightness=between(u[_BRIGHTNESS], 0.6, 1.4),
            contrast=between(u[_CONTRAST], 0.6, 1.4),
            saturation=between(u[_SATURATION], 0.8, 1.2),
            hue=between(u[_HUE], -0.1, 0.1),
            gray=u[_GRAY] < 0.2,
            blur=u[_BLUR] < 0.2,
            blur_sigma=between(u[_SIGMA], 0.1, 5.0),
            solarize=u[_SOLARIZE] < 0.2,
        )

    def apply(self, image: Tensor, params: Params) -> Tensor:
        """Turn `image` `[3, H, W]` uint8 into the view `[3, size, size]` uint8.

        Raises:
            ImageError: the crop box lies outside the image, so the row belongs to another one.
        """
        check_image(image)
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
        check_box(*box, *pixels.shape[-2:])
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
        check_image(image)
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
        check_box(top, left, self.size, self.size, *resized)
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
