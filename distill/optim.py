"""The optimiser and its schedules: pure functions of the step.

AdamW(0.9, 0.99), weight decay 0.03, peak learning rate 3e-4 * batch / 256, 10 epochs of linear
warm-up, cosine to 1e-6 (the paper's authors' settings).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

WEIGHT_DECAY = 0.03
BASE_LR = 3e-4
MIN_LR = 1e-6


def parameter_groups(
    *modules: nn.Module, weight_decay: float = WEIGHT_DECAY
) -> list[dict[str, object]]:
    """Split the trainable parameters into those with weight decay and those without.

    Biases and everything one-dimensional are not decayed; the CLS token and the position embedding
    are, as in the authors' code.

    Args:
        *modules: student and projectors.
        weight_decay: of the first group.

    Returns:
        two groups for a torch optimiser.

    Raises:
        ValueError: if nothing is trainable.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                bare = parameter.ndim <= 1 or name.endswith("bias")
                (plain if bare else decayed).append(parameter)
    if not decayed and not plain:
        raise ValueError("nothing to train: no parameter requires a gradient")
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def adamw(
    *modules: nn.Module, weight_decay: float = WEIGHT_DECAY, fused: bool = True
) -> torch.optim.AdamW:
    """Build the optimiser over all trainable parameters; the schedule sets its learning rate.

    Args:
        *modules: student and projectors.
        weight_decay: see `parameter_groups`.
        fused: one kernel for all parameters, on CPU and GPU; torch would choose it on neither.
    """
    groups: Iterable[dict[str, object]] = parameter_groups(*modules, weight_decay=weight_decay)
    # Schedules start at 0; an optimiser stepped before its first set_lr must not move either.
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-8, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def peak_lr(global_batch: int, base: float = BASE_LR) -> float:
    """Scale the peak learning rate with the images per step of all processes, 256 being 1."""
    return base * global_batch / 256


def warmup_steps(total: int, per_epoch: int, epochs: int = 10) -> int:
    """Give the number of warm-up steps: whole epochs, but at most half of a short run.

    Args:
        total: steps of the run.
        per_epoch: steps of an epoch.
        epochs: wanted epochs of warm-up.
    """
    return min(epochs * per_epoch, total // 2)


def lr_at(step: int, *, peak: float, total: int, warmup: int, minimum: float = MIN_LR) -> float:
    """Give the learning rate of a step: linear from 0 to the peak, then cosine to the minimum.

    The first warm-up step has rate 0, the last one and the first of the cosine have the peak; the
    cosine would reach the minimum at step `total`, which is never run.

    Args:
        step: 0 to total - 1.
        peak: see `peak_lr`.
        total: steps of the run.
        warmup: warm-up steps, see `warmup_steps`.
        minimum: end of the cosine.

    Raises:
        ValueError: if the step lies outside the run, or the warm-up is longer than it.
    """
    if not 0 <= warmup <= total:
        raise ValueError(f"{warmup} warm-up steps do not fit into a run of {total} steps")
    if not 0 <= step < total:
        raise ValueError(f"step {step} lies outside the run of {total} steps")
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return _cosine(step - warmup, total - warmup, peak, minimum)


def ema_momentum(step: int, total: int, start: float = 1.0, end: float = 0.001) -> float:
    """Give the momentum of the `standardization.Ema` statistics: a cosine from 1 to 0.001.

    Args:
        step: 0 to total - 1.
        total: steps of the run.
        start: momentum of step 0, which replaces the statistics by the first batch's.
        end: what the cosine tends to.
    """
    return _cosine(step, total, start, end)


def _cosine(step: int, total: int, start: float, end: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total))
