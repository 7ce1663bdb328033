"""SIGKILL at durable operations of an extraction, then a second run: the same tree, bit for bit.

A driver process (this file as a script) imports everything once and forks: each child extracts
into a folder of its own and kills itself at its n-th fsync, rename or mkdir, before or after it;
another child runs the same extraction again. Renames and mkdirs are the real ones; fsync is counted
but waits for no disk, which a killed process (unlike a power cut) cannot tell from the real one.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
# Every publishing rename is swept, and every n-th other operation; 1 takes minutes and all of them.
STRIDE = int(os.environ.get("KILL_SWEEP_STRIDE", "61"))
OPERATIONS = ("fsync", "rename", "replace", "link", "mkdir")


def tree(root: Path) -> dict[str, str]:
    """Every folder and file below `root` by relative name; files with their sha256."""
    return {
        path.relative_to(root).as_posix(): "folder"
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
    }


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names that are on one side only, or differ."""
    names = expected.keys() | found.keys()
    return sorted(name for name in names if expected.get(name) != found.get(name))


# --- the driver ---


def run_extraction(cache: Path, tars: list[str], teacher: str) -> None:
    import torch

    from extract.config import ExtractConfig
    from extract.run import extract

    torch.set_num_threads(1)
    config = ExtractConfig(
        data=tuple(tars),
        cache=cache,
        teachers=(f"alpha={teacher}",),
        recipe="center@32",
        views=2,
        batch_size=2,
        workers=1,
        device="cpu",
    )
    extract(config)


def in_child(work: Callable[[], None]) -> int:
    """Status of a forked child that does `work`: 0, 1 after an exception, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            work()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def without_waiting(work: Callable[[], None]) -> Callable[[], None]:
    """`work` with an fsync that returns at once: the page cache outlives a killed process."""

    def swift() -> None:
        os.fsync = lambda handle: None
        work()

    return swift


def intercept(call: Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]) -> None:
    """Pass every durable operation of this process through `call(name, arguments, perform)`."""

    def wrapped(name: str, original: Any) -> Any:
        return lambda *args, **kw: call(name, args, lambda: original(*args, **kw))

    for name in OPERATIONS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def count_operations(work: Callable[[], None], log: Path) -> list[tuple[str, bool]]:
    """(operation, whether it publishes) of an undisturbed run, in order."""

    def counted() -> None:
        calls: list[tuple[str, bool]] = []

        def call(name: str, args: tuple[Any, ...], perform: Callable[[], Any]) -> Any:
            moves = name in ("rename", "replace", "link")
            calls.append((name, moves and ".staging-" not in os.fspath(args[1])))
            return perform()

        intercept(call)
        work()
        log.write_text(json.dumps(calls))

    assert in_child(without_waiting(counted)) == 0
    return [(name, publishes) for name, publishes in json.loads(log.read_text())]


def killed_at(work: Callable[[], None], number: int, after: bool) -> Callable[[], None]:
    def doomed() -> None:
        calls = itertools.count(1)

        def call(name: str, args: tuple[Any, ...], perform: Callable[[], Any]) -> Any:
            last = next(calls) == number
            try:
                return None if last and not after else perform()
            finally:
                # Also where a mkdir found its folder there already.
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)

        intercept(call)
        work()

    return doomed


def sweep(folder: Path, tars: list[str], teacher: str) -> dict[str, Any]:
    """Kill at every publishing rename (before and after) and every STRIDE-th other operation."""

    def work(name: str) -> Callable[[], None]:
        return lambda: run_extraction(folder / name, tars, teacher)

    assert in_child(work("undisturbed")) == 0
    expected = tree(folder / "undisturbed")
    operations = count_operations(work("counted"), folder / "operations.json")
    assert not differences(expected, tree(folder / "counted"))
    renames = [n for n, (_, publishes) in enumerate(operations, 1) if publishes]
    others = [n for n in range(1, len(operations) + 1, STRIDE) if n not in renames]
    # Just before a rename is where the operation before it left off; both sides all the same.
    points = [(n, after) for n in renames for after in (False, True)]
    points += [(n, n % 2 == 0) for n in others]
    faults, partial = [], 0
    for number, after in points:
        name = f"{number}-{'after' if after else 'before'}"
        status = in_child(without_waiting(killed_at(work(name), number, after)))
        left = tree(folder / name) if (folder / name).exists() else {}
        partial += bool(differences(expected, left))
        again = in_child(without_waiting(work(name)))
        wrong = differences(expected, tree(folder / name))
        if status != -signal.SIGKILL or again != 0 or wrong:
            faults.append([name, operations[number - 1][0], status, again, wrong[:5]])
    return {
        "operations": len(operations),
        "renames": len(renames),
        "points": len(points),
        "partial": partial,
        "names": list(expected),
        "faults": faults,
    }


def drive(arguments: dict[str, Any]) -> None:
    """Import all that the children need, once, and write what the sweep found."""
    import extract.run  # noqa: F401

    result = sweep(Path(arguments["folder"]), arguments["tars"], arguments["teacher"])
    Path(arguments["result"]).write_text(json.dumps(result))


# --- the tests ---


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from conftest import write_encoder, write_tar

    folder = tmp_path_factory.mktemp("sweep")
    tars = [write_tar(folder / f"train-{i:06d}.tar", n, seed=i) for i, n in enumerate((3, 2))]
    teacher = write_encoder(folder / "alpha", 0, img_size=32, depth=1)
    arguments = {
        "folder": str(folder),
        "tars": list(map(str, tars)),
        "teacher": str(teacher),
        "result": str(folder / "result.json"),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", __file__, json.dumps(arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300 if STRIDE > 1 else 3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_a_killed_and_repeated_run_gives_the_tree_of_an_undisturbed_one(
    swept: dict[str, Any],
) -> None:
    assert swept["faults"] == []


def test_the_sweep_reaches_every_file_that_is_published(swept: dict[str, Any]) -> None:
    # cache, 2 tars, teacher, codec; 2 tars x 2 views x (views, alpha) as a group and a manifest.
    assert swept["renames"] == 1 + 2 + 1 + 1 + 8 * 2
    assert swept["points"] >= 2 * swept["renames"] + swept["operations"] // STRIDE - 21
    # Nearly all kills left a tree that the second run had to mend.
    assert swept["partial"] >= swept["points"] - 2
    assert not [name for name in swept["names"] if ".staging" in name or name.endswith(".tmp")]


def test_a_changed_a_missing_and_a_left_over_file_would_be_seen(tmp_path: Path) -> None:
    for name in ("a/one", "two"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345678")
    whole = tree(tmp_path)
    (tmp_path / "two").write_bytes(b"12345679")
    assert differences(whole, tree(tmp_path)) == ["two"]
    (tmp_path / "two").unlink()
    (tmp_path / ".staging-1").mkdir()
    assert differences(whole, tree(tmp_path)) == [".staging-1", "two"]


if __name__ == "__main__":
    drive(json.loads(sys.argv[1]))
