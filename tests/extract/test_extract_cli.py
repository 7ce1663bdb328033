"""`unic-extract` as a user meets it: exit codes, one line naming the fault, nothing half done."""

import json
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
    said = command(f"--teacher=a={encoders['alpha']}", *arguments)
    assert said.code == 1 and said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "cut.tar" in line
    assert Cache(tmp_path / "feats").units("a", f"unic@{SIZE}") == {(0, tars[1].stem)}
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


@pytest.fixture
def made(command: Command, tars: list[Path], encoders: dict[str, Path], tmp_path: Path) -> Path:
    """A project folder with a cache of `mine` over one tar."""
    (tmp_path / "unic.toml").write_text(
        f'data = "{tars[1]}"\ncache = "feats"\nrecipe = "unic@{SIZE}"\nviews = 1\n'
        f'[teachers]\nmine = "{encoders["alpha"]}"\n'
    )
    assert command("--teacher", "mine", "--device", "cpu").code == 0
    return tmp_path / "feats"


def test_in_a_project_every_subcommand_finds_what_it_needs(command: Command, made: Path) -> None:
    info = command("info")
    assert info.code == 0 and "complete" in info.out and "INCOMPLETE" not in info.out
    verify = command("verify", "--device", "cpu")
    assert verify.code == 0 and f"{made.name}: intact" in verify.out
    plan = command("plan", "--teacher", "mine", "--device", "cpu", "--views", "3")
    assert plan.code == 0 and "21 images in 1 tars, 3 views" in plan.out and "it fits" in plan.out


def test_verify_exits_with_1_and_a_red_line_for_every_fault(command: Command, made: Path) -> None:
    damaged = [
        next(made.glob("mine/*/0/*.zarr/patches/c/0/0/0")),
        next(made.glob("views/*/0/*.zarr/crop_top/c/0")),
    ]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    said = command("verify", "--rows", "0")
    assert said.code == 1 and "intact" not in said.out
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert all(any(str(path.name) in line for line in lines) for path in damaged)


def test_bounds_and_rows_of_verify_can_be_chosen(command: Command, made: Path) -> None:
    said = command("verify", "--device", "cpu", "--rows", "3", "--min-cosine", "1.5")
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.code == 1 and len(lines) == 6 and "expected 1.5 or more" in lines[0]
    assert command("verify", "--rows", "-1").code == 2
    unnamed = command("verify", "--teacher", "somewhere")
    assert unnamed.code == 1 and "--teacher NAME=somewhere" in unnamed.err


def test_info_of_an_incomplete_cache_exits_with_0(command: Command, made: Path) -> None:
    next(made.glob("mine/*/0/*.json")).unlink()
    said = command("info", "--cache", made)
    assert said.code == 0 and "INCOMPLETE" in said.out
    content = json.loads(command("info", "--json").out)
    assert content["complete"] is False and content["leftovers"]
    assert_refused(command("info", "--cache", "nowhere"), "nowhere is not a feature cache")


def test_a_dry_run_is_the_plan_and_writes_nothing(
    command: Command, tars: list[Path], encoders: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [f"--teacher=a={encoders['alpha']}", "--data", tars[1], "--cache", "feats", *COMMON]
    dry = command(*arguments, "--dry-run", "--store-views", "--codec", "int8")
    assert dry.code == 0 and "21 images in 1 tars" in dry.out and "views and raw" in dry.out
    assert not (tmp_path / "feats").exists()
    content = json.loads(command("plan", *arguments, "--json").out)
    assert content["images"] == 21 and content["fits"] is True
    assert not (tmp_path / "feats").exists()


def test_a_plan_that_does_not_fit_exits_with_1(
    command: Command, tars: list[Path], tmp_path: Path
) -> None:
    """26 TB for 21 images: tokens that are pixels, of very many large views."""
    arguments = ["--teacher", "pixels", "--data", tars[1], "--cache", "feats", "--device", "cpu"]
    many = ["--recipe", "center@1024", "--views", "200000", "--batch-size", "1", "--images", "2"]
    said = command("plan", *arguments, *many)
    assert said.code == 1 and "IT DOES NOT FIT" in said.out
    (line,) = said.err.splitlines()
    assert line.startswith("error: the disk of feats is too small") and "26." in line
    assert not (tmp_path / "feats").exists()


def test_store_views_needs_no_value(
    command: Command, tars: list[Path], encoders: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [f"--teacher=a={encoders['alpha']}", "--data", tars[1], *COMMON]
    for name, option in {"bare": [], "raw": ["raw"], "jpeg": ["jpeg"]}.items():
        said = command(*arguments, "--cache", name, "--store-views", *option)
        assert said.code == 0, said
        array = "jpeg" if name == "jpeg" else "pixels"
        assert list((tmp_path / name).glob(f"views/*/0/*.zarr/{array}"))
    wrong = command(*arguments, "--cache", "x", "--store-views", "png")
    assert_refused(wrong, "--store-views 'png' is unknown", "raw, jpeg")


def test_converted_features_are_verified_too(command: Command, made: Path) -> None:
    said = command("convert", "--codec", "int8", "--to", "small")
    assert said.code == 0 and "fp16 to int8" in said.out
    verify = command("verify", "--cache", "small", "--device", "cpu")
    assert verify.code == 0 and "small: intact" in verify.out, verify


def test_a_launcher_gives_every_process_its_share(
    command: Command,
    tars: list[Path],
    encoders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = ["--data", tars[0], "--data", tars[1]]
    arguments = [f"--teacher=a={encoders['alpha']}", *data, "--cache", "feats", *COMMON]
    said = command(*arguments, "--shard-index", "2")
    assert_refused(said, "--shard-index must be from 0 to 1")
    assert_refused(command(*arguments, "--num-shards", "1", "--shard-index", "1"), "from 0 to 0")
    monkeypatch.setenv("RANK", "two")
    assert_refused(command(*arguments), "RANK='two'")


def test_options_in_front_of_a_subcommand_are_refused(command: Command, made: Path) -> None:
    said = command("--cache", made, "info")
    assert said.code == 2 and "--cache belongs behind the command" in " ".join(said.err.split())


@pytest.mark.parametrize("name", ["plan", "info", "verify", "convert"])
def test_every_subcommand_explains_itself(name: str) -> None:
    said = CliRunner().invoke(app, [name, "--help"])
    assert said.exit_code == 0 and "--cache" in said.output
    assert name in CliRunner().invoke(app, ["--help"]).output
