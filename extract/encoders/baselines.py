"""Baselines that a trained encoder has to beat: raw pixels, and a model that was never trained.

Shapes: B views, H rows and W columns of pixels, P patches of p x p pixels, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from extract.encoders.encoder import Encoder, EncoderError, EncoderSpec, weights_sha256

POOLED = 16
RANDOM_SEED = 0


class PixelTokens(nn.Module):
    """Pixels as features.

    The global token `[B, 3 * 16 * 16]` is the image averaged to 16 x 16 and flattened, channels
    first; the patch tokens `[B, P, 3 * p * p]` are the pixels of each patch, channels first.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, pixels_B3HW: Tensor) -> dict[str, Tensor]:
        """Tokens of pixels `[B, 3, H, W]`."""
        return {
            "cls": F.adaptive_avg_pool2d(pixels_B3HW, POOLED).flatten(1),
            "patches": F.unfold(pixels_B3HW, self.patch_size, stride=self.patch_size).mT,
        }


def pixel_encoder(
    name: str, *, size: int, patch_size: int = 16, device: torch.device | str = "cpu"
) -> Encoder:
    """The raw-pixel baseline; values are pixels in [0, 1].

    Raises `EncoderError` if patches of this size do not tile the view.
    """
    if patch_size < 1 or size % patch_size:
        raise EncoderError(
            f"{name}: patches of {patch_size} px do not tile views of {size} px; choose a divisor, "
            "as in pixels:16"
        )
    tokens, side = PixelTokens(patch_size), size // patch_size
    spec = EncoderSpec(
        name=name,
        source="none",
        architecture="pixels",
        sha256=weights_sha256(tokens),
        global_token="pool",
        tap="features",
        size=size,
        grid=(side, side),
        patch_size=patch_size,
        cls_width=3 * POOLED * POOLED,
        patch_width=3 * patch_size * patch_size,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation="bicubic",
        position_embedding="native",
        precision="fp32",
        licence="none",
        parameters=0,
    )
    return Encoder(tokens, spec).to(device)


@contextmanager
def fixed_seed(seed: int = RANDOM_SEED) -> Iterator[None]:
    """Inside, torch's CPU generator starts at `seed`; afterwards it is where it was.

    A model made inside has the same random weights every time: the untrained baseline.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
