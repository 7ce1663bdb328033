"""A view is data: the same from anywhere, different for every name, and provable afterwards."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from extract.cache.errors import ImageError, UserError
from extract.cache.views import (
    TOLERANCE,
    Center,
    Unic,
    check_fingerprint,
    deviation,
    draw_view,
    fingerprint,
    parse_recipe,
)

PHOTOMETRIC = ("jitter", "gray", "blur", "solarize")


@cache
def photo(seed: int, height: int = 180, width: int = 240) -> Tensor:
    """A picture with the statistics that matter here: smooth parts, texture, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    picture = np.full((height, width, 3), 128.0)
    for _ in range(12):
        fy, fx = rng.normal(0, 0.15, 2)
        wave = np.sin(fy * y + fx * x + rng.uniform(0, 6.28))
        picture += wave[..., None] * rng.normal(0, 14, 3)
    for _ in range(4):
        normal = rng.normal(size=2)
        side = normal[0] * (y - rng.uniform(0, height)) + normal[1] * (x - rng.uniform(0, width))
        picture += (side > 0)[..., None] * rng.normal(0, 25, 3)
    picture += rng.normal(0, 4, picture.shape)
    return torch.from_numpy(picture.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def render(recipe, image: Tensor, index: int, seed: int = 0) -> Tensor:
    params = draw_view(recipe, seed, "000000", index, f"k{index}", 0, *image.shape[1:])
    return recipe.apply(image, params)


def without_colour(params):
    return params | {name: np.uint8(0) for name in PHOTOMETRIC}


class Views(Dataset):
    """Sixteen images, each as (its index, the bytes of one view)."""

    recipe = Unic(48)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return index, render(self.recipe, photo(index), index)


def views_by_index(loader):
    return {int(i): view for indices, views in loader for i, view in zip(indices, views)}  # noqa: B905


def views_one_by_one():
    views = Views()
    return dict(views[index] for index in range(len(views)))


@pytest.fixture(scope="module")
def expected():
    return views_one_by_one()


def same(views, expected):
    return views.keys() == expected.keys() and all(
        torch.equal(views[index], expected[index]) for index in expected
    )


def test_same_bits_in_other_processes_batches_and_order(expected):
    backwards = list(reversed(range(16)))
    loader = DataLoader(
        Views(), 5, sampler=backwards, num_workers=1, multiprocessing_context="forkserver"
    )
    assert same(views_by_index(loader), expected)
    assert same(views_by_index(DataLoader(Views(), 3)), expected)


def test_same_bits_in_threads_and_with_other_thread_counts(expected):
    views = Views()
    with ThreadPoolExecutor(4) as pool:
        assert same(dict(pool.map(views.__getitem__, reversed(range(16)))), expected)
    before = torch.get_num_threads()
    large, image = Unic(288), photo(3, 400, 500)
    try:
        made = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same(views_one_by_one(), expected)
            made.append([render(large, image, index) for index in range(8)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


def test_memory_layout_of_the_image_changes_nothing():
    for index in range(8):
        image = photo(index)
        assert not image.is_contiguous()
        one, other = (render(Unic(64), i, index) for i in (image, image.contiguous()))
        assert torch.equal(one, other)
        assert one.is_contiguous()


@pytest.mark.parametrize(
    "other",
    [
        (2, "000000", 5, "n01/a", 2),
        (1, "000001", 5, "n01/a", 2),
        (1, "000000", 6, "n01/a", 2),
        (1, "000000", 5, "n01/b", 2),
        (1, "000000", 5, "n01/a", 3),
    ],
    ids=["seed", "tar", "ordinal", "key", "view"],
)
def test_every_part_of_the_name_changes_the_draw(other):
    recipe = Unic(224)
    one = draw_view(recipe, 1, "000000", 5, "n01/a", 2, 375, 500)
    two = draw_view(recipe, *other, 375, 500)
    assert all(one[name] != two[name] for name in ("brightness", "contrast", "hue", "blur_sigma"))
    assert [one[f"crop_{e}"] for e in ("top", "left")] != [
        two[f"crop_{e}"] for e in ("top", "left")
    ]


@pytest.mark.parametrize("label", ["unic@48", "center@48", "center@48r60"])
def test_stored_parameters_give_the_same_view(label):
    recipe = parse_recipe(label)
    rows = [draw_view(recipe, 0, "t", i, "k", 0, 180, 240) for i in range(16)]
    stored = {
        name: np.zeros((16, *column.shape), column.dtype) for name, column in recipe.columns.items()
    }
    for i, row in enumerate(rows):
        assert row.keys() == recipe.columns.keys()
        for name, value in row.items():
            assert value.dtype == recipe.columns[name].dtype
            assert value.shape == recipe.columns[name].shape
            stored[name][i] = value
    for i, row in enumerate(rows):
        loaded = {name: values[i] for name, values in stored.items()}
        assert torch.equal(recipe.apply(photo(i), row), recipe.apply(photo(i), loaded))


def reference(image: Tensor, params, size: int) -> Tensor:
    """The same view by torchvision's transform classes, pinned to the stored values."""
    top, left, height, width = (
        int(params[f"crop_{edge}"]) for edge in ("top", "left", "height", "width")
    )
    crop = image[:, top : top + height, left : left + width]
    steps = [v2.Resize((size, size), InterpolationMode.BICUBIC, antialias=True)]
    if params["flip"]:
        steps.append(v2.RandomHorizontalFlip(1))
    if params["jitter"]:
        names = ("brightness", "contrast", "saturation", "hue")
        steps += [
            v2.ColorJitter(**{names[i]: (float(params[names[i]]),) * 2})
            for i in params["jitter_order"]
        ]
    if params["gray"]:
        steps.append(v2.Grayscale(3))
    if params["blur"]:
        steps.append(v2.GaussianBlur(9, (float(params["blur_sigma"]),) * 2))
    if params["solarize"]:
        steps.append(v2.RandomSolarize(128, 1))
    return v2.Compose(steps)(crop)


def test_unic_equals_torchvision_transforms():
    recipe, seen = Unic(96), dict.fromkeys(("flip", *PHOTOMETRIC), 0)
    for index in range(40):
        image = photo(index)
        params = draw_view(recipe, 0, "t", index, "k", 0, 180, 240)
        assert torch.equal(recipe.apply(image, params), reference(image, params, 96))
        for name in seen:
            seen[name] += int(params[name])
    assert all(0 < count < 40 for count in seen.values())


@pytest.fixture(scope="module")
def draws():
    recipe = Unic(224)
    rows = [draw_view(recipe, 5, "t", i, f"k{i}", 0, 375, 500) for i in range(4000)]
    return {name: np.stack([row[name] for row in rows]) for name in recipe.columns}


def test_rates_of_the_draws(draws):
    rates = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.2, "solarize": 0.2}
    for name, p in rates.items():
        sigma = math.sqrt(4000 * p * (1 - p))
        assert abs(draws[name].sum() - 4000 * p) < 4 * sigma, name
    for step in range(4):
        assert abs((draws["jitter_order"][:, 0] == step).sum() - 1000) < 4 * math.sqrt(750)
    assert (np.sort(draws["jitter_order"], axis=1) == np.arange(4)).all()


def test_ranges_of_the_draws(draws):
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
        "blur_sigma": (0.1, 5.0),
    }
    for name, (low, high) in ranges.items():
        values = draws[name].astype(np.float64)
        assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
        sigma = (high - low) / math.sqrt(12 * 4000)
        assert abs(values.mean() - (low + high) / 2) < 4 * sigma, name


def test_crops_are_distributed_as_torchvisions(draws):
    image = torch.empty(3, 375, 500)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array(
            [
                v1.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
                for _ in range(4000)
            ]
        )
    ours = np.stack([draws[f"crop_{e}"] for e in ("top", "left", "height", "width")], axis=1)
    for values in (ours, theirs):
        assert (values[:, 0] + values[:, 2] <= 375).all() and (values[:, 0] >= 0).all()
        assert (values[:, 1] + values[:, 3] <= 500).all() and (values[:, 1] >= 0).all()
    for moment in (1, 2):
        a, b = ours.astype(float) ** moment, theirs.astype(float) ** moment
        sigma = np.sqrt((a.var(axis=0) + b.var(axis=0)) / 4000)
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) < 4 * sigma).all()


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (20, 900)])
def test_long_images_fall_back_to_the_centre(height, width):
    params = draw_view(Unic(32), 0, "t", 0, "k", 0, height, width)
    box = tuple(int(params[f"crop_{e}"]) for e in ("top", "left", "height", "width"))
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    assert box == v1.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
    assert Unic(32).apply(image, params).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (375, 500),
        (500, 375),
        (333, 517),
        (97, 640),
        (641, 90),
        (30, 41),
        (224, 224),
        (225, 224),
        (1, 9),
    ],
)
@pytest.mark.parametrize("label", ["center@224", "center@224r256", "center@47r63"])
def test_center_equals_torchvision(height, width, label):
    recipe = parse_recipe(label)
    image = photo(height, height, width)
    params = draw_view(recipe, 0, "t", 0, "k", 0, height, width)
    expected = v2.Compose(
        [
            v2.Resize(recipe.resize, InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(recipe.size),
        ]
    )(image)
    view = recipe.apply(image, params)
    assert torch.equal(view, expected)
    assert view.data_ptr() != image.data_ptr()


def test_center_refuses_what_would_fill_the_memory():
    with pytest.raises(ImageError, match=r"000003\.tar: n01/strip: .*1 x 2000000"):
        draw_view(Center(224, 224), 0, "000003", 0, "n01/strip", 0, 1, 2_000_000)


@pytest.mark.parametrize("label", ["unic@224", "center@224", "center@224r256", "unic@48"])
def test_labels_round_trip(label):
    assert parse_recipe(label).label == label


@pytest.mark.parametrize(
    "label",
    ["unic", "unic@", "unic@224r256", "center@224x", "radio@224", "unic@0x10", "unic@224\n"],
)
def test_unknown_recipes_are_refused_with_a_list(label):
    with pytest.raises(UserError, match=r"unic@SIZE .* center@SIZE"):
        parse_recipe(label)


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="at least 16"):
        parse_recipe("unic@8")
    with pytest.raises(UserError, match="smaller than"):
        parse_recipe("center@224r200")


