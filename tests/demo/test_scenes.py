"""The demo's scenes: a pure function of seed and index, with labels that agree with each other."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.scenes import (
    CATEGORIES,
    CLASSES,
    FAR,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    _box,
    _grid,
    _inside,
    scene,
    write_tars,
)
from extract.cache.images import index_tar, tar_sha256


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [scene(0, index) for index in range(120)]


def test_another_process_draws_the_same() -> None:
    code = (
        "from demo.scenes import scene; import hashlib, json;"
        "s = scene(3, 7); print(json.dumps([s.label, hashlib.sha256(s.image).hexdigest()]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    label, digest = json.loads(run.stdout)
    here = scene(3, 7)
    assert (label, digest) == (here.label, hashlib.sha256(here.image).hexdigest())


def test_seed_and_index_both_matter() -> None:
    first = scene(0, 0).image
    assert not np.array_equal(first, scene(0, 1).image)
    assert not np.array_equal(first, scene(1, 0).image)


def test_shapes_and_ranges(drawn: list[Scene]) -> None:
    for one in drawn:
        assert one.image.shape == (SIZE, SIZE, 3) and one.image.dtype == np.uint8
        assert one.mask.shape == one.depth.shape == (SIZE, SIZE)
        assert one.mask.max() < len(CATEGORIES)
        assert one.depth.min() > 0 and one.depth.max() <= FAR


def test_every_class_and_category_appears(drawn: list[Scene]) -> None:
    assert {one.label for one in drawn} == set(range(len(CLASSES)))
    assert set(np.unique([one.mask for one in drawn])) == set(range(len(CATEGORIES)))


def test_the_class_is_the_category_of_the_largest_object(drawn: list[Scene]) -> None:
    agree = 0
    for one in drawn:
        areas = np.bincount(one.mask.ravel(), minlength=len(CATEGORIES))[2:]
        agree += int(areas.argmax() == one.label)
    assert agree >= 0.98 * len(drawn)


def test_objects_stand_before_the_sky(drawn: list[Scene]) -> None:
    for one in drawn:
        assert (one.depth[one.mask == 0] == FAR).all()
        assert one.depth[one.mask > 1].mean() < FAR


def test_mean_colour_does_not_tell_the_class() -> None:
    """The nearest class mean in colour stays far below what a feature reaches."""
    scenes = [scene(5, index) for index in range(400)]
    colours = np.array([one.image.mean((0, 1)) for one in scenes])
    labels = np.array([one.label for one in scenes])
    centres = np.array([colours[:200][labels[:200] == c].mean(0) for c in range(len(CLASSES))])
    guesses = np.linalg.norm(colours[200:, None] - centres, axis=2).argmin(1)
    assert (guesses == labels[200:]).mean() < 0.35


@pytest.mark.parametrize("shape", SHAPES)
def test_the_box_that_is_painted_holds_the_whole_object(shape: str) -> None:
    x, y = _grid()
    for angle in np.linspace(-3, 3, 25):
        thing = Thing(0, shape, 0.45, 0.6, 0.3, float(angle))
        u, v = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
        cos, sin = np.cos(angle), np.sin(angle)
        inside = _inside(shape, cos * u + sin * v, cos * v - sin * u)
        outside = np.ones_like(inside)
        outside[_box(thing)] = False
        assert inside.any() and not (inside & outside).any()


def test_tars_are_the_same_bytes_and_hold_every_label(tmp_path: Path) -> None:
    one = write_tars(tmp_path / "a", "train", 1, 25, per_tar=10)
    two = write_tars(tmp_path / "b", "train", 1, 25, per_tar=10)
    assert [p.name for p in one] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert [tar_sha256(p) for p in one] == [tar_sha256(p) for p in two]
    assert [len(index_tar(p).samples) for p in one] == [10, 10, 5]
    index = index_tar(one[1])
    sample = {ext: index.read(index.samples[0], ext) for ext in index.samples[0].members}
    expected = scene(1, 10)
    assert int(sample["cls"]) == expected.label
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), expected.image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["seg.png"]))), expected.mask)
    depth = np.load(io.BytesIO(sample["depth.npy"]), allow_pickle=False)
    assert np.array_equal(depth, expected.depth)
