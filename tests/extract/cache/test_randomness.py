"""Streams are pure functions of their labels, pinned to values that must never change."""

import numpy as np
import pytest

from extract.cache.randomness import (
    permutation,
    stream_words,
    to_uniforms,
    uniforms,
    view_words,
)


def test_words_are_pinned():
    words = view_words(1, "000000", 5, "n01/a", 2, 3)
    assert words.dtype == np.uint64
    assert words.tolist() == [1902229300992125254, 6594430469567365137, 16610274940119222587]


def test_words_follow_the_written_down_construction():
    import hashlib

    text = b"s" + (4).to_bytes(8, "little") + b"seed" + b"i" + (2).to_bytes(8, "little") + b"-3"
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    expected = np.random.Philox(key=key).random_raw(5)
    assert np.array_equal(stream_words(5, "seed", -3), expected)


@pytest.mark.parametrize(
    "other",
    [
        (2, "000000", 5, "n01/a", 2),
        (1, "000001", 5, "n01/a", 2),
        (1, "000000", 6, "n01/a", 2),
        (1, "000000", 5, "n01/b", 2),
        (1, "000000", 5, "n01/a", 3),
    ],
)
def test_every_label_changes_every_word(other):
    assert not np.any(view_words(1, "000000", 5, "n01/a", 2, 64) == view_words(*other, 64))


@pytest.mark.parametrize(
    ("one", "other"),
    [((1,), ("1",)), (("ab", "c"), ("a", "bc")), ((1, 23), (12, 3)), (("a",), ("a", ""))],
)
def test_labels_are_never_confused(one, other):
    assert not np.array_equal(stream_words(4, *one), stream_words(4, *other))


def test_numpy_integers_are_integers():
    assert np.array_equal(stream_words(4, np.int64(7)), stream_words(4, 7))


def test_a_longer_request_begins_with_the_shorter_one():
    assert np.array_equal(view_words(0, "t", 0, "k", 0, 99)[:7], view_words(0, "t", 0, "k", 0, 7))


def test_uniforms_stay_below_one():
    words = np.array([0, 1 << 11, 2**64 - 1], dtype=np.uint64)
    assert to_uniforms(words).tolist() == [0.0, 2.0**-53, 1.0 - 2.0**-53]


def test_uniforms_are_uniform():
    u = np.concatenate([uniforms(3, "000000", i, f"k{i}", 0, 100) for i in range(1000)])
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    sigma = np.sqrt(len(u) * 0.05 * 0.95)
    assert np.abs(counts - len(u) / 20).max() < 4.5 * sigma
    # Neighbouring ordinals are unrelated.
    rows = u.reshape(1000, 100)
    assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < 4 / np.sqrt(rows.size)


def test_permutation():
    order = permutation(7, "epoch", 3, n=8)
    assert order.tolist() == [7, 5, 6, 2, 0, 3, 4, 1]
    assert sorted(permutation(7, "epoch", 3, n=1000)) == list(range(1000))
    assert not np.array_equal(permutation(7, "epoch", 3, n=99), permutation(7, "epoch", 4, n=99))
    assert not np.array_equal(permutation(7, "epoch", 3, n=99), permutation(8, "epoch", 3, n=99))
    assert permutation(0, n=0).tolist() == []
