"""`unic-eval` as its user meets it: the table, a project's defaults, messages and exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SIZE, write_encoder
from typer.testing import CliRunner

from console.project import ProjectError
from evaluate.cli import app
from extract.cache.errors import UserError

# One process for many calls: importing takes longer than all of them.
DRIVER = """
import contextlib, io, json, sys
import torch
import console.command
from evaluate.cli import main
torch.set_num_threads(1)
results = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["unic-eval", *arguments]
    console.command.errors.file = err
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a terminal wide enough for one table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


@pytest.fixture
def data(tars: list[Path], test_tar: Path) -> list[str]:
    pattern = str(tars[0].parent / "train-*.tar")
    shared = ["--size", str(SIZE), "--device", "cpu"]
    return ["--train", pattern, "--test", str(test_tar), *shared]


def ran(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def rows(table: str) -> dict[str, list[str]]:
    """Words by encoder: its line of figures and the line of its role."""
    lines = table.splitlines()
    heads = [i for i, line in enumerate(lines) if re.search(r"^ ?\w\S* +\d+\.\d+\*? *$", line)]
    return {lines[i].split()[0]: lines[i].split()[1:] + lines[i + 1].split() for i in heads}


def test_a_table_of_all_encoders(here, data, encoders):
    student = write_encoder(here / "runs" / "mine" / "student", seed=7)
    (student.parent / "heads.safetensors").write_bytes(b"")
    out = ran(
        *("knn", "--encoder", student, "--encoder", f"first={encoders['alpha']}"),
        *("--encoder", encoders["beta"], "--encoder", "pixels", *data),
    )
    assert re.search(r"^ +knn *\n ?encoder +top-1 % *$", out, re.M)
    found = rows(out)
    # Teachers, then baselines, then students, whatever the order of the flags.
    assert list(found) == ["first", "beta", "pixels", "mine"]
    assert [words[1] for words in found.values()] == ["teacher", "teacher", "baseline", "student"]

    records = json.loads((here / "results.json").read_text())["scores"]
    values = {record["encoder"]: record["value"] for record in records}
    best, teacher = max(values.values()), max(values["first"], values["beta"])
    for name, words in found.items():
        marked = "*" if values[name] == best else ""
        assert words[0] == f"{values[name]:.1f}{marked}"
        if words[1] == "teacher":
            assert len(words) == 2
        else:
            assert words[2] == f"{100 * (values[name] - teacher) / teacher:+.1f}%"
    assert "* best of its column; below a figure: relative gain over the best teacher" in out
    assert "knn (top-1 %): k-NN on the global token, k 20" in out
    assert out.endswith("written to results.json\n")
    assert (here / "feats" / "eval").is_dir()


def test_results_and_cache_go_where_they_are_told(here, data):
    ran("knn", "--encoder", "pixels", *data, "--results", "a/b.json", "--cache", "c")
    assert sorted(path.name for path in here.iterdir()) == ["a", "c"]
    assert json.loads((here / "a" / "b.json").read_text())["scores"]


def test_classification_tells_its_protocol(here, data):
    out = ran("classification", "--encoder", "pixels:16", *data, "--seed", "1")
    assert re.search(r"pixels-16 +\d+\.\d\*", out)
    assert "classification (top-1 %): linear, L-BFGS" in out
    (record,) = json.loads((here / "results.json").read_text())["scores"]
    assert record["seed"] == 1 and "mean_per_class" in record["details"]


@pytest.fixture
def project(here, tars, test_tar, encoders) -> Path:
    for run in ("unic", "basic"):
        student = write_encoder(here / "runs" / run / "student", seed=len(run))
        (student.parent / "heads.safetensors").write_bytes(b"")
    (here / "runs" / "unfinished").mkdir()
    (here / "unic.toml").write_text(
        f"""
        cache = "cache"
        recipe = "unic@{SIZE}"
        [teachers]
        first = "{encoders["alpha"]}"
        second = "{encoders["beta"]}"
        [tasks.boxes]
        train = "{tars[0].parent}/train-*.tar"
        test = "{test_tar}"
        classes = ["background", "red", "green", "blue"]
        """
    )
    return here


def test_a_bare_call_in_a_project(project):
    out = ran("segmentation", "--steps", "12", "--device", "cpu")
    assert list(rows(out)) == ["first", "second", "basic", "unic"]
    assert "12 steps (reduced from" in out
    records = json.loads((project / "results.json").read_text())["scores"]
    assert {record["encoder"]: record["role"] for record in records} == {
        **{"first": "teacher", "second": "teacher"},
        **{"basic": "student", "unic": "student"},
    }
    assert all(len(record["details"]["per_class_iou"]) == 4 for record in records)
    found = sorted(path.name for path in (project / "cache" / "eval").iterdir())
    assert found == [f"boxes-test-center@{SIZE}", f"boxes-train-center@{SIZE}"]


def test_without_steps_the_protocol_decides(project):
    out = ran("segmentation", "--encoder", "pixels", "--device", "cpu")
    assert "500 steps (reduced from" in out


def test_names_of_the_project_and_flags_beside_them(project, data):
    out = ran("knn", "--encoder", "second", "--encoder", "pixels", *data)
    assert list(rows(out)) == ["second", "pixels"]
    # The project's own data set now, in a cache folder of its own.
    ran("knn", "--encoder", "second", "--task", "boxes")
    found = sorted(path.name.split("-")[0] for path in (project / "cache" / "eval").iterdir())
    assert found == ["boxes", "boxes", "data", "data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "pets"], "unic.toml names no task 'pets'; it names boxes"),
        (["--train", "a.tar"], "--train and --test go together"),
        (["--test", "a.tar"], "--train and --test go together"),
    ],
)
def test_mistakes_in_a_project(project, arguments, message):
    with pytest.raises(ProjectError, match=re.escape(message)):
        CliRunner().invoke(app, ["knn", *arguments], catch_exceptions=False)


