"""A full disk and a disk that cannot be written: one clear line, nothing damaged, and on it goes.

A driver process (this file as a script) imports everything once and forks: each child runs the
command `unic-extract` where a file may not grow beyond a limit, or in a small tmpfs of its own, and
runs it again once there is room. The driver has a mount namespace of its own; where the machine
allows none, the tests that need one are skipped.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_kill_sweep import differences, tree

REPOSITORY = Path(__file__).parents[2]
# Every n-th limit and size; 1 takes many minutes and all of them.
STRIDE = int(os.environ.get("DISK_SWEEP_STRIDE", "19"))
PAGE = 4096


# --- the driver ---


def unic_extract(cache: Path, arguments: dict[str, str]) -> None:
    from extract.cli import main

    os.fsync = lambda handle: None
    options = {"--recipe": "center@32", "--views": "2", "--device": "cpu", "--workers": "1"}
    options |= {"--data": arguments["data"], "--teacher": f"alpha={arguments['teacher']}"}
    sys.argv = [
        "unic-extract",
        "--cache",
        str(cache),
        *(w for item in options.items() for w in item),
    ]
    main()


def in_child(work: Callable[[], None]) -> tuple[int, str]:
    """Exit code of a forked child that does `work`, and what it wrote to stderr."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.close(reading)
        try:
            work()
        except SystemExit as leaving:
            os._exit(int(leaving.code or 0))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(99)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def tried(
    cache: Path,
    arguments: dict[str, str],
    expected: dict[str, str],
    cramp: Callable[[], None],
    relieve: Callable[[], None],
) -> list[Any]:
    """[exit code, what it said, what is wrong on disk, exit code and faults of the next run]."""

    def cramped() -> None:
        cramp()
        unic_extract(cache, arguments)

    code, said = in_child(cramped)
    left = tree(cache) if cache.exists() else {}
    wrong = [name for name in left if expected.get(name) != left[name]]
    relieve()
    again, later = in_child(lambda: unic_extract(cache, arguments))
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if len(lines) == 1 and "Traceback" not in said:
        said = lines[0]
    return [code, said, wrong, again, later if again else differences(expected, tree(cache))]


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def file_sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


