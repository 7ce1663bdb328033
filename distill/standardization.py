"""Standardization of the teachers' features to zero mean and unit variance (Sec. 3.3).

`Exact` uses the statistics of the whole data set, which a cache knows; `Ema` estimates them while
training as the authors' code does; `Identity` leaves the features raw (Table 1, row 4).

Shapes: B images, P patch tokens, T width of a teacher; `...` any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from distill.projectors import module_key

EPS = 1e-6
Statistics = Mapping[str, tuple[Tensor, Tensor]]
Moments = tuple[Tensor, Tensor]
Tokens = tuple[Tensor, Tensor | None]
SumOverRanks = Callable[[Tensor], Tensor]


class Exact(nn.Module):
    """Standardize with fixed statistics: (x - mean) / (std + 1e-6), float32.

    Args:
        mean: per channel `[T]`.
        std: per channel `[T]`.

    Raises:
        ValueError: if they are not two finite vectors of one length, or a std is negative.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        mean, std = torch.as_tensor(mean).float(), torch.as_tensor(std).float()
        _check(mean, std)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(
        self, x: Tensor, momentum: float = 0.0, sum_over_ranks: SumOverRanks | None = None
    ) -> Tensor:
        """Standardize features `[..., T]`; the other arguments are those of `Ema`, unused here."""
        return (x.float() - self.mean) / (self.std + EPS)


class Ema(Exact):
    """Standardize with running statistics, by the recursion of the authors' code.

    A batch is standardized with the statistics before it; they then move towards its own:
    mean <- (1-m) mean + m mean_B, std <- (1-m) std + m (std_B + 1e-6), std_B unbiased. Starting
    from mean 0 and std 1 with m = 1, the first batch passes raw (see `optim.ema_momentum`).

    Args:
        width: T.
    """

    def __init__(self, width: int) -> None:
        super().__init__(torch.zeros(width), torch.ones(width))

    def forward(
        self, x: Tensor, momentum: float = 0.0, sum_over_ranks: SumOverRanks | None = None
    ) -> Tensor:
        """Standardize features `[..., T]`, then update the statistics.

        Args:
            x: features of this process's batch, any float dtype.
            momentum: m above; 0 (validation) leaves the statistics as they are.
            sum_over_ranks: sums a tensor over processes, so that all share the statistics of the
                global batch.

        Returns:
            float32 `[..., T]`.
        """
        x = x.float()
        y = super().forward(x)
        if momentum > 0:
            mean, std = batch_statistics(x, sum_over_ranks)
            with torch.no_grad():
                self.mean.copy_((1 - momentum) * self.mean + momentum * mean)
                self.std.copy_((1 - momentum) * self.std + momentum * (std + EPS))
        return y


class Identity(nn.Module):
    """Leave the features as they are, in float32."""

    def forward(
        self, x: Tensor, momentum: float = 0.0, sum_over_ranks: SumOverRanks | None = None
    ) -> Tensor:
        """Return the features `[..., T]` in float32."""
        return x.float()


class Standardization(nn.Module):
    """The standardization of all teachers, CLS and patch tokens apart.

    Args:
        kind: "exact", "ema" or "none".
        statistics: by teacher `{"cls": (mean, std), "patches": (mean, std)}`, each `[T]`, without
            patches for a teacher that has only CLS tokens; "ema" takes only the width from them.

    Raises:
        ValueError: if `kind` is another word, or a teacher lacks statistics.
    """

    def __init__(self, kind: str, statistics: Mapping[str, Statistics]) -> None:
        super().__init__()
        self.kind = kind
        self.teachers = nn.ModuleDict(
            {module_key(t): standardizer(kind, statistics[t]) for t in sorted(statistics)}
        )

    def forward(
        self,
        targets: Mapping[str, Tokens],
        momentum: float = 0.0,
        sum_over_ranks: SumOverRanks | None = None,
    ) -> dict[str, Tokens]:
        """Standardize every teacher's CLS `[B, T]` and patch tokens `[B, P, T]`, or None.

        Args:
            targets: raw features by teacher.
            momentum: of "ema", see `Ema`.
            sum_over_ranks: of "ema", see `Ema`.

        Returns:
            float32 tokens by teacher.
        """
        done = {}
        for teacher, (cls_BT, patches_BPT) in targets.items():
            modules = cast(nn.ModuleDict, self.teachers[module_key(teacher)])
            cls_BT = modules["cls"](cls_BT, momentum, sum_over_ranks)
            if patches_BPT is not None:
                patches_BPT = modules["patches"](patches_BPT, momentum, sum_over_ranks)
            done[teacher] = (cls_BT, patches_BPT)
        return done


def standardizer(kind: str, statistics: Statistics) -> nn.ModuleDict:
    """Build one teacher's modules `cls` and, if it has any, `patches` from its statistics."""
    if kind not in ("exact", "ema", "none"):
        raise ValueError(f"standardization {kind!r}: expected 'exact', 'ema' or 'none'")
    modules = {}
    if "cls" not in statistics or not set(statistics) <= {"cls", "patches"}:
        raise ValueError(f"expected statistics of cls and patches; found {sorted(statistics)}")
    for token, (mean, std) in sorted(statistics.items()):
        modules[token] = (
            Exact(mean, std) if kind == "exact" else Ema(len(mean)) if kind == "ema" else Identity()
        )
    return nn.ModuleDict(modules)


@torch.no_grad()
def batch_statistics(x: Tensor, sum_over_ranks: SumOverRanks | None = None) -> Moments:
    """Compute mean and unbiased standard deviation per channel over all leading axes.

    Args:
        x: features `[..., T]`, float32.
        sum_over_ranks: sums a tensor over processes; two vectors cross, never the features.

    Returns:
        mean `[T]` and std `[T]`.
    """
    x = x.flatten(0, -2)
    add = sum_over_ranks if sum_over_ranks is not None else lambda tensor: tensor
    sums = add(torch.cat([x.sum(0), x.new_full((1,), len(x))]))
    count = sums[-1]
    mean = sums[:-1] / count
    # The second moment about the global mean: E[x^2] - E[x]^2 would cancel in float32.
    return mean, (add((x - mean).square().sum(0)) / (count - 1)).sqrt()


def _check(mean: Tensor, std: Tensor) -> None:
    if mean.ndim != 1 or mean.shape != std.shape:
        raise ValueError(
            f"statistics must be two vectors of one length, got {tuple(mean.shape)} and "
            f"{tuple(std.shape)}"
        )
    if not (mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()):
        raise ValueError("statistics hold values that are not finite, or a negative std")
