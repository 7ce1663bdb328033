"""Exit codes of the commands, and stops that wait until it is safe."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from console.command import StopRequest, Terminated

# The app of a command that fails, in every way that one can.
COMMAND = """
import os, signal, sys, time
import typer
from console.command import StopRequest, UserError, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

class Damaged(UserError):
    pass

@app.command()
def work(kind: str, number: int = 0) -> None:
    print("began", flush=True)
    if kind == "mistake":
        raise Damaged("feats is   no cache:\\n make [one]")
    if kind == "defect":
        raise ZeroDivisionError("ours")
    if kind == "exit":
        raise typer.Exit(3)
    if kind in ("SIGINT", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, kind))
        time.sleep(20)
    if kind.startswith("late"):
        with StopRequest() as stop:
            os.kill(os.getpid(), getattr(signal, kind.removeprefix("late")))
            print("saved", flush=True)
            stop.raise_if_requested()
        print("never", flush=True)

run_command(app)
"""
# One process imports, and its forks each run the command once.
DRIVER = f"""
import json, os, sys, tempfile
import console.command, typer
results = []
for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = ["unic-work", *arguments]
            exec(compile({COMMAND!r}, "command", "exec"), {{"__name__": "__main__"}})
        _, status = os.waitpid(child, 0)
        for file in (out, err):
            file.seek(0)
        code = os.waitstatus_to_exitcode(status)
        results.append([code, out.read().decode(), err.read().decode()])
print(json.dumps(results))
"""
KINDS = {
    "done": ["done"],
    "mistake": ["mistake"],
    "defect": ["defect"],
    "exit": ["exit"],
    "usage": ["done", "--numbr", "3"],
    "value": ["done", "--number", "three"],
    "help": ["--help"],
    "SIGINT": ["SIGINT"],
    "SIGTERM": ["SIGTERM"],
    "lateSIGINT": ["lateSIGINT"],
    "lateSIGTERM": ["lateSIGTERM"],
}
STOPPED = "stopped; what was finished is kept, and the same command goes on from there\n"


@pytest.fixture(scope="module")
def calls():
    import json

    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(list(KINDS.values())),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(KINDS, json.loads(done.stdout), strict=True))


def test_done(calls):
    assert calls["done"] == [0, "began\n", ""]
    assert calls["help"][0] == 0 and "--number" in calls["help"][1]


def test_a_mistake_is_one_line_as_it_was_written(calls):
    assert calls["mistake"] == [1, "began\n", "error: feats is no cache: make [one]\n"]


def test_a_defect_keeps_its_traceback(calls):
    code, _, err = calls["defect"]
    assert code == 1
    assert "Traceback" in err and err.rstrip().endswith("ZeroDivisionError: ours")


def test_a_code_of_the_commands_own_is_kept(calls):
    assert calls["exit"][0] == 3


@pytest.mark.parametrize(
    ("kind", "named"), [("usage", "--numbr"), ("value", "Invalid value for '--number'")]
)
def test_wrong_usage(calls, kind, named):
    code, out, err = calls[kind]
    assert code == 2 and out == ""
    assert named in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("kind", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("lateSIGINT", 130), ("lateSIGTERM", 143)]
)
def test_a_stop(calls, kind, code):
    saved = "saved\n" if kind.startswith("late") else ""
    found, out, err = calls[kind]
    assert (found, out) == (code, "began\n" + saved)
    assert err.strip() == STOPPED.strip()


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_waits_until_it_is_granted(number, kind):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        stop.raise_if_requested()
        os.kill(os.getpid(), number)
        assert stop
        with pytest.raises(kind):
            stop.raise_if_requested()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(second):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), second)
        pytest.fail("the second signal was ignored")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failure_gives_the_signals_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_it_never_asks():
    found = []

    def work() -> None:
        with StopRequest() as stop:
            stop.raise_if_requested()
            found.append(bool(stop))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert found == [False] and signal.getsignal(signal.SIGINT) is before
