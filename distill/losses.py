"""The distillation loss of one teacher (Eq. 1 and 2).

Shapes: B images, P patch tokens, T width of the teacher; `...` any leading axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TeacherLoss(NamedTuple):
    """A teacher's loss for each image `[B]`, and its unweighted terms, detached, `[B]` each."""

    loss_B: Tensor  # noqa: N815
    parts: dict[str, Tensor]


def token_terms(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the two terms of Eq. 1 for each token, in float32 also under autocast.

    Args:
        predicted: projected student tokens `[..., T]`.
        target: standardized teacher tokens `[..., T]`.

    Returns:
        1 - cosine similarity `[...]`, and smooth-l1 (beta 1) as the mean over channels `[...]`.

    Raises:
        ValueError: if the shapes differ.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"student tokens {tuple(predicted.shape)} and teacher tokens {tuple(target.shape)} "
            "must have the same shape; different patch grids are matched by the projectors"
        )
    with torch.autocast(predicted.device.type, enabled=False):
        predicted, target = predicted.float(), target.float()
        cosine = 1 - F.cosine_similarity(predicted, target, dim=-1)
        return cosine, F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)


def token_loss(
    predicted: Tensor, target: Tensor, cosine: float = 0.5, smooth_l1: float = 0.5
) -> Tensor:
    """Compute Eq. 1 for each token.

    Args:
        predicted: projected student tokens `[..., T]`.
        target: standardized teacher tokens `[..., T]`.
        cosine: weight of the cosine term.
        smooth_l1: weight of the smooth-l1 term.

    Returns:
        loss `[...]`, float32.
    """
    cosine_term, smooth_l1_term = token_terms(predicted, target)
    return cosine * cosine_term + smooth_l1 * smooth_l1_term


def teacher_loss(
    cls_BT: Tensor,
    patches_BPT: Tensor | None,
    target_cls_BT: Tensor,
    target_patches_BPT: Tensor | None,
    reduce: str = "sum",
    cosine: float = 0.5,
    smooth_l1: float = 0.5,
) -> TeacherLoss:
    """Compute one teacher's term of Eq. 2 for each image: CLS token and mean over patches.

    Args:
        cls_BT: projected student CLS tokens `[B, T]`.
        patches_BPT: projected student patch tokens `[B, P, T]`; P may be a chosen subset. None, as
            for the target, where the teacher has CLS tokens alone: their term is the loss then.
        target_cls_BT: standardized teacher CLS tokens.
        target_patches_BPT: standardized teacher patch tokens.
        reduce: "sum" of the two as in the paper, or "mean" as in the authors' code (half of it).
        cosine: weight of the cosine term.
        smooth_l1: weight of the smooth-l1 term.

    Returns:
        the loss, and as parts `cls_cosine`, `cls_smooth_l1`, `patches_cosine`, `patches_smooth_l1`.

    Raises:
        ValueError: if `reduce` is another word, or shapes differ.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce={reduce!r}: expected 'sum' (paper) or 'mean' (reference)")
    cls_cosine, cls_l1 = token_terms(cls_BT, target_cls_BT)
    parts = {"cls_cosine": cls_cosine.detach(), "cls_smooth_l1": cls_l1.detach()}
    if patches_BPT is None or target_patches_BPT is None:
        return TeacherLoss(cosine * cls_cosine + smooth_l1 * cls_l1, parts | _no_patches(cls_l1))
    patches_cosine, patches_l1 = (
        term.mean(1) for term in token_terms(patches_BPT, target_patches_BPT)
    )
    loss_B = cosine * (cls_cosine + patches_cosine) + smooth_l1 * (cls_l1 + patches_l1)
    parts["patches_cosine"] = patches_cosine.detach()
    parts["patches_smooth_l1"] = patches_l1.detach()
    return TeacherLoss(loss_B if reduce == "sum" else loss_B / 2, parts)


def _no_patches(like_B: Tensor) -> dict[str, Tensor]:
    return {name: torch.zeros_like(like_B) for name in ("patches_cosine", "patches_smooth_l1")}
