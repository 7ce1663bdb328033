"""`unic-extract` as a user meets it: exit codes, one line naming the fault, nothing half done."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import SIZE
from typer.testing import CliRunner

from extract.cache import Cache, select
from extract.cache.images import index_tar
from extract.cli import app, main

COMMON = ["--recipe", f"unic@{SIZE}", "--views", "1", "--device", "cpu", "--workers", "2"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut can tell; extraction of small units is otherwise four fifths waiting."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@dataclass
class Said:
    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Command]:
    """Runs the entry point itself in an empty folder: what it exits with and prints."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["unic-extract", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return Said(int(left.value.code or 0), captured.out, captured.err)

    yield run
    signal.signal(signal.SIGTERM, before)


def assert_refused(said: Said, *names: str) -> None:
    assert said.code == 1, said
    (line,) = said.err.strip().splitlines()
    assert line.startswith("error: ") and all(name in line for name in names), line
    assert said.out == ""


def leftovers(cache: Path, stem: str) -> list[Path]:
    """Staging folders, groups and manifests of that tar: nothing of a refused one may be there."""
    return [
        *cache.glob(".staging-*"),
        *cache.rglob(f"{stem}.zarr"),
        *cache.glob(f"*/*/*/{stem}.json"),
    ]


def test_a_run_says_what_it_made_and_a_second_one_that_it_is_there(
    command: Command, tars: list[Path], encoders: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ["--data", *(str(tars[1]),), "--cache", "feats", *COMMON]
    teachers = [f"--teacher=a={encoders['alpha']}", f"--teacher={encoders['beta']}"]
    first = command(*arguments, *teachers)
    assert first.code == 0
    lines = first.out.splitlines()
    assert lines[0].startswith("feats/a: 21 rows (21 images x 1 views), 21 computed now; cls [32]")
    assert lines[1].startswith("feats/beta: 21 rows") and len(lines) == 2
    assert "extract: 42/42 views" in first.err
    assert select(Cache(tmp_path / "feats")).encoders == ("a", "beta")
    assert "all there already" in command(*arguments, *teachers).out


def test_a_project_file_gives_what_flags_leave_out(
    command: Command, tars: list[Path], encoders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "unic.toml").write_text(
        f'data = "{tars[1]}"\ncache = "feats"\nrecipe = "unic@{SIZE}"\nviews = 2\nseed = 4\n'
        f'[teachers]\nmine = "{encoders["alpha"]}"\n'
    )
    assert command("--teacher", "mine", "--device", "cpu").code == 0
    cache = Cache(tmp_path / "feats")
    assert (cache.record.seed, select(cache).views, cache.encoders()) == (4, (0, 1), ["mine"])
    (tmp_path / "unic.toml").write_text("teacher = 1\n")
    assert_refused(command("--teacher", "mine"), "unic.toml", "unknown entries teacher")


def test_wrong_usage_exits_with_2(command: Command) -> None:
    for arguments in (
        ["--teacher", "dino", "--tracher", "x"],
        [],
        ["--teacher", "dino", "--views", "x"],
    ):
        said = command(*arguments)
        assert said.code == 2 and "Usage:" in said.err
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0


def test_what_is_missing_unknown_or_senseless_is_named(
    command: Command, tars: list[Path], encoders: dict[str, Path], tmp_path: Path
) -> None:
    teacher = f"--teacher=a={encoders['alpha']}"
    data = ["--data", str(tars[1])]
    assert_refused(command(teacher, "--cache", "feats"), "missing --data")
    assert_refused(command(teacher, *data), "missing --cache")
    given = [*data, "--cache", "feats"]
    assert_refused(command(teacher, *given, "--views", "0"), "--views must be at least 1, found 0")
    assert_refused(command(teacher, *given, "--recipe", "unik@48"), "no recipe 'unik@48'")
    assert_refused(command(teacher, *given, "--device", "tpu9"), "--device 'tpu9'")
    assert_refused(command("--teacher", "dyno", *given, *COMMON), "dyno", "dino")
    assert_refused(command(teacher, "--data", "no-*.tar", "--cache", "feats", *COMMON), "no-*.tar")
    (tmp_path / "empty").mkdir()
    nothing = command(teacher, "--data", "empty", "--cache", "feats", *COMMON)
    assert_refused(nothing, "the folder empty holds no .tar files")
    assert not leftovers(tmp_path / "feats", tars[1].stem)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_named(
    command: Command, tars: list[Path], encoders: dict[str, Path]
) -> None:
    arguments = ["--data", tars[1], "--cache", "feats", *COMMON, "--device", "cuda"]
    assert_refused(command(f"--teacher=a={encoders['alpha']}", *arguments), "cuda")


def test_a_corrupt_picture_is_named_and_earlier_tars_stay(
    command: Command, tars: list[Path], encoders: dict[str, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "zz.tar"
    content = bytearray(tars[0].read_bytes())
    member = index_tar(tars[0]).samples[5].members["jpg"]
    content[member.offset : member.offset + member.size] = bytes(member.size)
    bad.write_bytes(content)
    arguments = ["--data", tars[1], "--data", bad, "--cache", "feats", *COMMON]
    said = command(f"--teacher=a={encoders['alpha']}", *arguments)
    assert said.code == 1
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "zz.tar:train-000000_0005" in line and "remove or replace" in line
    assert not leftovers(tmp_path / "feats", "zz")
    cache = Cache(tmp_path / "feats")
    assert (
        cache.units("a", f"unic@{SIZE}")
        == {(0, tars[1].stem)}
        == cache.units("views", f"unic@{SIZE}")
    )


@pytest.mark.parametrize("at_member", [False, True])
def test_a_cut_tar_is_named(
    command: Command, tars: list[Path], encoders: dict[str, Path], tmp_path: Path, at_member: bool
) -> None:
    cut = tmp_path / "cut.tar"
    sample = index_tar(tars[0]).samples[20]
    first = min(sample.members.values(), key=lambda member: member.offset)
    # 512 bytes before the first member's data its header begins.
    cut.write_bytes(tars[0].read_bytes()[: first.offset - 512 if at_member else first.offset + 99])
    arguments = ["--data", tars[1], "--data", cut, "--cache", "feats", *COMMON]
    assert_refused(command(f"--teacher=a={encoders['alpha']}", *arguments), "cut.tar")
    assert not leftovers(tmp_path / "feats", "cut")
    assert not (tmp_path / "feats" / "tars" / "cut.json").exists()


def test_weights_that_do_not_fit_are_named(
    command: Command, tars: list[Path], encoders: dict[str, Path], tmp_path: Path
) -> None:
    weights = encoders["wide"] / "model.safetensors"
    arguments = ["--data", tars[1], "--cache", "feats", *COMMON, "--weights", weights]
    said = command(f"--teacher=a={encoders['alpha']}", *arguments)
    assert_refused(said, str(weights))
    assert not (tmp_path / "feats" / "a").exists()
    assert not leftovers(tmp_path / "feats", tars[1].stem)
    two = [f"--teacher=a={encoders['alpha']}", f"--teacher=b={encoders['beta']}"]
    assert_refused(command(*two, *arguments), "--weights goes with exactly one --teacher")


def test_the_command_itself_exits_with_1_and_a_red_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from extract.cli import main; main()", "--teacher", "dino"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2]), "FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "\x1b[1;31merror: missing --data" in done.stderr and "Traceback" not in done.stderr
