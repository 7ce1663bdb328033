"""The one way in which the bytes of a picture become pixels, in both stages.

Both stages decode by Pillow (`DECODER`): other decoders differ by a few levels. The rules are those
of torchvision's `ImageFolder`: alpha is dropped, EXIF orientation is not applied, an animation
gives its first frame. Channels of 16 bits keep their high byte. What has no full range that it
fills (floats, 32 bits, 16-bit TIFF) is refused, and so is what would only half be decoded.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch import Tensor

from extract.cache.errors import ImageError

DECODER = "pillow-rgb"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")
# Above this Pillow only warns; 12 kB of PNG can ask for 300 MB.
MAX_PIXELS = 89_478_485

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
_RGB_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_MASK_MODES = frozenset({"L", "P", "I", "I;16", "I;16B"})
_GREY_16 = "I;16"


def decode(data: bytes, where: str) -> Tensor:
    """Decode a picture to RGB.

    Args:
        data: the bytes of the file.
        where: what messages call it, such as `000000.tar: n01/img_7.jpg`.

    Returns:
        `[3, H, W]` uint8; its strides are those of interleaved pixels.

    Raises:
        ImageError: no picture, cut, damaged, more than `MAX_PIXELS`, or floats or integers that no
            full range is known of.
    """
    pixels_HWC = _pixels(data, where, _RGB_MODES, "grey, palette, RGB or CMYK", rgb=True)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def decode_mask(data: bytes, where: str) -> Tensor:
    """Decode a label map: grey or palette indices, as stored.

    Args:
        data: the bytes of the file, a PNG as a rule.
        where: what messages call it.

    Returns:
        `[H, W]` int64.

    Raises:
        ImageError: as `decode`; also colours, and grey of fewer than 8 bits, which Pillow scales.
    """
    # Bit depth and colour type of a PNG: its header is at a fixed place.
    if data.startswith(b"\x89PNG") and len(data) > 25 and data[24] < 8 and data[25] == 0:
        raise ImageError(f"{where}: a grey mask of {data[24]} bits; store indices in 8 or 16 bits")
    expected = "indices in 8-bit grey, 16-bit grey or a palette"
    indices_HW = _pixels(data, where, _MASK_MODES, expected, rgb=False)
    return torch.from_numpy(indices_HW.astype(np.int64))


def _pixels(
    data: bytes, where: str, modes: frozenset[str], expected: str, rgb: bool
) -> NDArray[Any]:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            f"{where}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so damaged images would pass for "
            f"whole ones; turn it off"
        )
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.format == "PNG" and rgb:
                modes = modes | {_GREY_16}
            _check_header(image, where, modes, expected)
            image.load()
            # A transparent colour plays no part in RGB, and Pillow would warn about it.
            image.info.pop("transparency", None)
            return _rgb(image) if rgb else np.array(image)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            f"{where}: more than {MAX_PIXELS} pixels; leave it out or scale it"
        ) from None
    # Damaged bytes make Pillow's parsers fail in nearly every way that Python knows.
    except Exception as error:
        raise ImageError(
            f"{where}: cannot be decoded ({error}); remove or replace the file"
        ) from error


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Interleaved RGB `[H, W, 3]` of a loaded picture."""
    if image.mode == _GREY_16:
        # Pillow's conversion would make everything above 255 white; of RGB it keeps the high byte.
        grey_HW = (np.array(image) >> 8).astype(np.uint8)
        return np.stack([grey_HW] * 3, axis=-1)
    return np.array(image.convert("RGB"))


def _check_header(image: Image.Image, where: str, modes: frozenset[str], expected: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{where}: {image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded; "
            f"leave it out or scale it"
        )
    if image.mode not in modes:
        raise ImageError(
            f"{where}: {image.format} pixels of mode {image.mode}, expected {expected}; convert "
            f"the file"
        )
