import io
import json
import re

import pytest
import torch
from rich.console import Console

from evaluate.table import (
    Provenance,
    Score,
    print_scores,
    read_results,
    relative_gain,
    score_tables,
    write_results,
)

SCORES = [
    Score("dino", "knn", "top-1", 66.0, protocol="k = 20", role="teacher"),
    Score("deit3", "knn", "top-1", 70.0, protocol="k = 20", role="teacher"),
    Score("unic", "knn", "top-1", 77.0, protocol="k = 20", role="student"),
    Score("dino", "depth", "RMSE", 0.5, False, role="teacher"),
    Score("deit3", "depth", "RMSE", 0.4, False, role="teacher"),
    Score("unic", "depth", "RMSE", 0.5, False, role="student"),
    Score("noise", "knn", "top-1", 10.0, role="baseline"),
]


def _printed(scores, **options):
    out = io.StringIO()
    print_scores(scores, Console(file=out, **{"width": 80, **options}))
    return out.getvalue()


def _row(text, encoder):
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == [encoder])
    return lines[first].split(), lines[first + 1].split()


def test_best_of_each_column_is_marked_and_gains_are_over_the_best_teacher():
    text = _printed(SCORES)
    assert _row(text, "unic") == (["unic", "77.0*", "0.500"], ["student", "+10.0%", "-25.0%"])
    assert _row(text, "deit3") == (["deit3", "70.0", "0.400*"], ["teacher"])
    assert _row(text, "noise") == (["noise", "10.0", "-"], ["baseline", "-85.7%"])
    assert "knn (top-1): k = 20" in text
    order = [text.index(name) for name in ("dino", "deit3", "noise", "unic")]
    assert order == sorted(order)


def test_piped_output_has_no_colours_and_a_terminal_has_bold():
    assert "\x1b" not in _printed(SCORES)
    coloured = _printed(SCORES, force_terminal=True, color_system="standard")
    assert re.search(r"\x1b\[1m *77\.0\*", coloured)
    assert not re.search(r"\x1b\[1m *70\.0", coloured)


def test_many_tasks_are_split_over_tables_that_fit():
    scores = [
        Score(f"encoder-{e}", f"task-{t}", "accuracy", 50.0 + e + t, role="teacher")
        for e in range(3)
        for t in range(12)
    ]
    text = _printed(scores)
    assert max(map(len, text.splitlines())) <= 80
    assert len(score_tables(scores, 80)) > 1
    for t in range(12):
        assert f"{50 + 2 + t}.0*" in text
    assert len(score_tables(scores, 400)) == 1


def test_different_protocols_in_one_column_are_called_out():
    mixed = [
        Score("a", "seg", "mIoU", 30.0, protocol="linear, 40,000 steps"),
        Score("b", "seg", "mIoU", 31.0, protocol="linear, 800 steps (reduced from 40,000)"),
    ]
    assert "PROTOCOLS DIFFER" in _printed(mixed)
    assert "PROTOCOLS DIFFER" not in _printed(mixed[:1])
    assert "No scores yet" in _printed([])


def test_relative_gain():
    # UNIC's Table 1: 39.6 over iBOT's 36.6 is +8.2 %.
    assert relative_gain(39.6, 36.6, True) == pytest.approx(8.2, abs=0.01)
    assert relative_gain(0.3, 0.4, False) == pytest.approx(25)
    assert relative_gain(1.0, 0.0, True) is None


def test_results_come_back_as_they_were_with_their_provenance(tmp_path):
    path = tmp_path / "runs" / "results.json"
    details = {"iou": torch.tensor([0.5, float("nan")]), "C": 10.0}
    score = Score("unic", "seg", "mIoU", 40.0, True, "linear", "student", details)
    run = Provenance("scenes, 800 / 200", 22, {"unic": "ab12"}, {"seg": 3.2})
    write_results(path, [score], run)
    [record] = json.loads(path.read_text())["scores"]
    assert record["details"] == {"iou": [0.5, None], "C": 10.0}
    assert (record["encoder_sha256"], record["data"]) == ("ab12", "scenes, 800 / 200")
    assert (record["seed"], record["seconds"]) == (22, 3.2)
    assert record["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"timm", "scikit-learn"} < set(record["versions"])
    [back] = read_results(path)
    assert (back.key, back.value, back.role) == (score.key, 40.0, "student")
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_writing_merges_and_replaces_only_namesakes(tmp_path):
    path, run = tmp_path / "results.json", Provenance("scenes", 0)
    write_results(path, SCORES, run)
    write_results(path, [Score("unic", "knn", "top-1", 80.0, role="student")], run)
    back = {score.key: score.value for score in read_results(path)}
    assert len(back) == len(SCORES)
    assert back["unic", "knn", "top-1"] == 80.0
    assert back["unic", "depth", "RMSE"] == 0.5


def test_scores_of_replaced_weights_leave_the_table_but_not_the_file(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, SCORES, Provenance("scenes", 0, {"unic": "old", "dino": "same"}))
    new = Score("unic", "knn", "top-1", 80.0, role="student")
    write_results(path, [new], Provenance("scenes", 0, {"unic": "new", "dino": "same"}))
    keys = [score.key for score in read_results(path)]
    assert ("unic", "depth", "RMSE") not in keys
    assert len(keys) == len(SCORES) - 1
    [stale] = json.loads(path.read_text())["superseded"]
    assert (stale["task"], stale["encoder_sha256"]) == ("depth", "old")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": 7, "scores": []}'])
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        write_results(path, SCORES, Provenance("scenes", 0))
    assert path.read_text() == text
    assert len(list(tmp_path.iterdir())) == 1


def test_a_score_must_be_a_number_and_its_role_known():
    with pytest.raises(ValueError, match="mIoU is nan"):
        Score("a", "seg", "mIoU", float("nan"))
    with pytest.raises(ValueError, match="role"):
        Score("a", "seg", "mIoU", 1.0, role="pupil")  # type: ignore[arg-type]
