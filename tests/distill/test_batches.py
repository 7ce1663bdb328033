"""The training stream: every image once an epoch, views in turns, nothing but seed and epoch."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch

from distill.batches import TrainingBatches, UserError

ROWS, VIEWS = 51, 2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of this size are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stream(feats, **changes):
    return TrainingBatches(feats, **(dict(batch_size=8, seed=0) | changes))


def epoch_indices(batches, epoch):
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    return np.concatenate([batches.indices(step) for step in steps])


def assert_same(one, other):
    assert torch.equal(one["index"], other["index"])
    assert torch.equal(one["views"], other["views"])
    for teacher, arrays in one["targets"].items():
        for name, tensor in arrays.items():
            assert torch.equal(tensor, other["targets"][teacher][name])


@pytest.mark.parametrize("batch_size, left_out", [(8, 3), (17, 0), (51, 0), (50, 1)])
def test_an_epoch_shows_every_image_once(feats, batch_size, left_out):
    batches = stream(feats, batch_size=batch_size)
    assert batches.steps_per_epoch == ROWS // batch_size
    waiting = Counter()
    for epoch in range(6):
        rows = epoch_indices(batches, epoch) // VIEWS
        assert len(rows) == len(set(rows)) == ROWS - left_out
        waiting.update(set(range(ROWS)) - set(rows))
    # Other images wait in other epochs.
    assert left_out == 0 or len(waiting) > left_out


def test_views_take_turns(feats):
    batches = stream(feats, batch_size=17)
    shown = [dict(zip(*np.divmod(epoch_indices(batches, e), VIEWS), strict=True)) for e in range(3)]
    for row in range(ROWS):
        assert {shown[0][row], shown[1][row]} == {0, 1}
        assert shown[2][row] == shown[0][row]
    # Both views are seen in every epoch, so that an epoch is no view's.
    assert 10 < sum(shown[0].values()) < ROWS - 10


def test_the_order_depends_on_seed_and_epoch_alone(feats):
    one, same, other = stream(feats), stream(feats), stream(feats, seed=1)
    backwards = [same.indices(step) for step in reversed(range(20))][::-1]
    assert all(np.array_equal(one.indices(s), backwards[s]) for s in range(20))
    rows = [tuple(epoch_indices(one, epoch) // VIEWS) for epoch in range(4)]
    assert len(set(rows)) == 4
    assert tuple(epoch_indices(other, 0) // VIEWS) not in rows


@pytest.mark.parametrize("start", [0, 4])
def test_any_number_of_threads_gives_the_same_batches(feats, start):
    batches = stream(feats)
    single = list(batches.iterate(start, 9, 1))
    several = list(batches.iterate(start, 9, 5))
    assert len(single) == len(several) == 9 - start
    for step, (one, other) in enumerate(zip(single, several, strict=True), start):
        assert one["index"].tolist() == batches.indices(step).tolist()
        assert_same(one, other)


def test_a_batch_is_what_the_cache_holds(feats):
    batches = stream(feats)
    batch = next(batches.iterate(2, 3, 2))
    assert batch["views"].shape == (8, 3, 48, 48)
    assert batch["views"].dtype == torch.uint8
    for place, index in enumerate(batch["index"].tolist()):
        single = batches.dataset[index]
        assert torch.equal(single["views"][0], batch["views"][place])
        for teacher in ("alpha", "beta"):
            assert batch["targets"][teacher]["patches"].shape == (8, 9, 32)
            for name in ("cls", "patches"):
                stored = single["targets"][teacher][name][0]
                assert stored.dtype == torch.float16
                assert torch.equal(stored, batch["targets"][teacher][name][place])


def test_a_batch_larger_than_the_data_set_is_clipped(feats):
    batches = stream(feats, batch_size=1000)
    assert (batches.batch_size, batches.steps_per_epoch) == (ROWS, 1)
    assert sorted(batches.indices(5) // VIEWS) == list(range(ROWS))


def test_a_stream_that_is_left_early_ends_its_threads(feats):
    before = threading.active_count()
    batches = stream(feats).iterate(0, 100, 3)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_statistics_are_those_of_all_rows_and_views(feats):
    batches = stream(feats)
    everything = batches.dataset.__getitems__(range(ROWS * VIEWS))["targets"]
    for name, teacher in batches.teachers.items():
        assert (teacher.cls_width, teacher.patch_width, teacher.grid) == (32, 32, (3, 3))
        for token, (mean, std) in teacher.statistics.items():
            flat = everything[name][token].double().flatten(0, -2)
            # Rounding to float16 in the cache comes after the statistics.
            torch.testing.assert_close(mean.double(), flat.mean(0), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(std.double(), flat.std(0, correction=1), rtol=1e-3, atol=0)


def test_fewer_teachers_and_views(feats):
    batches = stream(feats, teachers=["beta"], views=1)
    assert list(batches.teachers) == ["beta"]
    assert len(batches.dataset) == ROWS
    assert list(next(batches.iterate(0, 1, 1))["targets"]) == ["beta"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(teachers=["gamma"]), r"no features of 'gamma'; it has \['alpha', 'beta'\]"),
        (dict(views=3), "has 2 views of unic@48, 3 were asked for"),
        (dict(recipe="unic@64"), "unic@64"),
        (dict(data=["nowhere/*.tar"]), "matches no file"),
    ],
    ids=["teacher", "views", "recipe", "data"],
)
def test_what_the_cache_lacks_is_named(feats, changes, message):
    with pytest.raises(UserError, match=message):
        stream(feats, **changes)
