"""Lines of metrics are means since the last line; a resumed run continues the file."""

import json
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.metrics import Metrics, finite


def values(loss, first, second):
    return {
        "loss": torch.tensor(loss),
        "teacher_loss": torch.tensor([first, second]),
        "coefficient": torch.tensor([1.0, first / 2]),
    }


def read(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def fill(folder, first, last, loss=1.0, start=0):
    metrics = Metrics(folder, ["alpha", "beta"], start)
    for step in range(first, last + 1):
        metrics.add(values(loss * step, 1.0, 2.0), 8, 0.0)
        metrics.write(step, step / 10, 1e-3)
    metrics.close()


def test_a_line_holds_the_means_since_the_last_one(tmp_path):
    metrics = Metrics(tmp_path, ["alpha", "beta"], 0)
    assert not metrics.pending
    metrics.add(values(1.0, 0.5, 4.0), 8, 0.0)
    metrics.add(values(2.0, 1.5, 8.0), 8, 0.0)
    assert metrics.pending
    first = metrics.write(2, 0.123456, 1e-3)
    assert not metrics.pending
    metrics.add(values(7.0, 0.25, 1.0), 8, 0.0)
    metrics.write(3, 0.2, 2e-3)
    metrics.close()
    assert read(tmp_path)[0] == first
    assert (first["step"], first["epoch"], first["lr"]) == (2, 0.1235, 1e-3)
    assert first["loss"] == 1.5
    assert first["teachers"] == {
        "alpha": {"teacher_loss": 1.0, "coefficient": 1.0},
        "beta": {"teacher_loss": 6.0, "coefficient": 0.5},
    }
    second = read(tmp_path)[1]
    assert (second["loss"], second["teachers"]["alpha"]["teacher_loss"]) == (7.0, 0.25)


def test_adding_leaves_the_callers_tensors_alone(tmp_path):
    metrics = Metrics(tmp_path, ["alpha", "beta"], 0)
    given = values(1.0, 1.0, 1.0)
    metrics.add(given, 8, 0.0)
    metrics.add(given, 8, 0.0)
    metrics.close()
    assert given["loss"].item() == 1.0


def test_speed_and_waiting(tmp_path):
    metrics = Metrics(tmp_path, ["alpha", "beta"], 0)
    metrics._since -= 10  # ten seconds ago
    metrics.add(values(1.0, 1.0, 1.0), 30, 4.0)
    metrics.add(values(1.0, 1.0, 1.0), 30, 1.0)
    line = metrics.write(2, 0.1, 1e-3)
    metrics.close()
    assert line["images_per_second"] == pytest.approx(6, rel=0.1)
    assert line["data_wait"] == pytest.approx(0.5, rel=0.1)


def test_resuming_cuts_later_and_torn_lines(tmp_path):
    fill(tmp_path, 1, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss"')
    fill(tmp_path, 5, 7, loss=-1.0, start=4)
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [
        *[(step, step) for step in (1, 2, 3, 4)],
        *[(step, -step) for step in (5, 6, 7)],
    ]


def test_starting_over_leaves_no_line_of_the_past(tmp_path):
    fill(tmp_path, 1, 3)
    Metrics(tmp_path, ["alpha"], 0).close()
    assert read(tmp_path) == []


def test_tensorboard_shows_the_same_numbers(tmp_path):
    fill(tmp_path, 1, 4)
    # TensorBoard orders a run's files by the second in their names.
    time.sleep(1.1)
    fill(tmp_path, 3, 5, loss=10.0, start=2)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = {"loss", "lr", "images_per_second", "data_wait"}
    tags |= {f"{n}/{t}" for n in ("teacher_loss", "coefficient") for t in ("alpha", "beta")}
    assert set(board.Tags()["scalars"]) == tags
    shown = {event.step: event.value for event in board.Scalars("loss")}
    assert shown == {line["step"]: line["loss"] for line in read(tmp_path)}
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert board.Scalars("teacher_loss/beta")[0].value == 2.0


@pytest.mark.parametrize("loss, good", [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_finite(loss, good):
    assert finite({"loss": loss}) is good
