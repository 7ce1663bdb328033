"""Teacher dropping (Eq. 4) and the sum over teachers and images that it weights.

Shapes: M teachers, B images of this process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.droppath import uniform

# Far above the streams of the drop-path layers, which count from 0.
_TEACHER_STREAM = 1 << 20


def draws(
    seed: int, step: int, offset: int, batch: int, teachers: int, device: torch.device | str
) -> Tensor:
    """Draw a number in [0, 1) for every teacher and image of a step.

    Args:
        seed: seed of the run.
        step: optimisation step, the same in every process.
        offset: position of this process's first image in the global batch.
        batch: images B of this process.
        teachers: M.
        device: where the draws are made.

    Returns:
        float32 `[M, B]`; two processes draw the two halves of what one would draw.
    """
    stream_M1 = _TEACHER_STREAM + torch.arange(teachers, device=device)[:, None]
    return uniform(seed, step, stream_M1, torch.arange(offset, offset + batch, device=device))


def teacher_dropping(
    loss_MB: Tensor, p: float, draws_MB: Tensor, *, first_only: bool = False
) -> Tensor:
    """Decide which teachers each image learns from (Eq. 4).

    The teacher with the largest loss is always kept, every other one is dropped with probability p.

    Args:
        loss_MB: loss of each teacher on each image `[M, B]`.
        p: probability of dropping (paper: 0.5; 0.25 for UNIC-L).
        draws_MB: numbers in [0, 1) `[M, B]`; a teacher is dropped where the draw is below p.
        first_only: of equal largest losses keep only the first for certain, as the authors' code
            does; Eq. 4 keeps them all.

    Returns:
        coefficients 0 or 1, `[M, B]`, of the losses' dtype, without a gradient.

    Raises:
        ValueError: if p lies outside [0, 1] or the shapes differ.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"the probability of dropping a teacher must lie in [0, 1], got {p}")
    if loss_MB.shape != draws_MB.shape:
        raise ValueError(
            f"losses {tuple(loss_MB.shape)} and draws {tuple(draws_MB.shape)} must both be "
            "[teachers, images]"
        )
    loss_MB = loss_MB.detach()
    if first_only:
        teacher_M1 = torch.arange(len(loss_MB), device=loss_MB.device)[:, None]
        protected_MB = teacher_M1 == _first_largest(loss_MB)
    else:
        protected_MB = loss_MB == loss_MB.amax(0)
    return (protected_MB | (draws_MB >= p)).to(loss_MB.dtype)


def aggregate(
    loss_MB: Tensor,
    coefficient_MB: Tensor,
    normalise: str = "paper",
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Reduce the losses of all teachers and images to the number that is minimised.

    Args:
        loss_MB: loss of each teacher on each image `[M, B]`.
        coefficient_MB: their coefficients, which carry no gradient.
        normalise: "paper" sums over teachers (Eq. 2) and averages over images; "reference" divides
            by the sum of the coefficients over the batch, as the authors' code does.
        mean_over_ranks: averages a tensor over processes. With it, averaging the gradients over
            processes, as DistributedDataParallel does, gives the same as one process would; the
            authors' code divides by each process's own sum. Not needed for "paper".

    Returns:
        scalar; with "paper" the mean over processes of equally large batches is the global one.

    Raises:
        ValueError: if `normalise` is another word.
    """
    coefficient_MB = coefficient_MB.detach()
    total = (coefficient_MB * loss_MB).sum()
    if normalise == "paper":
        return total / loss_MB.shape[1]
    if normalise == "reference":
        kept = coefficient_MB.sum()
        return total / (kept if mean_over_ranks is None else mean_over_ranks(kept))
    raise ValueError(f"normalise={normalise!r}: expected 'paper' or 'reference'")


def _first_largest(loss_MB: Tensor) -> Tensor:
    # argmax may return any of several equal maxima, depending on the device.
    largest_MB = (loss_MB == loss_MB.amax(0)).to(torch.int64)
    return (largest_MB.cumsum(0) == 0).sum(0)