def test_fingerprint_holds_pixels_and_a_hash():
    view = render(Unic(48), photo(0), 0)
    grid, digest = fingerprint(view)
    assert grid.shape == (16, 16, 3) and grid.dtype == np.uint8
    assert grid[2, 5].tolist() == view[:, 7, 16].tolist()
    assert digest.dtype == np.uint64
    changed = view.clone()
    changed[0, 0, 0] ^= 1
    assert fingerprint(changed)[1] != digest
    assert np.array_equal(fingerprint(changed)[0], grid)


def grids(make) -> np.ndarray:
    return np.stack([fingerprint(make(index))[0] for index in range(64)])


@pytest.mark.parametrize("size", [48, 224])
def test_fingerprint_catches_a_moved_crop(size):
    recipe = Unic(size)

    def moved(index):
        image = photo(index)
        params = draw_view(recipe, 0, "000000", index, f"k{index}", 0, 180, 240)
        step = 1 if params["crop_left"] + params["crop_width"] < 240 else -1
        step = 0 if params["crop_width"] == 240 else step
        return recipe.apply(image, params | {"crop_left": params["crop_left"] + np.int32(step)})

    stored = grids(lambda index: render(recipe, photo(index), index))
    check_fingerprint(stored, stored.copy(), "here")
    with pytest.raises(ImageError, match="here: the view is not the one in the cache"):
        check_fingerprint(stored, grids(moved), "here")


