"""From an encoder's float32 tokens to what is stored, by codec name.

Only `fp16` is written and read by this version; a cache says in `codec.json` which it holds.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from extract.cache.errors import UserError

FLOAT16_MAX = 65504.0


class FeatureError(UserError):
    """Features that must not be stored: not finite, or too large for the codec."""


def encode_fp16(tokens: Tensor, where: Callable[[int], str]) -> NDArray[np.float16]:
    """`tokens [B, ...]` float32 as float16; `where(i)` names row i for the message.

    Raises `FeatureError` naming the first row with a NaN, an infinity, or a value beyond float16.
    """
    largest_B = tokens.flatten(1).abs().amax(dim=1)
    # NaN compares false with everything, so this finds it along with infinities and overflows.
    bad = torch.nonzero(~(largest_B <= FLOAT16_MAX)).flatten().tolist()
    if bad:
        value = largest_B[bad[0]].item()
        fault = "is not finite" if not np.isfinite(value) else f"reaches {value:.6g}"
        raise FeatureError(
            f"{where(bad[0])} {fault}; expected finite values up to {FLOAT16_MAX:.0f}, which is "
            "all that codec fp16 can hold. Nothing of this unit was stored: check the encoder's "
            "weights and the image"
        )
    return tokens.to(torch.float16).cpu().numpy()
