"""Procedural scenes with labels: the demo's images, drawn from a seed and nothing else.

A scene is a landscape with one large object in front and smaller ones around it. The class is the
large object's pattern and tint together (8 classes), whatever its shape, size, place, angle and
light. No single pixel tells it: a pattern is a relation between pixels, so a good feature beats
them. Every pixel has a category (sky, ground, or the kind of the object seen there) and a depth.

S = 48, the side of a scene in pixels.
"""

import io
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

SIZE = 48
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross")
PATTERNS = ("plain", "striped", "checked", "dotted")
TINTS = ("warm", "cool")
CLASSES = tuple(f"{tint} {pattern}" for pattern in PATTERNS for tint in TINTS)
CATEGORIES = ("sky", "ground", *CLASSES)
FAR = 20.0
_SCALE = 2
_PIXELS = SIZE * _SCALE

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """Image uint8 `[S, S, 3]`, class, mask uint8 `[S, S]`, depth float32 `[S, S]` in metres."""

    image: NDArray[np.uint8]
    label: int
    mask: NDArray[np.uint8]
    depth: Floats


@dataclass(frozen=True)
class Thing:
    """An object: its kind (a class), shape, centre, radius and angle in units of the scene."""

    kind: int
    shape: str
    x: float
    y: float
    radius: float
    angle: float


