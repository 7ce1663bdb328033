"""Progress in a log file and on a terminal."""

import io
import os
import pty
import re
import select
import time

import pytest

from console import progress
from console.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines_and_a_last_one(monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    out = io.StringIO()
    with ProgressBar("extract", 10, "views", stream=out) as bar:
        time.sleep(0.02)
        bar.advance(4)
        bar.advance(6, note="loss 0.5")
    first, last = out.getvalue().splitlines()
    assert re.fullmatch(r"extract: 4/10 views, \d+\.\d views/s, \d+ s left", first)
    assert re.fullmatch(r"extract: 10/10 views, \d+\.\d views/s, \d+ s, loss 0\.5", last)
    assert "\x1b" not in out.getvalue()


def test_a_log_is_not_flooded():
    out = io.StringIO()
    with ProgressBar("distil", 500, "steps", stream=out) as bar:
        for _ in range(500):
            bar.advance(1)
    assert len(out.getvalue().splitlines()) == 1
    assert out.getvalue().startswith("distil: 500/500 steps")


def test_progress_goes_to_stderr(capfd):
    with ProgressBar("extract", 1, "views") as bar:
        bar.advance(1)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("extract: 1/1 views")


def rate_of(start: int) -> float:
    out = io.StringIO()
    with ProgressBar("extract", start + 2, "views", start=start, stream=out) as bar:
        time.sleep(0.1)
        bar.advance(2)
    found = re.search(rf"{start + 2}/{start + 2} views, ([\d.]+) views/s", out.getvalue())
    assert found, out.getvalue()
    return float(found[1])


@pytest.mark.parametrize("start", [0, 100_000])
def test_what_an_earlier_run_did_is_no_part_of_the_rate(start):
    assert 0 < rate_of(start) <= 20


def test_nothing_done_yet_has_no_rate(monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    out = io.StringIO()
    with ProgressBar("extract", 8, "views", start=3, stream=out) as bar:
        bar.advance(0)
    assert out.getvalue().startswith("extract: 3/8 views, 0.0 views/s")
    assert "-" not in out.getvalue()


def test_a_failure_is_not_hidden_and_claims_no_end():
    out = io.StringIO()
    with (
        pytest.raises(RuntimeError, match="full"),
        ProgressBar("extract", 8, "views", stream=out) as bar,
    ):
        bar.advance(2)
        raise RuntimeError("full")
    assert out.getvalue() == ""


@pytest.fixture
def wide(monkeypatch):
    """Rich takes width and kind of the terminal from the environment."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_a_terminal_gets_a_bar(wide):
    out = Terminal()
    with ProgressBar("extract", 10, "views", start=5, stream=out) as bar:
        bar.advance(5, note="loss 0.5")
    text = out.getvalue()
    assert "\x1b[" in text and "━" in text
    assert "10/10" in text and "100%" in text and "loss 0.5" in text
    assert "views/s" not in text


def test_a_real_terminal_is_noticed(wide):
    master, slave = pty.openpty()
    try:
        with (
            os.fdopen(slave, "w", closefd=False) as stream,
            ProgressBar("distil", 2, "steps", stream=stream) as bar,
        ):
            bar.advance(2)
        # What is on its way arrives in pieces; a bar that never gets there fails by the loop's end.
        seen = ""
        while "2/2" not in seen and select.select([master], [], [], 5)[0]:
            seen += os.read(master, 100_000).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert "\x1b[" in seen and "distil" in seen and "2/2" in seen
