"""Views stored as JPEG, made before any encoder sees them: everyone sees the same pixels."""

import io

from PIL import Image
from torch import Tensor

JPEG_QUALITY = 95


def encode_jpeg(view: Tensor) -> bytes:
    """A view uint8 `[3, S, S]` as a JPEG of quality 95, colours at full resolution."""
    out = io.BytesIO()
    image = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
    image.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()
