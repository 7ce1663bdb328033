"""What a run writes down, in `metrics.jsonl` and TensorBoard: means since the last line.

M = teachers. Losses and coefficients are summed on the device and fetched once a line, so that the
training loop does not wait for the device in between. Fig. 3a of the paper is
`teachers.*.teacher_loss` over steps, Fig. 4 is `teachers.*.coefficient`.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Collects every step's values; `write` makes a line of their means."""

    def __init__(self, folder: Path, teachers: list[str], start: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.teachers = teachers
        _keep_lines_up_to(self.path, start)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._images, self._waited = 0, 0, 0.0
        self._since = time.monotonic()

    def add(self, values: dict[str, Tensor], images: int, waited: float) -> None:
        """Count one step: detached tensors by name, images, seconds spent waiting for data."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps += 1
        self._images += images
        self._waited += waited

    def write(self, step: int, epoch: float, lr: float) -> dict[str, Any]:
        """Append a line after `step` finished steps, and return it."""
        names = list(self._sums)
        means = (torch.stack([self._sums[n].mean(-1) for n in names]) / self._steps).tolist()
        per_teacher = {
            name: (self._sums[name] / self._steps).tolist()
            for name in names
            if self._sums[name].ndim
        }
        seconds = time.monotonic() - self._since
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            "lr": lr,
            "loss": means[names.index("loss")],
            "teachers": {
                teacher: {name: values[i] for name, values in per_teacher.items()}
                for i, teacher in enumerate(self.teachers)
            },
            "images_per_second": round(self._images / seconds, 2),
            "data_wait": round(self._waited / seconds, 4),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._show(line, step)
        self._reset()
        return line

    def _show(self, line: dict[str, Any], step: int) -> None:
        for name in ("loss", "lr", "images_per_second", "data_wait"):
            self._board.add_scalar(name, line[name], step)
        for teacher, values in line["teachers"].items():
            for name, value in values.items():
                self._board.add_scalar(f"{name}/{teacher}", value, step)

    @property
    def pending(self) -> bool:
        """True when steps were counted since the last line."""
        return self._steps > 0

    def close(self) -> None:
        """Flush TensorBoard's files."""
        self._board.close()


def finite(line: dict[str, Any]) -> bool:
    """True when the line's loss is a number that training can go on from."""
    return math.isfinite(line["loss"])


def _keep_lines_up_to(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run makes again, and a line torn by a kill."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
        except (ValueError, KeyError):
            continue
    path.write_text("".join(kept))
