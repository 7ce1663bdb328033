"""Exact per-channel mean and variance, gathered in pieces and merged in any number of steps.

D = channels. Sums are float64 and centred (mean and M2, the sum of squared deviations), merged by
the pairwise rule of Chan, Golub and LeVeque (1979): raw sums of squares would lose the variance of
channels whose mean is large.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean `[D]` and M2 `[D]` (float64) of the tokens of one kind."""

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def of(cls, tokens: NDArray[Any]) -> "Moments":
        """Moments of `tokens [..., D]` over all axes but the last."""
        flat_ND = np.asarray(tokens, dtype=np.float64).reshape(-1, tokens.shape[-1])
        if not len(flat_ND):
            return cls(0, np.zeros(flat_ND.shape[1]), np.zeros(flat_ND.shape[1]))
        mean_D = flat_ND.mean(axis=0)
        return cls(len(flat_ND), mean_D, np.square(flat_ND - mean_D).sum(axis=0))

    @classmethod
    def of_tensor(cls, tokens: Tensor) -> "Moments":
        """Moments of `tokens [..., D]`, summed in float64 on the device where they are."""
        flat_ND = tokens.flatten(0, -2).double()
        mean_D = flat_ND.mean(0)
        m2_D = (flat_ND - mean_D).square_().sum(0)
        return cls(len(flat_ND), mean_D.cpu().numpy(), m2_D.cpu().numpy())

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if other.count == 0 else other
        delta_D = other.mean - self.mean
        mean_D = self.mean + delta_D * (other.count / count)
        m2_D = self.m2 + other.m2 + np.square(delta_D) * (self.count * other.count / count)
        return Moments(count, mean_D, m2_D)

    def std(self) -> NDArray[np.float64]:
        """Unbiased standard deviation `[D]`; zeros for fewer than two tokens."""
        return np.sqrt(self.m2 / max(self.count - 1, 1))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; Python's repr of a float64 reads back to the same bits."""
        return {"count": self.count, "mean": self.mean.tolist(), "m2": self.m2.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Moments":
        """The inverse of `to_json`."""
        return cls(content["count"], np.array(content["mean"]), np.array(content["m2"]))


def merged(parts: Iterable[Moments]) -> Moments:
    """Moments of all parts, merged in the given order (the order is part of the last bits)."""
    total, *rest = parts
    for part in rest:
        total = total.merge(part)
    return total
