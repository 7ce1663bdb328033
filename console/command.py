"""Running a typer app so that a user's mistake is one red line, and a defect keeps its traceback.

Exit codes: 0 done, 1 wrong or damaged input, 2 wrong usage, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn, Self

import typer
from rich.console import Console
from rich.text import Text

from extract.cache.errors import UserError

__all__ = ["StopRequest", "Terminated", "UserError", "run_command"]

STOPPED = "stopped; what was finished is kept, and the same command goes on from there"
errors = Console(stderr=True, soft_wrap=True, highlight=False)


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that work in progress is left as Ctrl-C leaves it."""


def run_command(app: typer.Typer) -> NoReturn:
    """Run `app` on the command line's arguments and exit with the codes above."""
    signal.signal(signal.SIGTERM, _raise_terminated)
    # Read when torch is loaded, which is later. Threads that spin while they wait for each other
    # stop all work where cores are shared: 0.4 steps a second of a small student, 11 with this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        _say(f"error: {error}")
        sys.exit(1)
    except (KeyboardInterrupt, Terminated) as stop:
        _say(STOPPED)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except SystemExit as leaving:
        # typer turns Ctrl-C into this code by itself, silently.
        if leaving.code == 130:
            _say(STOPPED)
        raise
    sys.exit(0)


class StopRequest:
    """Context manager: Ctrl-C and SIGTERM ask for a stop, which the work grants when it is safe.

    True once a stop was asked for; `raise_if_requested` then raises `KeyboardInterrupt` or
    `Terminated`. A second Ctrl-C stops at once. Outside the main thread it never asks.
    """

    def __enter__(self) -> Self:
        self._kind: type[BaseException] | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self._kind is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._kind is not None:
            raise self._kind
        self._kind = KeyboardInterrupt if number == signal.SIGINT else Terminated

    def raise_if_requested(self) -> None:
        """Raise what was asked for, if anything was."""
        if self._kind is not None:
            raise self._kind


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _say(message: str) -> None:
    errors.print(Text(" ".join(message.split()), style="bold red"))
