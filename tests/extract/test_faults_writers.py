"""Several processes that extract the same thing at once: no row lost, one manifest a unit."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from test_kill_sweep import differences, run_extraction, tree

from extract.cache.staging import PREFIX, Staging

REPOSITORY = Path(__file__).parents[2]
WRITERS = 4
ROUNDS = int(os.environ.get("WRITER_ROUNDS", "4"))


# --- the driver: this file as a script ---


def started_together(cache: Path, arguments: dict[str, Any]) -> list[int]:
    """Exit codes of processes that extract into `cache` from the same moment on."""
    waiting, go = os.pipe()
    children = []
    for _ in range(WRITERS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(go)
                os.read(waiting, 1)
                run_extraction(cache, arguments["tars"], arguments["teacher"])
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    os.close(waiting)
    # The end of the pipe is what all are waiting for.
    os.close(go)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def drive(arguments: dict[str, Any]) -> None:
    import extract.run

    os.fsync = lambda handle: None
    # Those who find a tar taken look again at once: the tighter, the more they meet.
    extract.run.WAIT_SECONDS = 0.01
    folder = Path(arguments["folder"])
    run_extraction(folder / "alone", arguments["tars"], arguments["teacher"])
    expected, found = tree(folder / "alone"), []
    polite = extract.run.Claims.take
    for number in range(ROUNDS):
        # In every other round nobody heeds a claim: all make all units, and the first one counts.
        extract.run.Claims.take = polite if number % 2 else lambda self, stem: True
        cache = folder / f"round-{number}"
        codes = started_together(cache, arguments)
        found.append([codes, differences(expected, tree(cache))])
    Path(arguments["result"]).write_text(json.dumps({"names": list(expected), "rounds": found}))


# --- the tests ---


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from conftest import write_encoder, write_tar

    folder = tmp_path_factory.mktemp("writers")
    arguments = {
        "folder": str(folder),
        "tars": [
            str(write_tar(folder / f"train-{i:06d}.tar", n, seed=i)) for i, n in enumerate((3, 2))
        ],
        "teacher": str(write_encoder(folder / "alpha", 0, img_size=32, depth=1)),
        "result": str(folder / "result.json"),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", __file__, json.dumps(arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    result["stderr"] = done.stderr
    return result


def test_writers_at_once_leave_the_tree_of_one_alone(driven: dict[str, Any]) -> None:
    assert len(driven["rounds"]) == ROUNDS
    for codes, wrong in driven["rounds"]:
        assert codes == [0] * WRITERS, driven["stderr"][-3000:]
        assert wrong == []


def test_the_tree_has_one_manifest_a_unit_and_nothing_left_over(driven: dict[str, Any]) -> None:
    names = driven["names"]
    # 2 tars x 2 views x (views, alpha): a manifest and a group each.
    assert len([n for n in names if n.count("/") == 3 and n.endswith(".json")]) == 8
    assert len([n for n in names if n.endswith(".zarr")]) == 8
    assert not [name for name in names if name.startswith(".")]


def test_a_staging_folder_that_was_taken_for_abandoned_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that starts removes it between its making and its lock."""
    real_open, removed = os.open, []

    def open_(path: Any, *args: Any, **kw: Any) -> int:
        if PREFIX in str(path) and not removed:
            removed.append(path)
            os.rmdir(path)
        return real_open(path, *args, **kw)

    monkeypatch.setattr(os, "open", open_)
    with Staging(tmp_path) as staging:
        assert removed and staging.folder.exists() and staging.folder != removed[0]
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    drive(json.loads(sys.argv[1]))