def scene(seed: int, index: int) -> Scene:
    """The scene number `index` of `seed`, a pure function of both."""
    rng = np.random.default_rng([seed, index])
    label = int(rng.integers(len(CLASSES)))
    horizon = rng.uniform(0.3, 0.6)
    image, mask, depth = _landscape(rng, horizon)
    things = [_clutter(rng, horizon) for _ in range(rng.integers(1, 4))]
    things.sort(key=lambda thing: thing.y + thing.radius)
    for thing in [*things, _subject(rng, label)]:
        _paint(rng, thing, horizon, image, mask, depth)
    light = rng.uniform(0.75, 1.15)
    noise = rng.normal(0, 0.02, image.shape)
    pixels = np.clip(_shrink(image) * light + _shrink(noise), 0, 1)
    middle = slice(_SCALE // 2, None, _SCALE)
    return Scene(
        image=(pixels * 255 + 0.5).astype(np.uint8),
        label=label,
        mask=mask[middle, middle].copy(),
        depth=depth[middle, middle].astype(np.float32),
    )


def _subject(rng: np.random.Generator, label: int) -> Thing:
    radius = rng.uniform(0.26, 0.38)
    x, y = rng.uniform(0.8 * radius, 1 - 0.8 * radius), rng.uniform(0.45, 1 - 0.7 * radius)
    return Thing(label, str(rng.choice(SHAPES)), x, y, radius, rng.uniform(-0.6, 0.6))


def _clutter(rng: np.random.Generator, horizon: float) -> Thing:
    kind, shape = int(rng.integers(len(CLASSES))), str(rng.choice(SHAPES))
    x, y, radius = rng.uniform(0, 1), rng.uniform(horizon - 0.05, 0.8), rng.uniform(0.1, 0.15)
    return Thing(kind, shape, x, y, radius, rng.uniform(-0.6, 0.6))


@cache
def _grid() -> tuple[Floats, Floats]:
    line = ((np.arange(_PIXELS) + 0.5) / _PIXELS).astype(np.float32)
    x, y = np.meshgrid(line, line)
    return x, y


def _landscape(
    rng: np.random.Generator, horizon: float
) -> tuple[NDArray[np.float64], NDArray[np.uint8], NDArray[np.float64]]:
    """Sky with a gradient, ground with a fine texture, and their categories and depth."""
    x, y = _grid()
    ground = y > horizon + 0.02 * np.sin(x * rng.uniform(4, 12) + rng.uniform(0, 6))
    sky_colour = _colour(rng, rng.uniform(0, 1), 0.3, 0.85)
    ground_colour = _colour(rng, rng.uniform(0, 1), 0.35, 0.5)
    fade = (0.8 + 0.2 * y / horizon)[..., None]
    grain = rng.normal(0, 0.09, (_PIXELS // 2, _PIXELS // 2)).repeat(2, 0).repeat(2, 1)[..., None]
    image = np.where(ground[..., None], ground_colour + grain, sky_colour * fade)
    # A pinhole camera 1.5 m above a plane; distances beyond FAR are the sky's.
    depth = np.where(ground, np.minimum(FAR, 1.5 / np.maximum(y - horizon + 0.05, 1e-3)), FAR)
    return image, ground.astype(np.uint8), depth


def _paint(
    rng: np.random.Generator,
    thing: Thing,
    horizon: float,
    image: NDArray[np.float64],
    mask: NDArray[np.uint8],
    depth: NDArray[np.float64],
) -> None:
    """Draw an object over what is there, with its shadow."""
    # The object's corner of the scene: most pixels of the whole are none of its.
    box = _box(thing)
    image, mask, depth = image[box], mask[box], depth[box]
    x, y = (line[box] for line in _grid())
    u, v = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    u, v = cos * u + sin * v, cos * v - sin * u
    inside = _inside(thing.shape, u, v)
    pattern, tint = divmod(thing.kind, len(TINTS))
    first, second = _colours(rng, TINTS[tint])
    marked = _marks(PATTERNS[pattern], x, y, thing.angle, rng.uniform(0, 6, 2))
    shade = (1.05 - 0.25 * np.clip(u + v, -1, 1) / 2)[..., None]
    image[inside] = (np.where(marked[..., None], second, first) * shade)[inside]
    mask[inside] = 2 + thing.kind
    foot = min(thing.y + thing.radius, 1.0)
    depth[inside] = min(FAR, 1.5 / max(foot - horizon + 0.05, 0.05))


def _box(thing: Thing) -> tuple[slice, slice]:
    """Rows and columns of the square that holds the object, at any angle."""
    reach = 1.2 * thing.radius
    first = [max(0, int((centre - reach) * _PIXELS)) for centre in (thing.y, thing.x)]
    last = [max(0, int((centre + reach) * _PIXELS) + 1) for centre in (thing.y, thing.x)]
    return slice(first[0], last[0]), slice(first[1], last[1])


def _inside(shape: str, u: Floats, v: Floats) -> NDArray[np.bool_]:
    """Which points (in units of the radius, turned) belong to the shape."""
    radius, angle = np.hypot(u, v), np.arctan2(u, -v)
    if shape == "disc":
        return radius < 0.92
    if shape == "ring":
        return (radius < 1) & (radius > 0.5)
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.82
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.32) & (np.maximum(abs(u), abs(v)) < 1)
    if shape == "triangle":
        return (v < 0.7) & (abs(u) * 1.6 - 0.75 < v * 0.9)
    wave = abs((angle * 5 / (2 * np.pi)) % 1 - 0.5) * 2
    return radius < 0.42 + 0.62 * wave


def _marks(
    pattern: str, x: Floats, y: Floats, angle: float, phase: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Which points have the pattern's second colour; patterns turn with their object."""
    cos, sin = np.cos(angle + 0.4), np.sin(angle + 0.4)
    # About five pixels a period: seen within one patch of eight.
    a = np.sin((cos * x + sin * y) * 2 * np.pi * SIZE / 5.5 + phase[0])
    b = np.sin((cos * y - sin * x) * 2 * np.pi * SIZE / 5.5 + phase[1])
    if pattern == "striped":
        return a > 0
    if pattern == "checked":
        return a * b > 0
    if pattern == "dotted":
        return a + b > 0.9
    return np.zeros_like(a, dtype=bool)


def _colours(
    rng: np.random.Generator, tint: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A colour of the tint, and for marks a lighter or darker one of the same."""
    hue = rng.uniform(-0.07, 0.16) if tint == "warm" else rng.uniform(0.45, 0.7)
    bright = bool(rng.integers(2))
    values = (0.9, 0.35) if bright else (0.45, 0.95)
    return _colour(rng, hue, 0.7, values[0]), _colour(rng, hue, 0.55, values[1])


def _colour(
    rng: np.random.Generator, hue: float, saturation: float, value: float
) -> NDArray[np.float64]:
    saturation = np.clip(saturation + rng.normal(0, 0.08), 0, 1)
    value = np.clip(value + rng.normal(0, 0.06), 0, 1)
    return np.array(hsv_to_rgb(hue % 1, saturation, value))


def _shrink(image: NDArray[np.float64]) -> NDArray[np.float64]:
    # Added plane by plane, which is faster than a mean over two short axes.
    corners = [
        image[row::_SCALE, column::_SCALE] for row in range(_SCALE) for column in range(_SCALE)
    ]
    return sum(corners[1:], start=corners[0]) / len(corners)


def write_tars(folder: Path, split: str, seed: int, count: int, per_tar: int = 500) -> list[Path]:
    """Scenes 0 to count - 1 of `seed` as tars `<split>-000000.tar` and so on.

    Members are `png`, `cls`, `seg.png` and `depth.npy` (float32, metres). The same arguments give
    the same bytes; tars that are there already are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for first in range(0, count, per_tar):
        path = folder / f"{split}-{first // per_tar:06d}.tar"
        if not path.exists():
            _write_tar(path, seed, range(first, min(first + per_tar, count)))
        paths.append(path)
    return paths


def _write_tar(path: Path, seed: int, indices: range) -> None:
    aside = path.with_suffix(".partial")
    with wds.TarWriter(str(aside), mtime=0) as tar:
        for index in indices:
            tar.write({"__key__": f"{path.stem}-{index:06d}", **_members(scene(seed, index))})
    aside.rename(path)


def _members(drawn: Scene) -> dict[str, bytes | str]:
    depth = io.BytesIO()
    np.save(depth, drawn.depth, allow_pickle=False)
    return {
        "png": _png(drawn.image),
        "cls": str(drawn.label),
        "seg.png": _png(drawn.mask),
        "depth.npy": depth.getvalue(),
    }


def _png(array: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()