def test_several_tasks_must_be_chosen_from(project):
    toml = project / "unic.toml"
    toml.write_text(toml.read_text() + '[tasks.pets]\ntrain = "a.tar"\ntest = "b.tar"\n')
    with pytest.raises(ProjectError, match=r"which data\?.*it names boxes, pets"):
        CliRunner().invoke(app, ["knn"], catch_exceptions=False)


def test_a_results_file_that_is_something_else_is_left_alone(here, data):
    (here / "results.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"results\.json is not a results file"):
        ran("knn", "--encoder", "pixels", *data)
    assert (here / "results.json").read_text() == "[1, 2]"


@pytest.fixture(scope="module")
def calls(tars, test_tar, tmp_path_factory):
    """What each call said, all made in one empty folder."""
    folder = tmp_path_factory.mktemp("empty")
    (folder / "notes").mkdir()
    data = ["--train", str(tars[0]), "--test", str(test_tar), "--size", str(SIZE)]
    run = ["knn", "--encoder", "pixels", "--device", "cpu"]
    arguments = {
        "no data": run,
        "no encoders": ["knn", *data],
        "train alone": [*run, "--train", str(tars[0])],
        "task": [*run, "--task", "pets"],
        "unknown encoder": ["knn", "--encoder", "dinosaur", *data],
        "empty folder": ["knn", "--encoder", "notes", *data],
        "no such tar": [*run, "--train", "none-*.tar", "--test", str(test_tar)],
        "patches": ["segmentation", "--encoder", "pixels:7", *data],
        "size": [*run, *data, "--size", "8"],
        "batch": [*run, *data, "--batch-size", "0"],
        "twice": [*run, "--encoder", "pixels", *data],
        "usage": [*run, *data, "--tests", "x"],
        "command": ["depth"],
        "number": [*run, *data, "--seed", "one"],
        "zero steps": ["segmentation", "--steps", "0"],
        "knn steps": [*run, *data, "--steps", "3"],
        "help": ["knn", "--help"],
        "good": [*run, *data],
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
    return dict(zip(arguments, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("no data", 1, "error: which data? Give --train TARS --test TARS, or --task NAME"),
        ("no encoders", 1, "error: which encoders? Give --encoder"),
        ("train alone", 1, "error: --train and --test go together"),
        ("task", 1, "error: unic.toml names no task 'pets'; it names none"),
        ("unknown encoder", 1, "dinosaur"),
        ("empty folder", 1, "notes"),
        ("no such tar", 1, "none-*.tar"),
        ("patches", 1, "patches of 7 px do not tile views of 48 px"),
        ("size", 1, "a view of 8 px is too small"),
        ("batch", 1, "--batch-size must be at least 1, found 0"),
        ("twice", 1, "error: pixels is given twice"),
        ("usage", 2, "No such option"),
        ("command", 2, "No such command"),
        ("number", 2, "Invalid value for"),
        ("zero steps", 2, "Invalid value for"),
        ("knn steps", 2, "No such option"),
    ],
)
def test_exit_codes_and_messages(calls, call, code, message):
    found, out, err = calls[call]
    assert found == code, err
    assert message in err
    assert out == "" and "Traceback" not in err
    assert code == 2 or (err.startswith("error: ") and err.count("\n") == 1)


def test_good_calls_exit_with_0(calls):
    assert calls["help"][0] == 0 and "--encoder" in calls["help"][1]
    code, out, _ = calls["good"]
    assert code == 0 and "written to results.json" in out
