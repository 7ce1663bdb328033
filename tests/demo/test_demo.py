"""The demo as its users run it: the teachers that come with it, the bar, a second run, mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from console.project import read_project
from demo.run import DemoConfig, DemoError, demo, evaluation, prepare, teachers
from demo.scoring import TASKS, score, second_process
from distill.cli import app as distill_app
from evaluate.cli import app as eval_app
from evaluate.table import Score
from extract.cache.errors import UserError

BASELINES = ("pixels-8", "random-scenes_masked")


def test_teachers_are_small_and_load_by_timm() -> None:
    found = teachers()
    assert set(found) == {"scenes_masked", "scenes_supervised"}
    files = [path for folder in found.values() for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2 * 1024**2
    for folder in found.values():
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        pixels = torch.randn(2, 3, 48, 48)
        assert torch.equal(model(pixels), again(pixels))
        assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Score]]:
    """The whole demo at its own size, once."""
    folder = tmp_path_factory.mktemp("demo") / "unic-demo"
    return folder, demo(DemoConfig(folder=folder))


def test_the_student_beats_the_baselines_and_keeps_up_with_the_best_teacher(
    finished: tuple[Path, list[Score]],
) -> None:
    scores = finished[1]
    for task in ("classification", "segmentation"):
        values = {score.encoder: score.value for score in scores if score.task == task}
        best = max(
            score.value for score in scores if score.task == task and score.role == "teacher"
        )
        assert values["unic"] >= 0.9 * best, (task, values)
        for baseline in BASELINES:
            assert values["unic"] >= values[baseline] + 10, (task, values)


def test_it_leaves_a_project_in_which_the_commands_work(
    finished: tuple[Path, list[Score]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished[0]
    monkeypatch.chdir(folder)
    project = read_project()
    assert set(project.teachers) == set(teachers()) and list(project.tasks) == ["scenes"]
    assert CliRunner().invoke(distill_app, []).stdout.startswith("1,116 steps (finished before)")
    result = CliRunner().invoke(eval_app, ["knn"])
    assert result.exit_code == 0, result.output
    for name in ("scenes_masked", "scenes_supervised", "unic"):
        assert name in result.stdout
    tasks = {entry["task"] for entry in json.loads(Path("results.json").read_text())["scores"]}
    assert tasks == {"classification", "segmentation", "knn"}


def test_the_picture_shows_all_encoders(finished: tuple[Path, list[Score]]) -> None:
    with Image.open(finished[0] / "features.png") as picture:
        assert picture.width > 900 and picture.height > 600


def test_a_second_run_makes_nothing_anew(finished: tuple[Path, list[Score]]) -> None:
    folder, scores = finished
    weights = folder / "runs" / "unic" / "student" / "model.safetensors"
    before = weights.read_bytes()
    again = demo(DemoConfig(folder=folder))
    assert weights.read_bytes() == before
    assert [(s.key, s.value) for s in again] == [(s.key, s.value) for s in scores]


def test_the_second_process_hands_back_what_went_wrong(
    finished: tuple[Path, list[Score]], tmp_path: Path
) -> None:
    config = DemoConfig(folder=finished[0])
    log = tmp_path / "scoring.log"
    with second_process(log) as process:
        wrong = process.submit(score, evaluation(config, ("no-such-encoder",)))
        with pytest.raises(UserError, match="no-such-encoder"):
            wrong.result()
        right = replace(evaluation(config, ("pixels:8",)), results=tmp_path / "results.json")
        assert [s.task for s in process.submit(score, right).result()] == list(TASKS)
    assert "segmentation pixels-8: 1000/1000 steps" in log.read_text()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DemoError, match="holds something else"):
        prepare(DemoConfig(folder=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
