"""The public reader: every item is what plain zarr and the recipe give, and foul play is found."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SIZE, open_unit, write_tar
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode

from extract.cache import Batch, Cache, CachedViews, CacheError, ImageError, select
from extract.cache.images import decode, image_extension, index_tar
from extract.cache.views import draw_view, parse_recipe
from extract.config import ExtractConfig
from extract.run import extract

LABEL = f"unic@{SIZE}"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut can tell; extraction of small units is otherwise four fifths waiting."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Pictures this small are cut fastest by one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def place(index: int, tars: list[Path]) -> tuple[Path, int, int]:
    """(tar, row, view) of sample `index`: rows of one tar after another, views innermost."""
    row, view = divmod(index, 2)
    for tar in tars:
        rows = len(index_tar(tar))
        if row < rows:
            return tar, row, view
        row -= rows
    raise IndexError(index)


def expected_view(tar: Path, row: int, view: int) -> torch.Tensor:
    recipe, index = parse_recipe(LABEL), index_tar(tar)
    sample = index.samples[row]
    image = decode(index.read(sample, image_extension(sample)), sample.key)
    where = (tar.stem, row, sample.key, view)
    return recipe.apply(image, draw_view(recipe, 0, *where, *image.shape[1:]))


def same(first: Batch, second: Batch) -> bool:
    pairs = [(first["views"], second["views"]), (first["index"], second["index"])]
    for name, arrays in first["targets"].items():
        pairs += [(tokens, second["targets"][name][array]) for array, tokens in arrays.items()]
    return first["targets"].keys() == second["targets"].keys() and all(
        torch.equal(a, b) for a, b in pairs
    )


@pytest.fixture
def dataset(feats: Path) -> CachedViews:
    return CachedViews(select(Cache(feats)))


def test_items_are_what_zarr_and_the_recipe_give(
    dataset: CachedViews, feats: Path, tars: list[Path]
) -> None:
    assert len(dataset) == 2 * (30 + 21)
    chosen = np.random.default_rng(0).permutation(len(dataset))[:40].tolist()
    batch = dataset.__getitems__(chosen)
    assert batch["index"].tolist() == chosen
    assert batch["views"].dtype == torch.uint8 and batch["views"].shape == (40, 3, SIZE, SIZE)
    for i, index in enumerate(chosen):
        tar, row, view = place(index, tars)
        assert torch.equal(batch["views"][i], expected_view(tar, row, view))
        for name in ("alpha", "beta"):
            group = open_unit(feats, name, view, tar.stem)
            for array in ("cls", "patches"):
                tokens = batch["targets"][name][array][i]
                assert tokens.dtype == torch.float16
                np.testing.assert_array_equal(tokens.numpy(), group[array][row])
    assert same(dataset[chosen[0]], dataset.__getitems__(chosen[:1]))
    with pytest.raises(ValueError, match="at least one sample"):
        dataset.__getitems__([])


def test_parts_of_a_batch_can_be_left_out(feats: Path, dataset: CachedViews) -> None:
    lean = CachedViews(select(Cache(feats), encoders=["beta"]), arrays=("cls",), pixels=False)
    batch, whole = lean.__getitems__([3, 70]), dataset.__getitems__([3, 70])
    assert batch["views"].numel() == 0
    assert {name: list(arrays) for name, arrays in batch["targets"].items()} == {"beta": ["cls"]}
    assert torch.equal(batch["targets"]["beta"]["cls"], whole["targets"]["beta"]["cls"])


# Python 3.12 warns of any fork beside threads, which is how a DataLoader works.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_gives_the_same_batches(dataset: CachedViews, workers: int) -> None:
    dataset.__getitems__([0, 101])  # Open files must not trouble the workers.
    loader = DataLoader(
        dataset,
        batch_size=40,
        num_workers=workers,
        collate_fn=CachedViews.collate,
        multiprocessing_context="fork" if workers else None,
    )
    batches = list(loader)
    assert [len(batch["index"]) for batch in batches] == [40, 40, 22]
    for batch in batches:
        assert same(batch, dataset.__getitems__(batch["index"].tolist()))


def test_threads_may_share_a_dataset(feats: Path, dataset: CachedViews) -> None:
    chosen = np.random.default_rng(1).integers(len(dataset), size=(24, 5)).tolist()
    shared = CachedViews(select(Cache(feats)))
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(shared.__getitems__, chosen))
    for batch, indices in zip(batches, chosen, strict=True):
        assert same(batch, dataset.__getitems__(indices))


def test_a_dataset_can_be_pickled_fresh_or_used(dataset: CachedViews) -> None:
    fresh = pickle.loads(pickle.dumps(dataset))
    first = dataset.__getitems__([5, 50, 95])
    used = pickle.loads(pickle.dumps(dataset))
    assert same(first, fresh.__getitems__([5, 50, 95]))
    assert same(first, used.__getitems__([5, 50, 95]))


def test_a_part_of_the_cache_has_its_own_numbers(feats: Path, dataset: CachedViews) -> None:
    one = CachedViews(select(Cache(feats), views=1, tars=["train-000001"]))
    assert len(one) == 21
    batch, whole = one.__getitems__([4]), dataset.__getitems__([2 * (30 + 4)])
    assert torch.equal(batch["views"], whole["views"])
    assert torch.equal(batch["targets"]["alpha"]["cls"], whole["targets"]["alpha"]["cls"])


@pytest.fixture
def owned(tmp_path: Path, tars: list[Path], encoders: dict[str, Path]) -> Callable[..., Path]:
    """Makes a cache with image tars of its own, `data/*.tar` beside it, that may be damaged."""

    def make(store_views: str = "") -> Path:
        (tmp_path / "data").mkdir()
        mine = [str(shutil.copy(tar, tmp_path / "data")) for tar in tars]
        config = ExtractConfig(
            data=tuple(mine),
            cache=tmp_path / "feats",
            teachers=(f"alpha={encoders['alpha']}",),
            recipe=LABEL,
            views=2,
            batch_size=16,
            workers=2,
            store_views=store_views,
            device="cpu",
        )
        extract(config)
        return tmp_path / "feats"

    return make


def test_stored_pixels_need_no_tars(
    owned: Callable[..., Path], dataset: CachedViews, tmp_path: Path
) -> None:
    cache = owned(store_views="raw")
    shutil.rmtree(tmp_path / "data")
    stored = CachedViews(select(Cache(cache)))
    chosen = [0, 1, 33, 59, 60, 101]
    assert torch.equal(stored.__getitems__(chosen)["views"], dataset.__getitems__(chosen)["views"])
    stored.check_pixels()


def test_moved_tars_are_named_and_missing_ones_too(
    owned: Callable[..., Path], dataset: CachedViews, tmp_path: Path
) -> None:
    cache = owned()
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    selection = select(Cache(cache))
    with pytest.raises(CacheError, match=r"'train-000000' is at none of .*train-000000\.tar"):
        CachedViews(selection)[0]
    CachedViews(selection, pixels=False)[0]
    moved = {tar.stem: tar for tar in (tmp_path / "elsewhere").glob("*.tar")}
    found = CachedViews(selection, data=moved)
    found.check_pixels(len(found))
    assert torch.equal(found[77]["views"], dataset[77]["views"])
    moved["train-000001"].write_bytes(b"short")
    with pytest.raises(CacheError, match=r"train-000001\.tar has 5 bytes, at extraction it had"):
        CachedViews(selection, data=moved)[101]


def test_a_whole_cache_passes_the_check_of_its_pixels(dataset: CachedViews) -> None:
    dataset.check_pixels()
    dataset.check_pixels(count=1000, seed=3)


def test_shifted_parameters_are_found(feats: Path) -> None:
    for name in ("crop_top", "crop_left", "crop_height", "crop_width", "flip"):
        dataset = CachedViews(select(Cache(feats), views=1, tars=["train-000000"]))
        dataset[0]
        columns = dataset._units["views", 0, "train-000000"]._columns
        values = columns[name]
        # One pixel less, or more where there is none less.
        shifted = 1 - values if name == "flip" else np.where(values > 0, values - 1, values + 1)
        columns[name] = shifted.astype(values.dtype)
        with pytest.raises(ImageError, match=r"is not the one in the cache|does not lie within"):
            dataset.check_pixels()


def test_another_resampling_filter_is_found(
    dataset: CachedViews, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimpleNamespace(BICUBIC=InterpolationMode.BILINEAR)
    monkeypatch.setattr("extract.cache.views.InterpolationMode", other)
    with pytest.raises(ImageError, match="the view is not the one in the cache"):
        dataset.check_pixels()


def test_other_images_under_the_same_keys_are_found(
    owned: Callable[..., Path], tmp_path: Path
) -> None:
    cache = owned()
    path = tmp_path / "data" / "train-000001.tar"
    index, content = index_tar(path), bytearray(path.read_bytes())
    # Another picture of the tar over one that is at least as long, padded: sizes stay.
    donor = index.samples[0]
    data = index.read(donor, "jpg")
    (replaced,) = [s for s in index.samples[1:] if len(index.read(s, "jpg")) >= len(data)][
        :1
    ] or pytest.fail("no longer picture in the tar")
    member = replaced.members["jpg"]
    content[member.offset : member.offset + member.size] = data.ljust(member.size, b"\0")
    path.write_bytes(content)
    with pytest.raises((ImageError, CacheError), match=r"train-000001"):
        CachedViews(select(Cache(cache))).check_pixels(1000)


def test_a_tar_with_other_keys_is_found(owned: Callable[..., Path], tmp_path: Path) -> None:
    cache = owned()
    path = tmp_path / "data" / "train-000001.tar"
    content = path.read_bytes().replace(b"train-000001_0003.", b"train-000001_9003.")
    renamed = bytearray(content)
    for start in range(0, len(renamed), 512):
        header = renamed[start : start + 512]
        if header.startswith(b"train-000001_9003."):
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            renamed[start : start + 512] = header
    path.write_bytes(renamed)
    dataset = CachedViews(select(Cache(cache)))
    dataset[2 * (30 + 2)]
    with pytest.raises(CacheError, match=r"image 3 is 'train-000001_9003', not the one"):
        dataset[2 * (30 + 3)]


def test_a_shorter_tar_is_found(owned: Callable[..., Path], tmp_path: Path) -> None:
    cache = owned()
    write_tar(tmp_path / "data" / "train-000000.tar", 12)
    with pytest.raises(CacheError, match="at extraction it had"):
        CachedViews(select(Cache(cache))).check_pixels()
