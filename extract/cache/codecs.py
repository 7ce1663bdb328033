"""From an encoder's float32 tokens to what is stored and back, by codec name.

B = rows, N = rows of the calibration, P = patch tokens, D = channels. CLS tokens and all other
arrays are float16 whatever the codec; patch tokens `[B, P, D]` are

    fp16        float16                                                         2 bytes a value
    int8        z = (x - mean) / std in steps of 1/16                           1
    int8-zstd   z in steps of 1/8, compressed by zstd                           about 0.6
    int4        z in 16 steps over +-2.75, two channels in a byte               0.5

with mean and std of each channel from the first rows of the cache (`calibrate`). A token beyond
the range (int8: a value over 127 steps; int4: a root mean square over 1.5) is divided by a factor
of its own first, which is stored in `scale_patches` `[B, P]` and is 1 for all others. All of it is
plain torch on the device where the tokens are. Tokens are rounded to float16 before they are
quantised, so that a float16 cache converted later and a cache extracted in int8 hold the same bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from extract.cache.errors import UserError
from extract.cache.schema import FP16
from extract.cache.statistics import Moments, merged

FLOAT16_MAX = 65504.0
# Steps to one standard deviation.
STEPS = {"int8": 16.0, "int8-zstd": 8.0}
INT4_RANGE, INT4_RMS = 2.75, 1.5
# Sums are over blocks of so many rows, so that whoever calibrates gets the same bits.
BLOCK_ROWS = 64


class FeatureError(UserError):
    """Features that must not be stored: not finite, or too large for the codec."""


@dataclass(frozen=True)
class Codec:
    """A codec by name, with the calibration that quantising ones need: `mean` and `std` [D]."""

    name: str
    calibration: Mapping[str, list[float]] = field(default_factory=dict)

    def encode(
        self, name: str, tokens: Tensor, where: Callable[[int], str]
    ) -> tuple[dict[str, Tensor], int]:
        """The stored arrays of `tokens [B, ...]` of array `name`, and how many were rescaled.

        `where(i)` names row i for messages. Raises `FeatureError` naming the first row with a NaN,
        an infinity, or a value beyond float16.
        """
        half = to_float16(tokens, where)
        if self.name == FP16 or name != "patches":
            return {name: half}, 0
        z_BPD, scale_BP = self._scaled(half)
        coded = self._pack(z_BPD) if self.name == "int4" else self._round(z_BPD)
        return {name: coded, "scale_patches": scale_BP.half()}, int((scale_BP != 1).sum())

    def decode(self, arrays: Mapping[str, Tensor], name: str) -> Tensor:
        """The tokens of array `name` from its stored arrays: float16, on the device of these."""
        stored = arrays[name]
        if self.name == FP16 or name != "patches":
            return stored
        mean_D, std_D = self._channels(stored.device)
        scale_BP = arrays["scale_patches"]
        if stored.is_cuda:
            return self._tokens(stored, scale_BP, mean_D, std_D)
        # Row by row, so that a processor's cache holds what the few operations in turn work on.
        rows = zip(stored.split(1), scale_BP.split(1), strict=True)
        return torch.cat([self._tokens(row, scale, mean_D, std_D) for row, scale in rows])

    def _tokens(self, stored: Tensor, scale_BP: Tensor, mean_D: Tensor, std_D: Tensor) -> Tensor:
        """mean + std * scale * z, float16, with z from the stored steps."""
        if self.name == "int4":
            tokens_BPD = self._unpack(stored).mul_(std_D)
        else:
            # Steps are powers of two: the product with std may be formed beforehand, exactly.
            tokens_BPD = stored * (std_D / STEPS[self.name])
        if stored.is_cuda or bool((scale_BP != 1).any()):
            tokens_BPD.mul_(scale_BP.float()[..., None])
        return tokens_BPD.add_(mean_D).half()

    def needs(self, name: str) -> tuple[str, ...]:
        """The stored arrays from which array `name` is decoded."""
        quantised = self.name != FP16 and name == "patches"
        return (name, "scale_patches") if quantised else (name,)

    def _channels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean_D, std_D = (
            torch.tensor(self.calibration[key], dtype=torch.float32, device=device)
            for key in ("mean", "std")
        )
        return mean_D, std_D

    def standardized(self, tokens_BPD: Tensor) -> Tensor:
        """z = (x - mean) / std `[B, P, D]`, float32."""
        mean_D, std_D = self._channels(tokens_BPD.device)
        return (tokens_BPD.float() - mean_D) / std_D

    def clipped(self, tokens_BPD: Tensor) -> int:
        """How many values the codec cuts off: some of `int4`'s, none of the others'."""
        if self.name != "int4":
            return 0
        return int((self._scaled(tokens_BPD)[0].abs() > INT4_RANGE).sum())

    def _scaled(self, tokens_BPD: Tensor) -> tuple[Tensor, Tensor]:
        """Standardized tokens, within the range by each one's factor `[B, P]` float16."""
        z_BPD = self.standardized(tokens_BPD)
        if self.name == "int4":
            excess_BP = z_BPD.square().mean(-1).sqrt()
            beyond_BP = excess_BP > INT4_RMS
        else:
            excess_BP = z_BPD.abs().amax(-1) * (STEPS[self.name] / 127)
            beyond_BP = excess_BP > 1
        # Rounded to float16 before it is used, and upwards, so that nothing leaves the range.
        scale_BP = (excess_BP * (1 + 2**-10)).half()
        scale_BP = torch.where(beyond_BP, scale_BP, torch.ones_like(scale_BP))
        return z_BPD / scale_BP.float()[..., None], scale_BP

    def _round(self, z_BPD: Tensor) -> Tensor:
        return (z_BPD * STEPS[self.name]).round().clamp(-127, 127).to(torch.int8)

    @staticmethod
    def _pack(z_BPD: Tensor) -> Tensor:
        """Levels 0 to 15; even channels in the low four bits, odd ones in the high four."""
        if z_BPD.shape[-1] % 2:
            raise FeatureError(
                f"codec int4 packs two channels in a byte, and these tokens have "
                f"{z_BPD.shape[-1]}: choose int8"
            )
        levels = ((z_BPD / INT4_RANGE + 1) * 8).floor().clamp(0, 15).to(torch.uint8)
        return levels[..., 0::2] | (levels[..., 1::2] << 4)

    @staticmethod
    def _unpack(packed: Tensor) -> Tensor:
        """The middles of the 16 steps, float32."""
        levels = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        return ((levels.float() + 0.5) / 8 - 1) * INT4_RANGE


