"""`unic-distill` as its user meets it: messages, exit codes, Ctrl-C, and what lies there after."""

import signal
import subprocess
import sys
import time

import pytest

STUDENT = "vit_tiny_patch16_224 patch_size=16 embed_dim=32 depth=3 num_heads=2"
COMMAND = (sys.executable, "-c", "from distill.cli import main; main()")
# One process for many calls: importing takes longer than all of them.
DRIVER = """
import contextlib, io, json, sys
import torch
from distill.cli import main
torch.set_num_threads(1)
results = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["unic-distill", *arguments]
    import console.command
    console.command.errors.file = err
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def calls(feats, tmp_path_factory):
    """What each call said, all made in one empty folder; and that folder."""
    import json

    folder = tmp_path_factory.mktemp("empty")
    run = ["--cache", str(feats), "--student", STUDENT, "--epochs", "1", "--device", "cpu"]
    arguments = {
        "no cache": [],
        "not a cache": ["--cache", str(folder)],
        "recipe": [*run, "--recipe", "unik"],
        "usage": ["--cash", str(feats)],
        "number": [*run, "--batch-size", "many"],
        "zero": ["--cache", str(feats), "--epochs", "0"],
        "help": ["--help"],
        "run": run,
        "again": run,
        "other": [*run, "--seed", "4"],
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(list(arguments.values())),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder, dict(zip(arguments, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(
    "call, code, message",
    [
        ("no cache", 1, "error: missing --cache: give it"),
        ("not a cache", 1, "is not a feature cache"),
        ("recipe", 1, "no recipe 'unik'; choose one of basic raw features"),
        ("zero", 1, "--epochs must be at least 1, found 0"),
        ("usage", 2, "No such option"),
        ("number", 2, "Invalid value for"),
        ("other", 1, "seed: 0 -> 4"),
    ],
)
def test_mistakes(calls, call, code, message):
    found, out, err = calls[1][call]
    assert found == code
    assert message in err
    assert out == "" and "Traceback" not in err
    assert code == 2 or err.count("\n") == 1


def test_help_lists_the_recipes(calls):
    code, out, _ = calls[1]["help"]
    assert code == 0
    assert all(name in out for name in ("basic", "std", "dedicated", "ladder", "unic", "single"))


def test_a_bare_call_in_an_empty_folder(calls):
    folder, done = calls
    code, out, err = done["run"]
    assert code == 0, err
    assert out.startswith("1 steps (1 made now); loss alpha ")
    assert 'timm.create_model("local-dir:runs/unic/student", pretrained=True)' in out
    run = folder / "runs" / "unic"
    found = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "student", "heads.safetensors"} <= found
    assert [path.name for path in folder.iterdir()] == ["runs"]


def test_the_same_call_again_says_that_it_is_done(calls):
    code, out, _ = calls[1]["again"]
    assert code == 0
    assert out.startswith("1 steps (finished before); loss alpha ")


def test_ctrl_c_saves_and_the_same_command_finishes(feats, tmp_path):
    arguments = [*COMMAND, "--cache", str(feats), "--student", STUDENT, "--epochs", "40"]
    arguments += ["--batch-size", "17", "--log-every", "1", "--out", str(tmp_path / "run")]
    metrics = tmp_path / "run" / "metrics.jsonl"
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    running = subprocess.Popen(arguments, env=environment, **quiet)
    try:
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert "stopped; what was finished is kept" in err and "Traceback" not in err
    made = metrics.read_text().count("\n")
    assert 3 <= made < 120
    assert (tmp_path / "run" / "checkpoints" / f"{made:08d}.json").exists()
    again = subprocess.run(arguments, env=environment, timeout=120, check=False, **quiet)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"120 steps ({120 - made} made now)")
    assert metrics.read_text().count("\n") == 120