@pytest.mark.parametrize("size", [48, 224])
@pytest.mark.parametrize("name", ["unic", "center"])
def test_fingerprint_catches_another_interpolation(name, size):
    recipe = parse_recipe(f"{name}@{size}")

    def place(mode):
        def make(index):
            params = draw_view(recipe, 0, "000000", index, f"k{index}", 0, 180, 240)
            return recipe._place(photo(index), params, mode)

        return grids(make)

    bicubic, bilinear = place(InterpolationMode.BICUBIC), place(InterpolationMode.BILINEAR)
    with pytest.raises(ImageError):
        check_fingerprint(bicubic, bilinear, "here")


def test_fingerprint_catches_a_moved_centre_crop():
    recipe = Center(48, 56)

    def make(index, step):
        params = draw_view(recipe, 0, "t", index, "k", 0, 180, 240)
        moved = params | {"crop_left": params["crop_left"] + np.int32(step)}
        return recipe.apply(photo(index), moved)

    assert deviation(grids(lambda i: make(i, 0)), grids(lambda i: make(i, 1))) > TOLERANCE


def test_fingerprint_forgives_rounding():
    view = render(Unic(48), photo(0), 0).clamp(2, 253)
    noise = torch.randint(-1, 2, view.shape, generator=torch.Generator().manual_seed(0))
    other = (view + noise).to(torch.uint8)
    assert deviation(fingerprint(view)[0], fingerprint(other)[0]) == 1
    check_fingerprint(fingerprint(view)[0], fingerprint(other)[0], "here")