def to_float16(tokens: Tensor, where: Callable[[int], str]) -> Tensor:
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
            "all that float16 can hold. Nothing of this unit was stored: check the encoder's "
            "weights and the image"
        )
    return tokens.half()


def calibrate(name: str, patches_NPD: Tensor) -> Codec:
    """The codec `name`, calibrated on float16 patch tokens `[N, P, D]` of the first rows."""
    if name == FP16:
        return Codec(name)
    moments = merged(map(Moments.of_tensor, patches_NPD.split(BLOCK_ROWS)))
    std_D = moments.std().astype(np.float32)
    # A channel that never moves would be divided by zero; its only value is its mean.
    std_D[std_D == 0] = 1
    return Codec(name, {"mean": moments.mean.astype(np.float32).tolist(), "std": std_D.tolist()})


def fidelity(codec: Codec, patches_NPD: Tensor) -> dict[str, float]:
    """How well a quantising codec keeps float16 patch tokens `[N, P, D]`, in standardized space.

    `relative_l2` of the error, `cosine_mean` and `cosine_p1` (1st percentile) between tokens before
    and after, `rescaled` and `clipped` as shares of tokens and of values. Empty for `fp16`.
    """
    if codec.name == FP16:
        return {}
    cosines, error, size, rescaled, clipped, values = [], 0.0, 0.0, 0, 0, 0
    for tokens_BPD in patches_NPD.split(BLOCK_ROWS):
        stored, beyond = codec.encode("patches", tokens_BPD.float(), str)
        before, after = (
            codec.standardized(tokens_BPD),
            codec.standardized(codec.decode(stored, "patches")),
        )
        cosines.append(functional.cosine_similarity(before, after, dim=-1).flatten().cpu())
        error += (after - before).square().sum().item()
        size += before.square().sum().item()
        rescaled, clipped = rescaled + beyond, clipped + codec.clipped(tokens_BPD)
        values += tokens_BPD.numel()
    cosine_M = torch.cat(cosines).sort().values
    return {
        "relative_l2": (error / size) ** 0.5,
        "cosine_mean": cosine_M.mean().item(),
        "cosine_p1": cosine_M[len(cosine_M) // 100].item(),
        "rescaled": rescaled / len(cosine_M),
        "clipped": clipped / values,
    }
