"""Progress of long work: a rich bar on a terminal, otherwise a plain line every so often.

Progress goes to stderr; results go to stdout.
"""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 10.0


class ProgressBar:
    """Context manager that counts `done` of `total` `unit`s of the work called `title`.

    `start` counts work that an earlier run finished; rates and the time left ignore it.
    """

    def __init__(
        self, title: str, total: int, unit: str, start: int = 0, stream: TextIO | None = None
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, start
        self._first = start
        self._stream = stream or sys.stderr
        self._rich = self._stream.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(file=self._stream),
            disable=not self._rich,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, note="")
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def expect(self, more: int) -> None:
        """There is `more` to do than was known at the start."""
        self.total += more
        self._bar.update(self._task, total=self.total)

    def advance(self, amount: int, note: str = "") -> None:
        """Count `amount` more units, with a short `note` (the loss, say) behind the numbers."""
        self.done += amount
        self._bar.update(self._task, completed=self.done, note=note)
        now = time.monotonic()
        finished = self.done >= self.total and amount
        if not self._rich and (now - self._last >= PLAIN_SECONDS or finished):
            self._last = now
            print(self._line(now - self._began, note), file=self._stream, flush=True)

    def _line(self, seconds: float, note: str) -> str:
        rate = (self.done - self._first) / max(seconds, 1e-9)
        left = (self.total - self.done) / rate if rate else float("nan")
        parts = [
            f"{self.title}: {self.done}/{self.total} {self.unit}",
            f"{rate:.1f} {self.unit}/s",
            f"{left:.0f} s left" if self.done < self.total else f"{seconds:.0f} s",
            note,
        ]
        return ", ".join(part for part in parts if part)
