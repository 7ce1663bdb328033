"""Weighted k-nearest-neighbour classification of frozen global tokens.

The protocol of DINO, DINOv2 and UNIC: both sides L2-normalised, cosine similarity, the k nearest
training images vote with weight exp(similarity / 0.07). UNIC reports k = 20.

Shapes: N training or test rows, D channels, B test rows of one block, K neighbours, C classes.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

# 2^26 float32 similarities are 256 MB: small beside ImageNet's own features, large enough for BLAS.
_SIMILARITIES_AT_ONCE = 2**26


def knn(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    block: int | None = None,
) -> dict[int, float]:
    """Top-1 accuracy in percent for every number of neighbours in `k`.

    Tokens are `[N, D]` in any float type and at any scale (they are normalised here); labels are
    `[N]` integers, any values. Runs on the device of `train_ND`. `block` is the number of test
    rows compared at once; by default it keeps the similarity matrix under 256 MB. A `k` above
    the number of training rows uses all of them, stays under the key asked for, and is logged as
    a warning.

    Protocol: DINO (Caron et al. 2021), as used by UNIC's Table 2.

    Raises ValueError for shapes that do not match, tokens that are not finite, a `k` or
    temperature that is not positive, and test labels that no training row has.
    """
    check_features(train_ND, train_labels_N, "train")
    check_features(test_ND, test_labels_N, "test")
    if not k or min(k) < 1 or temperature <= 0:
        raise ValueError(f"expected k >= 1 and temperature > 0, found k={k}, {temperature=}")
    neighbours = _clip_neighbours(k, len(train_ND))
    classes_C, train_classes_N, test_classes_N = class_indices(train_labels_N, test_labels_N)
    device = train_ND.device
    train_classes_N = train_classes_N.to(device)
    train_ND = F.normalize(train_ND.float(), dim=1)
    block = block or max(1, _SIMILARITIES_AT_ONCE // len(train_ND))
    correct = dict.fromkeys(neighbours, 0)
    for test_BD, wanted_B in zip(test_ND.split(block), test_classes_N.split(block), strict=True):
        sims_BN = F.normalize(test_BD.to(device).float(), dim=1) @ train_ND.T
        sims_BK, rows_BK = sims_BN.topk(max(neighbours.values()), dim=1)
        voters_BK = train_classes_N[rows_BK]
        for asked, used in neighbours.items():
            votes_BC = vote(sims_BK[:, :used], voters_BK[:, :used], len(classes_C), temperature)
            correct[asked] += int((votes_BC.argmax(1).cpu() == wanted_B).sum())
    return {asked: 100 * hits / len(test_ND) for asked, hits in correct.items()}


def vote(sims_BK: Tensor, classes_BK: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Votes `[B, C]` in float64: the sum of exp(similarity / temperature) of each class.

    The weights are relative to the nearest neighbour's, so that small temperatures do not
    overflow; the ranking and the ratios are those of the formula.
    """
    sims_BK = sims_BK.double()
    weights_BK = ((sims_BK - sims_BK.amax(1, keepdim=True)) / temperature).exp()
    votes_BC = weights_BK.new_zeros(len(sims_BK), num_classes)
    return votes_BC.scatter_add_(1, classes_BK, weights_BK)


def class_indices(train_labels_N: Tensor, test_labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted training labels `[C]`, and both label vectors as indices into them, on the CPU.

    Raises ValueError naming the test labels that no training row has: they could never be right.
    """
    classes_C, train_N = train_labels_N.cpu().long().unique(return_inverse=True)
    test_labels_N = test_labels_N.cpu().long()
    unseen = test_labels_N[~torch.isin(test_labels_N, classes_C)].unique().tolist()
    if unseen:
        named = ", ".join(map(str, unseen[:10])) + (", ..." if len(unseen) > 10 else "")
        raise ValueError(
            f"{len(unseen)} test label(s) are in no training row: {named}; the training rows have "
            f"{len(classes_C)} classes. Check that both splits number their classes alike"
        )
    return classes_C, train_N, torch.searchsorted(classes_C, test_labels_N)


def check_features(features_ND: Tensor, labels_N: Tensor, split: str) -> None:
    """Raise ValueError unless features are `[N, D]`, N > 0, finite, with one label a row."""
    if features_ND.ndim != 2 or not len(features_ND):
        found = list(features_ND.shape)
        raise ValueError(f"{split}: expected tokens of shape [N, D] with N > 0, found {found}")
    if labels_N.shape != features_ND.shape[:1] or labels_N.is_floating_point():
        raise ValueError(
            f"{split}: expected {len(features_ND)} integer labels, one a row, found "
            f"{list(labels_N.shape)} of {labels_N.dtype}"
        )
    bad = int((~features_ND.isfinite()).any(1).sum())
    if bad:
        raise ValueError(
            f"{split}: {bad} of {len(features_ND)} rows hold NaN or infinity; "
            "verify the cache that the tokens come from"
        )


def _clip_neighbours(asked: Sequence[int], rows: int) -> dict[int, int]:
    for k in asked:
        if k > rows:
            log.warning("kNN: k = %d clipped to the %d training rows", k, rows)
    return {k: min(k, rows) for k in asked}
