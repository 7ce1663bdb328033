"""Damage to a whole cache: opening it and reading all of it finds everything, by name, every time.

`read_everything` is what training does, and the arrays besides that training never touches.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_encoder, write_tar
from test_kill_sweep import differences, tree

from distill.batches import TrainingBatches
from extract.cache import Cache, CachedViews, CacheError, UserError, select
from extract.cache.images import index_tar
from extract.cache.schema import VIEWS, ArraySpec, UnitRecord
from extract.cache.staging import Staging
from extract.cache.writer import UnitWriter, commit, group_name
from extract.config import ExtractConfig
from extract.run import extract

LABEL = "unic@32"
TARS = ("train-000000", "train-000001")
FLIPS = int(os.environ.get("BIT_FLIPS", "200"))
# Every n-th stored file is deleted; 1 deletes each.
STRIDE = int(os.environ.get("DELETE_STRIDE", "1"))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut can tell; extraction of small units is otherwise four fifths waiting."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two tars of four images, one view, two encoders. Read-only: copy it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data").mkdir()
    tars = [write_tar(folder / "data" / f"{stem}.tar", 4, seed=i) for i, stem in enumerate(TARS)]
    teachers = {
        name: write_encoder(folder / name, i, img_size=32, depth=1)
        for i, name in enumerate(("alpha", "beta"))
    }
    extract(
        ExtractConfig(
            data=tuple(map(str, tars)),
            cache=folder / "feats",
            teachers=tuple(f"{name}={path}" for name, path in teachers.items()),
            recipe=LABEL,
            views=1,
            batch_size=4,
            workers=1,
            device="cpu",
        )
    )
    read_everything(folder / "feats")
    return folder


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy of the cache, and of the tars beside it, to be damaged."""
    for name in ("data", "feats"):
        shutil.copytree(whole / name, tmp_path / name)
    return tmp_path / "feats"


def read_everything(root: Path) -> None:
    """Open the cache, read each array of each unit, each sample and all statistics."""
    cache = Cache(root)
    selection = select(cache)
    for owner in (VIEWS, *selection.encoders):
        for view, tar in sorted(cache.units(owner, LABEL)):
            unit = cache.unit(owner, LABEL, view, tar)
            for name in unit.record.arrays:
                unit.array(name).read_all()
    for encoder in selection.encoders:
        selection.statistics(encoder)
    dataset = CachedViews(selection)
    dataset.__getitems__(range(len(dataset)))
    dataset.check_pixels()


def complaint(read: Callable[[], object]) -> str:
    """What the reader says of the damage; empty where it finds none."""
    try:
        read()
    except UserError as error:
        return str(error)
    return ""


def stored_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def unnamed_when_deleted(root: Path, paths: list[Path]) -> list[tuple[str, str]]:
    """Those of `paths` whose loss the reader does not name, and what it says instead."""
    found = []
    for path in paths:
        kept = path.read_bytes()
        path.unlink()
        said = complaint(lambda: read_everything(root))
        parts = path.relative_to(root).parts
        # A unit without its manifest is named as a whole, and so is an encoder.
        whole = (
            path.suffix == ".json"
            and parts[0] in said
            and (path.stem in said or path.name in ("teacher.json", "codec.json"))
        )
        if not (path.name in said or whole):
            found.append(("/".join(parts), said))
        path.write_bytes(kept)
    read_everything(root)
    return found


def silent(path: Path) -> bool:
    """The files whose loss makes an encoder or a tar look as if it had never been there."""
    return path.name == "teacher.json" or (path.parts[-4] == VIEWS and path.suffix == ".json")


def test_every_deleted_file_is_named(damaged: Path) -> None:
    paths = [path for path in stored_files(damaged) if not silent(path)][::STRIDE]
    assert len(paths) > 100 // STRIDE
    assert not unnamed_when_deleted(damaged, paths)


def test_a_deleted_record_of_an_encoder_or_of_views_is_named(damaged: Path) -> None:
    paths = [path for path in stored_files(damaged) if silent(path)]
    assert len(paths) == 4
    assert not unnamed_when_deleted(damaged, paths)


def test_every_flipped_bit_is_found(damaged: Path) -> None:
    """Bits of shards, their indices, single chunks, metadata, manifests and records, in turns."""
    rng = np.random.default_rng(0)
    kinds: dict[str, list[Path]] = {}
    for path in stored_files(damaged):
        kind = path.name if path.suffix == ".json" else path.relative_to(path.parents[2]).parts[0]
        kinds.setdefault(kind if path.parent.name != "tars" else "tar record", []).append(path)
    assert {"cache.json", "teacher.json", "codec.json", "zarr.json", "tar record"} <= kinds.keys()
    missed = []
    for number in range(FLIPS):
        names = sorted(kinds)
        files = kinds[names[number % len(names)]]
        path = files[rng.integers(len(files))]
        kept = path.read_bytes()
        # The second half of the flips of a kind goes to the end of the file: a shard's index.
        last = kept if number < FLIPS // 2 else kept[-64:]
        bit = int(rng.integers(len(last) * 8)) + (len(kept) - len(last)) * 8
        flipped = bytearray(kept)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        if not complaint(lambda: read_everything(damaged)):
            missed.append((path, bit))
        path.write_bytes(kept)
    assert not missed
    read_everything(damaged)


