"""One training step of the method: Eq. 1-4 on one batch, as tensors in and tensors out.

B = batch, M = teachers, S = view size, D = channels of a teacher, P = its patch tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.balancing import aggregate, draws, teacher_dropping
from distill.losses import teacher_loss
from distill.projectors import Ladder
from distill.recipes import Recipe
from distill.standardization import Standardization
from distill.student import Student


@dataclass(frozen=True)
class Position:
    """Where a step stands: seed and step, this process's first image in the global batch."""

    seed: int
    step: int
    offset: int
    global_batch: int


class Distillation(nn.Module):
    """Student, projectors and standardization together, with a recipe's loss.

    `mean` and `std` normalise the student's pixels, per colour, for pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        student: Student,
        ladder: Ladder,
        standardization: Standardization,
        recipe: Recipe,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.student, self.ladder, self.standardization = student, ladder, standardization
        self.recipe = recipe
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalise(self, views_B3SS: Tensor) -> Tensor:
        """Views uint8 `[B, 3, S, S]` as the student's float input."""
        return (views_B3SS.float() / 255 - self.mean) / self.std

    def losses(
        self,
        views_B3SS: Tensor,
        targets: Mapping[str, Mapping[str, Tensor]],
        positions: Mapping[str, Tensor],
        momentum: float = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of every teacher on every image (Eq. 1 and the inner part of Eq. 2).

        `momentum` is that of running statistics; 0 leaves them. Returns `[M, B]`, teachers in the
        ladder's order, and detached parts of the loss, `[M]` each.
        """
        outputs = self.student(self.normalise(views_B3SS))
        chosen = {t: positions.get(t) for t in self.ladder.dims} if positions else None
        predicted = self.ladder(outputs, chosen)
        raw = {name: (tokens["cls"], tokens.get("patches")) for name, tokens in targets.items()}
        wanted = self.standardization(raw, momentum)
        results = []
        for teacher in self.ladder.dims:
            target_cls, target_patches = wanted[teacher]
            cls, patches = predicted[teacher]
            results.append(
                teacher_loss(cls, patches, target_cls, target_patches, self.recipe.reduce)
            )
        parts = {
            name: torch.stack([result.parts[name].mean() for result in results])
            for name in results[0].parts
        }
        return torch.stack([result.loss_B for result in results]), parts

    def forward(
        self,
        views_B3SS: Tensor,
        targets: Mapping[str, Mapping[str, Tensor]],
        positions: Mapping[str, Tensor],
        at: Position,
        momentum: float = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The number to minimise (Eq. 2, with the coefficients of Eq. 4), and metrics.

        Metrics are detached: `loss` (scalar), and per teacher `[M]` its `loss`, its `coefficient`
        and the parts of Eq. 1, as `teacher_loss` names them.
        """
        self.student.set_step(at.seed, at.step, at.offset, at.global_batch)
        loss_MB, parts = self.losses(views_B3SS, targets, positions, momentum)
        teachers, batch = loss_MB.shape
        coefficient_MB = torch.ones_like(loss_MB)
        if self.recipe.drop and teachers > 1:
            draws_MB = draws(at.seed, at.step, at.offset, batch, teachers, loss_MB.device)
            coefficient_MB = teacher_dropping(
                loss_MB, self.recipe.drop, draws_MB, first_only=self.recipe.first_only
            )
        total = aggregate(loss_MB, coefficient_MB, self.recipe.normalise)
        metrics = {
            "loss": total.detach(),
            "teacher_loss": loss_MB.detach().mean(1),
            "coefficient": coefficient_MB.mean(1),
            **parts,
        }
        return total, metrics
