"""Drop path whose masks can be drawn again: counter-based draws, one per (seed, step, image).

Nothing here has a state to save. A run that resumes at step s, and a run split over any number of
processes, draws exactly what a single uninterrupted process draws, because a draw depends only on
the seed, the step, the stream (which layer, which teacher) and the image's position in the global
batch.

Shapes: B images of this process, N drop-path layers.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn

_WORD = 0xFFFFFFFF
# Any odd constant (2^32 / golden ratio): 0 is a fixed point of the mixing, and a usual seed.
_START = 0x9E3779B9
_Word = TypeVar("_Word", int, Tensor)


def _mix(word: _Word) -> _Word:
    """Scramble 32-bit words held in int64 (two multiply-xorshift rounds, a bijection)."""
    # An int64 product wraps, which leaves its low 32 bits, all that is kept, right.
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _WORD
    return word ^ (word >> 16)


def uniform(seed: int, step: int, stream: Tensor, position: Tensor) -> Tensor:
    """Draw one number in [0, 1) for every (stream, position) at this seed and step.

    Args:
        seed: seed of the run, up to 64 bits.
        step: optimisation step.
        stream: int64, which of the independent sequences (a layer, a teacher).
        position: int64, place in the global batch; broadcast against `stream`.

    Returns:
        float32 of the broadcast shape, on the device of the inputs, multiples of 2^-24.
    """
    start = _mix(_mix(_mix(seed & _WORD ^ _START) ^ (seed >> 32 & _WORD)) ^ (step & _WORD))
    word = _mix(_mix(start ^ (stream & _WORD)) ^ (position & _WORD))
    # 24 bits are what float32 holds exactly: rounding can never reach 1.
    return (word >> 8).float() / (1 << 24)


class DropPathMasks:
    """The masks of all drop-path layers for one step, drawn together by `set_step`.

    Deliberately neither a module nor a buffer: DistributedDataParallel would overwrite buffers
    with those of rank 0, and every process needs the masks of its own images.
    """

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.scale_NB: Tensor | None = None
        self._rate_N1: Tensor | None = None

    def set_step(
        self, seed: int, step: int, offset: int, global_batch: int, device: torch.device
    ) -> None:
        """Draw keep/(1-rate) for the images at positions offset to global_batch-1.

        Args:
            seed: seed of the run.
            step: optimisation step, the same in every process.
            offset: position of this process's first image in the global batch.
            global_batch: images of all processes together.
            device: where the masks are needed; they are computed there, without a transfer.
        """
        if not 0 <= offset < global_batch:
            raise ValueError(
                f"offset {offset} lies outside the global batch of {global_batch} images; "
                "expected rank * batch per process"
            )
        rate_N1 = self._rates(device)
        layer_N1 = torch.arange(len(self.rates), device=device)[:, None]
        position_B = torch.arange(offset, global_batch, device=device)
        kept_NB = uniform(seed, step, layer_N1, position_B) >= rate_N1
        self.scale_NB = kept_NB / (1 - rate_N1)

    def _rates(self, device: torch.device) -> Tensor:
        # Copied once: a copy from the host in every step would make it wait for the device.
        if self._rate_N1 is None or self._rate_N1.device != device:
            self._rate_N1 = torch.tensor(self.rates, device=device)[:, None]
        return self._rate_N1


class DropPath(nn.Module):
    """Stochastic depth per image (Huang et al. 2016) with masks from `DropPathMasks`.

    In training a residual branch is zeroed with its rate and scaled by 1/(1-rate) where kept; in
    evaluation it passes unchanged.
    """

    def __init__(self, masks: DropPathMasks, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate must lie in [0, 1), got {rate}")
        self.masks, self.rate, self.layer = masks, rate, len(masks.rates)
        masks.rates.append(rate)

    def forward(self, branch: Tensor) -> Tensor:
        """Drop the branch, shape `[B, ...]`, for the images that this step's masks name."""
        if not self.training:
            return branch
        scale_NB = self.masks.scale_NB
        if scale_NB is None or scale_NB.shape[1] < len(branch):
            raise ValueError(
                f"no drop-path masks for a training batch of {len(branch)} images: call "
                "set_step(seed, step, offset, global_batch) before each step, or eval()"
            )
        scale_B = scale_NB[self.layer, : len(branch)].to(branch.dtype)
        return branch * scale_B.view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate:.3f}"


def install(model: nn.Module) -> DropPathMasks:
    """Replace every timm `DropPath` in a model, keeping its rate.

    Args:
        model: a timm model built with `drop_path_rate`; changed in place.

    Returns:
        the masks that the replacements share; call their `set_step` before each training step.
    """
    masks = DropPathMasks()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TimmDropPath):
                setattr(parent, name, DropPath(masks, float(child.drop_prob or 0.0)))
    return masks
