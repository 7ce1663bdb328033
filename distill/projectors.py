"""The ladder of projectors (Eq. 3): from every student block to every teacher's tokens.

Shapes: B images, D width of the student, T width of a teacher, P patch tokens of the student,
Q patch tokens of a teacher, K chosen ones of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]
Hidden = str | tuple[int, int]
Positions = Tensor | Mapping[str, Tensor | None]


def module_key(teacher: str) -> str:
    """Give a teacher's name without the dots that PyTorch forbids in the names of modules."""
    return teacher.replace("%", "%25").replace(".", "%2E")


def hidden_widths(hidden: Hidden, width: int) -> tuple[int, int]:
    """Give the projectors' hidden widths: after blocks before the last, after the last.

    Args:
        hidden: "paper" (d and 4d, Sec. 3.4), "reference" (768 and 3072 for every student, as the
            authors' code has it; the same for a ViT-B) or the two widths.
        width: the student's d.

    Raises:
        ValueError: for any other name.
    """
    if not isinstance(hidden, str):
        return hidden
    if hidden not in ("paper", "reference"):
        raise ValueError(f"hidden widths {hidden!r}: expected 'paper', 'reference' or two integers")
    return (width, 4 * width) if hidden == "paper" else (768, 3072)


class Ladder(nn.Module):
    """Projectors per (teacher, token type, block): Linear - GELU - Linear, summed over blocks.

    Weights start at normal(std 0.02), biases at 0. Teachers are kept in sorted order.

    Args:
        width: the student's width D.
        depth: its number of blocks L.
        dims: width T of each teacher.
        blocks: indices (0 to L-1) of the blocks that are read; None reads all of them, `[L-1]`
            is the plain projector head without a ladder.
        shared: one projector for CLS and patch tokens (Table 1, rows 4 and 5).
        hidden: see `hidden_widths`.
        grid: the student's patch rows and columns; needed where a teacher's grid differs.
        grids: the teachers' patch grids; a teacher that is not named has the student's.
        cls_only: teachers whose patch tokens are not predicted.

    Raises:
        ValueError: if there is no teacher, a block does not exist, or a grid is missing.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        dims: Mapping[str, int],
        *,
        blocks: Sequence[int] | None = None,
        shared: bool = False,
        hidden: Hidden = "paper",
        grid: Grid | None = None,
        grids: Mapping[str, Grid] | None = None,
        cls_only: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.dims = dict(sorted(dims.items()))
        self.blocks = tuple(range(depth)) if blocks is None else tuple(sorted(set(blocks)))
        self.depth, self.shared = depth, shared
        self.cls_only = tuple(sorted(cls_only))
        self.hidden = hidden_widths(hidden, width)
        self.grid = None if grid is None else (grid[0], grid[1])
        # A teacher on the student's grid needs no interpolation and no entry.
        self.grids = {t: g for t, g in _as_grids(grids or {}).items() if g != self.grid}
        self._check()
        self.projectors = nn.ModuleDict(
            {module_key(t): self._teacher(t, width, dim) for t, dim in self.dims.items()}
        )

    def forward(
        self, outputs: Sequence[tuple[Tensor, Tensor]], positions: Positions | None = None
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Predict every teacher's tokens from the student's block outputs.

        Args:
            outputs: L pairs (CLS `[B, D]`, patches `[B, P, D]`), as `Student.forward` gives them.
            positions: int64 `[B, K]`, indices of the wanted patches in the teacher's grid, the same
                for all teachers or by teacher; None, also for one teacher, computes all of them.

        Returns:
            by teacher: CLS `[B, T]` and patches `[B, K, T]` (`[B, Q, T]` without positions, None
            of a teacher in `cls_only`).

        Raises:
            ValueError: if the number of outputs is not L.
        """
        if len(outputs) != self.depth:
            raise ValueError(f"expected the outputs of {self.depth} blocks, got {len(outputs)}")
        sums: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for block in self.blocks:
            cls_BD, patches_BPD = outputs[block]
            inputs = self._patches(patches_BPD, positions)
            for teacher in self.dims:
                heads: Any = self.projectors[module_key(teacher)]
                cls_BT = heads["tokens" if self.shared else "cls"][str(block)](cls_BD)
                patches_BKT = None
                if teacher not in self.cls_only:
                    kind = "tokens" if self.shared else "patches"
                    patches_BKT = heads[kind][str(block)](inputs[teacher])
                before = sums.get(teacher, (None, None))
                sums[teacher] = (_sum(before[0], cls_BT), _sum(before[1], patches_BKT))
        return cast("dict[str, tuple[Tensor, Tensor | None]]", sums)

    def config(self) -> dict[str, object]:
        """Describe the ladder in plain JSON types, enough to build it again."""
        return {
            "dims": self.dims,
            "depth": self.depth,
            "blocks": list(self.blocks),
            "shared": self.shared,
            "hidden": list(self.hidden),
            "grid": self.grid and list(self.grid),
            "grids": {teacher: list(grid) for teacher, grid in self.grids.items()},
            "cls_only": list(self.cls_only),
        }

    def _check(self) -> None:
        if not self.dims:
            raise ValueError("a ladder of projectors needs at least one teacher, got none")
        if not self.blocks or not set(self.blocks) <= set(range(self.depth)):
            raise ValueError(f"blocks {self.blocks}: expected indices 0 to {self.depth - 1}")
        if not set(self.cls_only) <= set(self.dims):
            raise ValueError(f"cls_only names {self.cls_only}, the teachers are {list(self.dims)}")
        if not set(self.grids) <= set(self.dims):
            raise ValueError(f"grids name {sorted(self.grids)}, the teachers are {list(self.dims)}")
        if self.grids and self.grid is None:
            raise ValueError(
                f"the grids of {sorted(self.grids)} are given; pass the student's grid as well"
            )

    def _teacher(self, teacher: str, width: int, dim: int) -> nn.ModuleDict:
        kinds: tuple[str, ...] = ("tokens",) if self.shared else ("cls", "patches")
        if teacher in self.cls_only and not self.shared:
            kinds = ("cls",)
        return nn.ModuleDict(
            {
                kind: nn.ModuleDict(
                    {
                        str(block): _projector(width, self.hidden[block == self.depth - 1], dim)
                        for block in self.blocks
                    }
                )
                for kind in kinds
            }
        )

    def _patches(self, patches_BPD: Tensor, positions: Positions | None) -> dict[str, Tensor]:
        """Bring a block's patch tokens to each teacher's grid and chosen positions, each once."""
        found: dict[tuple[Grid | None, int], Tensor] = {}
        inputs = {}
        for teacher in self.dims:
            chosen_BK = positions[teacher] if isinstance(positions, Mapping) else positions
            key = (self.grids.get(teacher), id(chosen_BK))
            if key not in found:
                found[key] = _choose(self._resample(patches_BPD, key[0]), chosen_BK)
            inputs[teacher] = found[key]
        return inputs

    def _resample(self, patches_BPD: Tensor, grid: Grid | None) -> Tensor:
        if grid is None:
            return patches_BPD
        assert self.grid is not None
        image_BDHW = patches_BPD.transpose(1, 2).unflatten(2, self.grid)
        image_BDHW = F.interpolate(image_BDHW, size=grid, mode="bilinear", align_corners=False)
        return image_BDHW.flatten(2).transpose(1, 2)


def _sum(before: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if before is None or more is None else before + more


def _as_grids(grids: Mapping[str, Sequence[int]]) -> dict[str, Grid]:
    return {teacher: (rows, columns) for teacher, (rows, columns) in grids.items()}


def _choose(patches_BQD: Tensor, chosen_BK: Tensor | None) -> Tensor:
    if chosen_BK is None:
        return patches_BQD
    return patches_BQD.gather(1, chosen_BK[..., None].expand(-1, -1, patches_BQD.shape[2]))


def _projector(width: int, hidden: int, dim: int) -> nn.Sequential:
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, dim)
    for linear in (first, second):
        # trunc_normal_ cuts at an absolute 2, here 100 standard deviations, and so draws from the
        # same distribution, but through erfinv: minutes on a CPU for a ladder of 142 M weights.
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(first, nn.GELU(), second)