def sweep_file_sizes(whole: Path, arguments: dict[str, str]) -> dict[str, Any]:
    """For every size of a stored file: a limit by which that file cannot be written."""
    expected, found = tree(whole), {}
    limits = sorted({size - 1 for size in file_sizes(whole)})
    for limit in [*limits[: -1 : max(1, STRIDE // 3)], limits[-1]]:
        cache = whole.parent / f"limit-{limit}"
        found[limit] = tried(
            cache, arguments, expected, lambda limit=limit: limit_file_size(limit), lambda: None
        )
    return found


def sweep_small_disks(whole: Path, arguments: dict[str, str]) -> dict[str, Any]:
    """A tmpfs of too few pages, from one page on; and of too few inodes."""
    expected, found = tree(whole), {}
    pages = sum(-(-size // PAGE) for size in file_sizes(whole))
    sizes = [f"size={number * PAGE}" for number in range(1, pages, 7 * STRIDE)]
    # At first not even a folder can be made, then not the first file, then not the next folder.
    few = sorted({1, 2, 3, *range(4, len(expected), 4 * STRIDE)})
    inodes = [f"nr_inodes={number}" for number in few]
    for option in sizes + inodes:
        cache = whole.parent / option
        cache.mkdir()
        mount("-t", "tmpfs", "-o", option, "tmpfs", cache)
        roomy = lambda cache=cache: mount("-o", "remount,size=1g,nr_inodes=100000", cache)  # noqa: E731
        found[option] = tried(cache, arguments, expected, lambda: None, roomy)
        subprocess.run(["umount", str(cache)], check=True)
    return found


def read_from_a_read_only_disk(cache: Path, arguments: dict[str, str]) -> dict[str, Any]:
    """One epoch of training batches from a cache on a read-only mount, and the command there."""
    from distill.batches import TrainingBatches

    folder = cache.parent
    before = tree(folder)
    mount("--bind", folder, folder)
    mount("-o", "remount,ro,bind", folder)
    refused = False
    try:
        (cache / "probe").write_text("x")
    except OSError:
        refused = True
    seen: list[int] = []
    batches = TrainingBatches(cache, batch_size=2, seed=0)
    for batch in batches.iterate(0, batches.steps_per_epoch, 2):
        seen += batch["index"].tolist()
    code, said = in_child(lambda: unic_extract(cache, arguments | {"teacher": arguments["other"]}))
    after = tree(folder)
    return {
        "refused": refused,
        "rows": sorted(index // 2 for index in seen),
        "changed": differences(before, after),
        "code": code,
        "said": said,
    }


def drive(arguments: dict[str, str]) -> None:
    """Import all that the children need, once, and write what was found."""
    import extract.run  # noqa: F401

    whole = Path(arguments["folder"]) / "undisturbed"
    assert in_child(lambda: unic_extract(whole, arguments))[0] == 0
    found = {"limits": sweep_file_sizes(whole, arguments)}
    if arguments["mounts"]:
        found["disks"] = sweep_small_disks(whole, arguments)
        found["read-only"] = read_from_a_read_only_disk(whole, arguments)
    Path(arguments["result"]).write_text(json.dumps(found))


# --- the tests ---


def may_mount() -> bool:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


MOUNTS = may_mount()
needs_mounts = pytest.mark.skipif(not MOUNTS, reason="needs a mount namespace of its own")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver found with a folder of pictures, which are packed too, and two encoders."""
    from conftest import write_encoder

    folder = tmp_path_factory.mktemp("disk")
    rng = np.random.default_rng(0)
    for number in range(5):
        path = folder / "data" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    (folder / "work").mkdir()
    arguments = {
        "data": str(folder / "data"),
        "teacher": str(write_encoder(folder / "alpha", 0, img_size=32, depth=1)),
        "other": str(write_encoder(folder / "other", 1, img_size=32, depth=1)),
        "folder": str(folder / "work"),
        "result": str(folder / "result.json"),
        "mounts": "yes" if MOUNTS else "",
    }
    done = subprocess.run(
        [
            *(["unshare", "-rm"] if MOUNTS else []),
            *(sys.executable, "-W", "ignore", __file__, json.dumps(arguments)),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def assert_survived(found: dict[str, Any], reason: str) -> None:
    """Each attempt failed in one line that says where and what to do; the next one went through."""
    assert len(found) > 2
    for point, (code, said, wrong, again, later) in found.items():
        assert code == 1 and said.startswith("error: "), (point, code, said)
        assert reason in said and "/work/" in said and "make room" in said, (point, said)
        assert not wrong, (point, wrong)
        assert (again, later) == (0, []), (point, again, later)


def test_a_file_that_may_not_grow_is_one_line_and_the_next_run_completes(
    found: dict[str, Any],
) -> None:
    assert_survived(found["limits"], "File too large")


@needs_mounts
def test_a_full_disk_is_one_line_and_the_next_run_completes(found: dict[str, Any]) -> None:
    assert_survived(found["disks"], "No space left on device")


@needs_mounts
def test_training_reads_a_read_only_cache_and_leaves_it_as_it_is(found: dict[str, Any]) -> None:
    result = found["read-only"]
    assert result["refused"], "the mount is not read-only, so this test shows nothing"
    # Five images, two a batch: one waits for another epoch.
    assert len(set(result["rows"])) == 4 and set(result["rows"]) <= set(range(5))
    assert result["changed"] == []
    assert result["code"] == 1 and "cannot write to the cache" in result["said"]
    assert "Traceback" not in result["said"]


if __name__ == "__main__":
    drive(json.loads(sys.argv[1]))