COLOURS = torch.tensor([[20, 20, 20], [230, 30, 40], [40, 220, 60], [50, 60, 235]])


def label_map(seed: int, height: int, width: int) -> Tensor:
    """Voronoi regions of 24 points, four labels."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (24, 2)) * (height, width)
    y, x = np.mgrid[:height, :width]
    nearest = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
    return torch.from_numpy(rng.integers(0, 4, 24)[nearest])


def away_from_edges(mask: Tensor, radius: int) -> Tensor:
    values, size = mask[None].float(), 2 * radius + 1
    most = max_pool2d(values, size, 1, radius)
    same = (most == -max_pool2d(-values, size, 1, radius))[0]
    # An edge just outside the crop is blended into its border.
    inner = torch.zeros_like(same)
    inner[radius:-radius, radius:-radius] = True
    return same & inner


@pytest.mark.parametrize("label", ["unic@64", "center@64", "center@64r80"])
def test_masks_follow_their_images(label):
    recipe, checked, flips = parse_recipe(label), 0, 0
    for index in range(24):
        mask = label_map(index, 150 + index, 260 - 3 * index)
        image = COLOURS[mask].permute(2, 0, 1).to(torch.uint8)
        params = draw_view(recipe, 0, "t", index, "k", 0, *mask.shape)
        view = recipe.apply(image, without_colour(params))
        placed = recipe.apply_mask(mask, params)
        assert placed.dtype == mask.dtype and placed.shape == (64, 64)
        seen = (view.permute(1, 2, 0)[:, :, None].int() - COLOURS).abs().sum(-1).argmin(-1)
        enlarged = 64 / int(params.get("crop_width", mask.shape[1]))
        inside = away_from_edges(placed, math.ceil(2 * max(1, enlarged)))
        assert torch.equal(seen[inside], placed[inside])
        # Edges are where they belong, too: between the two only blended pixels differ.
        assert (seen != placed).float().mean() < 0.06
        checked += int(inside.sum())
        flips += int(params.get("flip", 0))
    assert checked > 24 * 64 * 64 * 0.2
    assert flips > 0 or label.startswith("center")


def test_large_labels_survive():
    mask = torch.full((30, 40), 65_535)
    mask[:, 20:] = 255
    params = draw_view(Unic(32), 0, "t", 0, "k", 0, 30, 40)
    assert set(Unic(32).apply_mask(mask, params).unique().tolist()) <= {255, 65_535}


def test_rows_of_other_images_are_refused():
    unic = draw_view(Unic(32), 0, "t", 1, "k", 0, 300, 400)
    with pytest.raises(ImageError, match="belongs to another image"):
        Unic(32).apply(photo(0, 40, 50), unic)
    center = draw_view(Center(32, 32), 0, "t", 1, "k", 0, 300, 400)
    with pytest.raises(ImageError, match="belongs to another image"):
        Center(32, 32).apply(photo(0, 300, 300), center)


def test_only_uint8_images_are_taken():
    params = draw_view(Unic(32), 0, "t", 1, "k", 0, 40, 50)
    with pytest.raises(ValueError, match="uint8"):
        Unic(32).apply(torch.zeros(3, 40, 50), params)