def test_every_picture_with_a_flipped_bit_is_found(damaged: Path) -> None:
    """In an image tar that was changed after extraction, of the same size and keys."""
    rng = np.random.default_rng(1)
    for stem in TARS:
        path = damaged.parent / "data" / f"{stem}.tar"
        kept, index = path.read_bytes(), index_tar(path)
        for sample in index.samples:
            member, flipped = sample.members["jpg"], bytearray(kept)
            flipped[member.offset + rng.integers(member.size)] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            dataset = CachedViews(select(Cache(damaged)))
            said = complaint(lambda dataset=dataset: dataset.__getitems__(range(len(dataset))))
            assert path.name in said and sample.key in said, said
        path.write_bytes(kept)
    read_everything(damaged)


def rewritten(cache: Cache, owner: str, tar: str, order: list[int], **changes: object) -> None:
    """Publish a unit again with its rows in another order, all seals and checksums as they belong.

    The manifest still says what it said, but for `changes`.
    """
    manifest = cache.layout.manifest(owner, LABEL, 0, tar)
    unit = cache.unit(owner, LABEL, 0, tar)
    specs = {
        name: ArraySpec(dtype, tuple(shape), unit.array(name).sharded)
        for name, (dtype, shape) in unit.record.arrays.items()
    }
    with Staging(cache.root) as staging:
        writer = UnitWriter(staging.folder / "unit.zarr", len(order), specs)
        for name in specs:
            writer.append(name, unit.array(name).read(np.array(order)))
        objects = writer.finish()
        record = replace(unit.record, objects=objects, group=group_name(tar, objects), **changes)
        manifest.unlink()
        assert commit(cache.layout, owner, writer, record, staging.folder)


@pytest.mark.parametrize(
    ("order", "changes"),
    [([1, 0, 2, 3], {}), ([0, 1, 2, 2], {}), ([0, 1, 2], {"rows": 3}), ([0, 1, 2], {})],
    ids=["permuted", "doubled", "dropped", "dropped in silence"],
)
def test_rows_of_features_that_are_not_those_of_the_views_are_refused(
    damaged: Path, order: list[int], changes: dict[str, object]
) -> None:
    cache = Cache(damaged)
    rewritten(cache, "beta", TARS[1], order, **changes)
    said = complaint(lambda: first_batches(damaged))
    assert "beta" in said and TARS[1] in said, said


def first_batches(root: Path) -> None:
    """Batches of training until each image was wanted once."""
    batches = TrainingBatches(root, batch_size=4, seed=0)
    for _ in batches.iterate(0, batches.steps_per_epoch, 1):
        pass


def test_rows_that_are_as_they_were_are_accepted(damaged: Path) -> None:
    rewritten(Cache(damaged), "beta", TARS[1], [0, 1, 2, 3])
    first_batches(damaged)


def test_views_and_features_that_are_misjoined_alike_are_refused(damaged: Path) -> None:
    """All owners in the same wrong order: they agree with each other, but not with the images."""
    cache = Cache(damaged)
    rewritten(cache, VIEWS, TARS[0], [3, 1, 2, 0])
    views = UnitRecord.read(cache.layout.manifest(VIEWS, LABEL, 0, TARS[0])).seal()
    for encoder in ("alpha", "beta"):
        rewritten(cache, encoder, TARS[0], [3, 1, 2, 0], views=views)
    # Each row still knows its image, so that nothing is mixed up by this.
    CachedViews(select(cache)).check_pixels(100)
    unit = cache.unit(VIEWS, LABEL, 0, TARS[0])
    assert unit.column("image_index").tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("owner", [VIEWS, "alpha"])
def test_units_swapped_between_tars_are_refused(damaged: Path, owner: str) -> None:
    """Groups and manifests of two tars of as many rows under each other's names."""
    folder = damaged / owner / LABEL / "0"
    for path in sorted(folder.iterdir()):
        other = TARS[1 - TARS.index(path.name[: len(TARS[0])])]
        path.rename(path.with_name("swapped-" + path.name.replace(path.name[: len(other)], other)))
    for path in sorted(folder.iterdir()):
        path.rename(path.with_name(path.name.removeprefix("swapped-")))
    said = complaint(lambda: first_batches(damaged))
    assert said and any(tar in said for tar in TARS), said


def test_groups_swapped_below_their_manifests_are_refused(damaged: Path) -> None:
    """The manifests stay; each names a group of the right sizes with the other tar's rows."""
    folder = damaged / "alpha" / LABEL / "0"
    first, second = sorted(path for path in folder.iterdir() if path.is_dir())
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    said = complaint(lambda: first_batches(damaged))
    assert "other keys" in said and "alpha" in said, said


def test_reading_changes_nothing(damaged: Path) -> None:
    before = tree(damaged.parent)
    read_everything(damaged)
    first_batches(damaged)
    assert differences(before, tree(damaged.parent)) == []


def test_a_missing_cache_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not a feature cache"):
        Cache(tmp_path / "none")
    assert not list(tmp_path.iterdir())
