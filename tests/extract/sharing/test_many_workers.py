"""Several real processes filling one cache: shares, claims, lost workers, launchers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SIZE, write_encoder, write_tar

from extract.cache.errors import UserError
from extract.sharing.claim_store import FOLDER, ClaimFiles
from extract.sharing.claims import Claims, machine
from extract.sharing.workers import worker

LABEL = f"unic@{SIZE}"


def command(cache: Path, data: str, encoder: Path, *more: str) -> list[str]:
    extract = Path(sys.executable).with_name("unic-extract")
    options = ["--views", "2", "--recipe", LABEL, "--device", "cpu", "--batch-size", "4"]
    names = ["--teacher", f"alpha={encoder}", "--data", data, "--cache", str(cache)]
    return [str(extract), *names, *options, *more]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for success; returns what was printed to stdout."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six small tars, an encoder, and the tree that one undisturbed process makes of them."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(6):
        write_tar(folder / f"train-{i:06d}.tar", 5, seed=i)
    encoder = write_encoder(folder / "alpha", 0)
    data = str(folder / "train-{000000..000005}.tar")
    finish(start(command(folder / "alone", data, encoder)))
    return {"folder": folder, "data": data, "encoder": encoder, "tree": tree(folder / "alone")}


def test_four_processes_make_the_tree_of_one(work: dict[str, Any]) -> None:
    cache = work["folder"] / "four"
    arguments = command(cache, work["data"], work["encoder"])
    running = [start(arguments, RANK=str(i), WORLD_SIZE="4") for i in range(4)]
    texts = [finish(process) for process in running]
    assert tree(cache) == work["tree"]
    computed = [int(out.split(" computed now")[0].split()[-1]) for out in texts if " now" in out]
    # Claims: every row was computed once.
    assert sum(computed) == 6 * 5 * 2


def test_two_processes_on_the_same_share_lose_nothing(work: dict[str, Any]) -> None:
    cache = work["folder"] / "same"
    arguments = command(cache, work["data"], work["encoder"])
    for process in [start(arguments) for _ in range(2)]:
        finish(process)
    assert tree(cache) == work["tree"]


def test_a_killed_worker_s_tar_is_taken_over(work: dict[str, Any]) -> None:
    cache = work["folder"] / "lost"
    arguments = command(cache, work["data"], work["encoder"])
    lost = start([*arguments, "--shard-index", "0", "--num-shards", "2"])
    while not (cache / FOLDER).exists() or not list((cache / FOLDER).glob("train-*")):
        assert lost.poll() is None
        time.sleep(0.005)
    lost.send_signal(signal.SIGKILL)
    lost.communicate(timeout=20)
    finish(start([*arguments, "--shard-index", "1", "--num-shards", "2"]))
    assert tree(cache) == work["tree"] and not (cache / FOLDER).exists()


def test_a_terminated_worker_leaves_nothing_half_done(work: dict[str, Any]) -> None:
    cache = work["folder"] / "terminated"
    arguments = command(cache, work["data"], work["encoder"])
    process = start(arguments)
    while not list(cache.glob(f"alpha/{LABEL}/0/*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode in (143, 0)
    left = tree(cache)
    assert not [name for name in left if name.startswith(".")]
    assert left.items() <= work["tree"].items()
    finish(start(arguments))
    assert tree(cache) == work["tree"]


def test_a_claim_is_exclusive_until_released_or_its_owner_is_gone(tmp_path: Path) -> None:
    with Claims(ClaimFiles(tmp_path), "a") as mine, Claims(ClaimFiles(tmp_path), "a") as other:
        assert mine.take("000000") and not other.take("000000")
        mine.release("000000")
        assert other.take("000000")
    assert not (tmp_path / FOLDER).exists()
    with Claims(ClaimFiles(tmp_path), "a") as mine, Claims(ClaimFiles(tmp_path), "b") as different:
        assert mine.take("000000") and different.take("000000")


@pytest.mark.parametrize(
    ("here", "age", "taken"), [(True, 0, True), (False, 0, False), (False, 200, True)]
)
def test_a_dead_owner_s_claim_is_taken(tmp_path: Path, here: bool, age: float, taken: bool) -> None:
    """On this machine at once; elsewhere only when it has not been touched for the lease."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with Claims(ClaimFiles(tmp_path), "a", lease=100) as owner:
        assert owner.take("000000")
        (path,) = (tmp_path / FOLDER).glob("000000.*")
        content = {"machine": machine() if here else "elsewhere", "process": ended.pid}
        path.write_text(json.dumps(content))
        os.utime(path, (time.time() - age,) * 2)
        with Claims(ClaimFiles(tmp_path), "a", lease=100) as other:
            assert other.take("000000") == taken


def test_a_living_claim_is_kept_fresh(tmp_path: Path) -> None:
    with Claims(ClaimFiles(tmp_path), "a", lease=0.3) as mine:
        assert mine.take("000000")
        (path,) = (tmp_path / FOLDER).glob("000000.*")
        path.write_text(json.dumps({"machine": "elsewhere", "process": 1}))
        time.sleep(0.8)
        with Claims(ClaimFiles(tmp_path), "a", lease=0.3) as other:
            assert not other.take("000000")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
        (
            {
                **{"SLURM_ARRAY_TASK_ID": "13", "SLURM_ARRAY_TASK_MIN": "10"},
                **{"SLURM_ARRAY_TASK_COUNT": "5"},
            },
            (3, 5),
        ),
        (
            {
                **{"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_ARRAY_TASK_ID": "4"},
                **{"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "3"},
                **{"SLURM_ARRAY_TASK_STEP": "2"},
            },
            (5, 6),
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "7", "SLURM_NTASKS": "8"},
            (0, 2),
        ),
    ],
)
def test_launchers_say_which_share(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert worker(environment) == expected


def test_a_launcher_that_talks_nonsense_is_named() -> None:
    with pytest.raises(UserError, match="RANK='x', expected a number"):
        worker({"RANK": "x", "WORLD_SIZE": "2"})
