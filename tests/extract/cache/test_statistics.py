"""Moments gathered in pieces equal numpy's over everything, also where means dwarf variances."""

import json

import numpy as np
import pytest

from extract.cache.statistics import Moments, merged


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_pieces_merge_to_the_whole(offset: float) -> None:
    tokens = np.random.default_rng(0).normal(offset, [0.1, 1, 3], (500, 4, 3))
    pieces = [Moments.of(part) for part in np.split(tokens, [3, 100, 101, 350])]
    whole = merged(pieces)
    flat = tokens.reshape(-1, 3)
    assert whole.count == 2000
    np.testing.assert_allclose(whole.mean, flat.mean(0), rtol=1e-13)
    np.testing.assert_allclose(whole.std(), flat.std(0, ddof=1), rtol=1e-9)


def test_an_empty_piece_changes_nothing() -> None:
    some = Moments.of(np.ones((3, 2)))
    empty = Moments.of(np.empty((0, 2)))
    assert some.merge(empty) is some and empty.merge(some) is some


def test_json_keeps_every_bit() -> None:
    moments = Moments.of(np.random.default_rng(1).normal(size=(7, 5)))
    again = Moments.from_json(json.loads(json.dumps(moments.to_json())))
    assert np.array_equal(again.mean, moments.mean) and np.array_equal(again.m2, moments.m2)
