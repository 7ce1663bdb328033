"""cache_layout.md is enough: a reader made from it alone agrees with ours, ours reads a cache made
by it alone, and the stored fixture of this format version keeps its values in both.

N = rows, D = channels, P = patch tokens, K = kept ones, S = view size.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_reader as foreign
import numpy as np
import pytest
import torch
import zarr
from conftest import SIZE, write_tar
from foreign_reader import BrokenError, ForeignCache
from PIL import Image
from zarr.codecs import Crc32cCodec, ZstdCodec

from extract.cache import Batch, Cache, CachedViews, CacheError, select
from extract.cache.codecs import Codec
from extract.config import ExtractConfig
from extract.run import extract

LABEL = f"unic@{SIZE}"
FIXTURE = Path(__file__).parent / "fixture" / "cache.tar.xz"
# As cache_layout.md says of views that are made again.
TOLERANCE = 2
OPTIONS: dict[str, dict[str, Any]] = {
    "float16": {},
    "int8, kept patches, raw views": {"codec": "int8", "patches": 4, "store_views": "raw"},
    "int8-zstd, views as JPEG": {"codec": "int8-zstd", "store_views": "jpeg"},
    "int4, bad images": {"codec": "int4", "patches": 7, "skip_bad": True, "max_bad": 0.5},
    "CLS tokens alone": {"tokens": "cls"},
    "whole images": {"recipe": f"center@{SIZE}", "views": 1, "codec": "int8"},
    "central crops": {"recipe": f"center@{SIZE}r61", "views": 1, "codec": "int4"},
}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut can tell; extraction of small units is otherwise four fifths waiting."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def two_tars(tmp_path: Path) -> list[Path]:
    """6 and 4 pictures; the second picture of the second tar is cut in half."""
    whole, other = (write_tar(tmp_path / f"p-{i}.tar", 6 - 2 * i, seed=i) for i in range(2))
    with tarfile.open(other) as archive:
        members = [(m, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    with tarfile.open(other, "w") as archive:
        for member, content in members:
            if member.name == "p-1_0001.jpg":
                content = content[: len(content) // 2]
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return [whole, other]


@pytest.fixture
def make(
    tmp_path: Path, two_tars: list[Path], encoders: dict[str, Path]
) -> Callable[[dict[str, Any]], Path]:
    """Extracts `alpha` with options; also the tar with the bad picture where these skip it."""

    def run(options: dict[str, Any]) -> Path:
        plain = {"recipe": LABEL, "views": 2, "workers": 1, "batch_size": 8, "device": "cpu"}
        data = tuple(map(str, two_tars[: 2 if options.get("skip_bad") else 1]))
        cache, teachers = tmp_path / "feats", (f"alpha={encoders['alpha']}",)
        extract(ExtractConfig(**{**plain, **options}, data=data, cache=cache, teachers=teachers))
        return cache

    return run


def assert_same(cache: Path, encoder: str, recipe: str) -> None:
    """Both readers give the same of one encoder and recipe: to the bit but for blended pixels."""
    dataset = CachedViews(select(Cache(cache), encoders=[encoder], recipe=recipe))
    dataset.check_pixels(1000)
    batch, theirs = dataset.__getitems__(range(len(dataset))), ForeignCache(cache)
    chosen, first = dataset.selection, 0
    units = [(encoder, recipe, view, tar) for view in chosen.views for tar in chosen.tars]
    assert theirs.units(encoder, recipe) == sorted(units)
    for tar in chosen.tars:
        rows = theirs.tar(tar)["rows"]
        for number, view in enumerate(chosen.views):
            samples = (first + np.arange(rows)) * len(chosen.views) + number
            assert_same_unit(theirs, (encoder, recipe, view, tar), samples, batch)
        first += rows
    assert first * len(chosen.views) == len(dataset)
    merged = theirs.statistics(encoder, recipe, chosen.views, chosen.tars)
    exact = chosen.statistics(encoder)
    assert set(merged) == set(exact)
    for name, moments in exact.items():
        assert merged[name]["count"] == moments.count
        np.testing.assert_array_equal(merged[name]["mean"], moments.mean)
        np.testing.assert_array_equal(merged[name]["m2"], moments.m2)


def assert_same_unit(
    theirs: ForeignCache, unit: tuple[str, str, int, str], samples: np.ndarray, batch: Batch
) -> None:
    """`samples` are the places of the unit's rows in `batch`."""
    encoder, recipe, view, tar = unit
    tokens, targets = theirs.features(*unit), batch["targets"][encoder]
    assert set(tokens) == set(targets)
    for name, values in targets.items():
        assert tokens[name].dtype == np.float16
        np.testing.assert_array_equal(
            tokens[name].view(np.uint16), values[samples].numpy().view(np.uint16)
        )
    positions = theirs.positions(*unit)
    assert (positions is None) == (encoder not in batch["positions"])
    if positions is not None:
        np.testing.assert_array_equal(positions, batch["positions"][encoder][samples].numpy())
    ours = batch["views"][samples].numpy()
    difference = np.abs(theirs.views(recipe, view, tar).astype(np.int16) - ours)
    columns = theirs.arrays("views", recipe, view, tar)
    exact = "pixels" in columns or "jpeg" in columns or recipe.startswith("center@")
    assert difference.max() <= (0 if exact else TOLERANCE)
    assert (difference == 0).mean() > 0.999
    for row, pixels in enumerate(ours):
        grid, number = foreign.fingerprint(pixels)
        np.testing.assert_array_equal(grid, columns["fingerprint_grid"][row])
        assert number == columns["fingerprint_hash"][row]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_both_readers_agree(
    options: dict[str, Any], make: Callable[[dict[str, Any]], Path]
) -> None:
    cache = make(options)
    assert_same(cache, "alpha", options.get("recipe", LABEL))


def test_the_foreign_reader_names_skipped_images(make: Callable[[dict[str, Any]], Path]) -> None:
    cache = ForeignCache(make({"skip_bad": True, "max_bad": 0.5}))
    assert [cache.tar(stem)["rows"] for stem in cache.tars()] == [6, 3]
    ((ordinal, key, reason),) = cache.tar("p-1")["skipped"]
    assert (ordinal, key) == (1, "p-1_0001") and "cannot be decoded" in reason
    assert cache.arrays("views", LABEL, 0, "p-1")["image_index"].tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("path", "place", "refusal"),
    [
        (f"feats/alpha/{LABEL}/0/*.zarr/cls/c/0/0", b"", "not what its manifest says"),
        (f"feats/alpha/{LABEL}/0/p-0.json", b'"rows": ', "its content_sha256"),
        (f"feats/views/{LABEL}/0/p-0.json", b'"rows": ', "its content_sha256"),
        ("feats/tars/p-0.json", b'"rows": ', "its content_sha256"),
        ("p-0.tar", b"", "another tar"),
    ],
)
def test_a_changed_bit_is_found_by_a_seal(
    path: str, place: bytes, refusal: str, make: Callable[[dict[str, Any]], Path]
) -> None:
    cache = make({})
    read_all(ForeignCache(cache), ("alpha", LABEL, 0, "p-0"))
    (file,) = cache.parent.glob(path)
    damaged = bytearray(file.read_bytes())
    # The last bit of a digit in JSON, that of the first byte elsewhere.
    damaged[damaged.index(place) + len(place)] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(BrokenError, match=refusal):
        read_all(ForeignCache(cache), ("alpha", LABEL, 0, "p-0"))


def test_files_that_no_manifest_names_are_found(make: Callable[[dict[str, Any]], Path]) -> None:
    cache = make({})
    (group,) = (cache / "alpha" / LABEL / "0").glob("*.zarr")
    (group / "more").touch()
    with pytest.raises(BrokenError, match="other files than its manifest"):
        ForeignCache(cache).features("alpha", LABEL, 0, "p-0")


def read_all(cache: ForeignCache, unit: tuple[str, str, int, str]) -> None:
    cache.features(*unit)
    cache.positions(*unit)
    cache.views(*unit[1:])


# A cache by hand ---------------------------------------------------------------------------------

HAND, BAD, SIDE = "center@16", 1, 16
MEAN, STD = [0.0, 1.0, -2.0, 0.5], [1.0, 2.0, 0.5, 0.25]
BY_HAND = {
    "fp16": ("", None),
    "int8": ("raw", [0, 2, 3]),
    "int8-zstd": ("jpeg", None),
    "int4": ("", [1, 2, 3]),
}


def write_sealed(path: Path, content: dict[str, Any]) -> str:
    """A JSON file with its seal, which is returned."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    seal = hashlib.sha256(text.encode()).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "content_sha256": seal}, sort_keys=True, indent=1))
    return seal


def write_unit(
    root: Path, owner: str, view: int, record: dict[str, Any], arrays: dict[str, np.ndarray]
) -> str:
    """A Zarr group and the manifest that names it, whose seal is returned."""
    place = root / owner / HAND / str(view)
    group = zarr.create_group(place / "new", zarr_format=3)
    for name, values in arrays.items():
        write_array(group, name, values, "zstd" in record["how"] and name == "patches")
    files = sorted(path for path in (place / "new").rglob("*") if path.is_file())
    objects = {
        path.relative_to(place / "new").as_posix(): [
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        ]
        for path in files
    }
    table = json.dumps(objects, sort_keys=True, separators=(",", ":"))
    name = f"hand-{hashlib.sha256(table.encode()).hexdigest()[:12]}.zarr"
    (place / "new").rename(place / name)
    shapes = {name: [str(values.dtype), [*values.shape[1:]]] for name, values in arrays.items()}
    empty = {"views": None, "encoder": None, "codec": None, "subset": None}
    content = {**empty, "statistics": {}, "rescaled": 0, **record, "recipe": HAND, "view": view}
    del content["how"]
    content |= {"group": name, "arrays": shapes, "objects": objects}
    return write_sealed(place / "hand.json", content)


def write_array(group: zarr.Group, name: str, values: np.ndarray, zstd: bool) -> None:
    """One array; large ones are cut into inner chunks in shards of 32 rows, the others whole."""
    large = name in ("cls", "patches", "scale_patches", "pixels", "patch_index")
    rest = values.shape[1:]
    fill = {"f": float("nan"), "i": -128 if values.dtype == np.int8 else 0, "u": 0}
    group.create_array(
        name,
        shape=values.shape,
        chunks=(16 if large else len(values), *rest),
        shards=(32, *rest) if large else None,
        dtype=values.dtype,
        compressors=[*([ZstdCodec()] if zstd else []), Crc32cCodec()],
        fill_value=fill[values.dtype.kind],
        config={"write_empty_chunks": True},
    )[:] = values


def write_images(path: Path) -> list[np.ndarray]:
    """A tar of four samples, the one numbered `BAD` no picture; the images `[16, 20, 3]`."""
    rng = np.random.default_rng(5)
    images = [rng.integers(0, 256, (SIDE, 20, 3), dtype=np.uint8) for _ in range(4)]
    with tarfile.open(path, "w") as archive:
        for i, image in enumerate(images):
            out = io.BytesIO(b"no picture" if i == BAD else b"")
            if i != BAD:
                Image.fromarray(image).save(out, "PNG")
            files = {f"class/é{i}.cls": b"0", f"class/é{i}.png": out.getvalue()}
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return images


def hand_made_views(images: list[np.ndarray], view: int, pixels: str) -> dict[str, np.ndarray]:
    """Parameters of crops at column 1 or 2 and what is stored of them; `views` are the pixels."""
    rows, left = [i for i in range(4) if i != BAD], view + 1
    made = [np.ascontiguousarray(images[i][:, left : left + SIDE]) for i in rows]
    pictures = [io.BytesIO() for _ in rows]
    for out, pixels_SS3 in zip(pictures, made, strict=True):
        Image.fromarray(pixels_SS3).save(out, "JPEG", quality=95, subsampling=0)
    if pixels == "jpeg":
        made = [np.array(Image.open(out)) for out in pictures]
    views = np.stack(made).transpose(0, 3, 1, 2)
    prints = [foreign.fingerprint(view_3SS) for view_3SS in views]
    numbers = {"resized_height": 16, "resized_width": 20, "crop_top": 0, "crop_left": left}
    data = [out.getvalue() for out in pictures]
    bounds = np.cumsum([0, *map(len, data)], dtype=np.uint64)
    stored = {
        "raw": {"pixels": np.ascontiguousarray(views)},
        "jpeg": {"jpeg": np.frombuffer(b"".join(data), np.uint8), "jpeg_offset": bounds},
    }
    return {
        "views": views,
        "image_index": np.array(rows, np.int32),
        "fingerprint_grid": np.stack([grid for grid, _ in prints]),
        "fingerprint_hash": np.array([number for _, number in prints], np.uint64),
        **{name: np.full(len(rows), value, np.int32) for name, value in numbers.items()},
        **stored.get(pixels, {}),
    }


def coded_patches(codec: str, shape: tuple[int, ...], view: int) -> dict[str, np.ndarray]:
    """Stored arrays of patch tokens, and under `tokens` what they mean: exact in float16."""
    rng = np.random.default_rng([7, view])
    scale = rng.choice(np.array([1, 2], np.float16), shape[:-1])
    if codec == "fp16":
        values = (rng.integers(-99, 99, shape) / 8).astype(np.float16)
        return {"tokens": values, "patches": values}
    if codec == "int4":
        q = rng.integers(0, 16, shape)
        z = ((q + 0.5) / 8 - 1) * 2.75
        stored = (q[..., 0::2] + 16 * q[..., 1::2]).astype(np.uint8)
    else:
        q = rng.integers(-31, 32, shape)
        z, stored = q / (16 if codec == "int8" else 8), q.astype(np.int8)
    tokens = np.array(MEAN) + np.array(STD) * scale[..., None] * z
    assert np.array_equal(tokens, tokens.astype(np.float16))
    return {"tokens": tokens, "patches": stored, "scale_patches": scale}


def moments(tokens: np.ndarray) -> dict[str, Any]:
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    mean = flat.mean(0)
    m2 = ((flat - mean) ** 2).sum(0)
    return {"count": len(flat), "mean": mean.tolist(), "m2": m2.tolist()}


def teacher_record() -> dict[str, Any]:
    """Every field of teacher.json; what a reader needs of it is the grid."""
    words = ("source", "architecture", "weights_sha256", "global_token", "tap", "interpolation")
    words = (*words, "position_embedding", "precision", "licence")
    shapes = {"size": SIDE, "grid": [2, 2], "patch_size": 8, "parameters": 1}
    arrays = {"cls": [4], "patches": [4, 4]}
    colours = {"mean": [0.5] * 3, "std": [0.5] * 3}
    free = {"name": "hand", "environment": {}, "arrays": arrays}
    return {**dict.fromkeys(words, "none"), **shapes, **colours, **free}


def write_by_hand(root: Path, codec: str, fault: str = "") -> list[dict[str, np.ndarray]]:
    """A whole cache of one tar, two views, one encoder; what was put in, by view.

    `fault` names a seal, or one of the arrays by which rows are joined, to be made wrong.
    """
    pixels, kept = BY_HAND[codec]
    images = write_images(root.parent / "hand.tar")
    data = (root.parent / "hand.tar").read_bytes()
    samples = [s for i, s in enumerate(foreign.read_tar(root.parent / "hand.tar")) if i != BAD]
    keys = [key for key, _ in samples]
    write_sealed(root / "cache.json", {"format_version": 0, "seed": 3, "decoder": "pillow-rgb"})
    tar = {"rows": 3, "keys_digest": foreign.keys_digest(keys)}
    sha256 = hashlib.sha256(data).hexdigest()
    place = {"stem": "hand", "locations": ["../hand.tar"], "bytes": len(data), "sha256": sha256}
    write_sealed(
        root / "tars" / "hand.json", {**tar, **place, "skipped": [[BAD, "class/é1", "no picture"]]}
    )
    teacher = write_sealed(root / "hand" / "teacher.json", teacher_record())
    count = len(kept) if kept else 4
    stored = {"codec": codec, "arrays": {"cls": [4], "patches": [count, 4]}, "fidelity": {}}
    calibration = {} if codec == "fp16" else {"mean": MEAN, "std": STD}
    stored |= {"patches": count if kept else None, "calibration": calibration}
    how = write_sealed(root / "hand" / HAND / "codec.json", stored)
    unit = {"tar": "hand", "tar_sha256": sha256, **tar, "how": codec}
    number = np.array([foreign.key_number(key) for key in keys], np.uint64)
    checksums = np.array([foreign.crc32c(data) for _, data in samples], np.uint32)
    content = []
    for view in range(2):
        columns = hand_made_views(images, view, pixels)
        put = {"views": columns.pop("views")}
        columns |= {"key": number, "image_crc32c": checksums}
        if fault in columns and fault != "key":
            columns[fault] = columns[fault][[1, 0, 2]]
        origin = {"views": write_unit(root, "views", view, unit, columns)}
        if kept:
            index = np.array([kept] * 3, np.uint16)
            arrays = {"key": number, "patch_index": index}
            origin["subset"] = write_unit(root, "patches@2x2", view, {**unit, **origin}, arrays)
            put["positions"] = index.astype(np.int64)
        patches = coded_patches(codec, (3, count, 4), view)
        put["patches"] = patches.pop("tokens")
        put["cls"] = np.arange(12, dtype=np.float16).reshape(3, 4) / 8 + view
        statistics = {name: moments(put[name]) for name in ("cls", "patches")}
        record = {**unit, **origin, "encoder": teacher, "codec": how, "statistics": statistics}
        record |= {fault: "0" * 64} if fault in record else {}
        keys_N = number[::-1].copy() if fault == "key" else number
        write_unit(root, "hand", view, record, {"key": keys_N, "cls": put["cls"], **patches})
        content.append(put)
    return content


@pytest.mark.parametrize("codec", BY_HAND)
def test_a_cache_made_by_hand_is_read(codec: str, tmp_path: Path) -> None:
    put = write_by_hand(tmp_path / "feats", codec)
    dataset = CachedViews(select(Cache(tmp_path / "feats")))
    dataset.check_pixels()
    batch = dataset.__getitems__(range(len(dataset)))
    assert len(dataset) == 6 and ("hand" in batch["positions"]) == ("positions" in put[0])
    for view, values in enumerate(put):
        found = {**batch["targets"]["hand"], "views": batch["views"]}
        if "positions" in values:
            found["positions"] = batch["positions"]["hand"]
        for name, expected in values.items():
            np.testing.assert_array_equal(found[name][view::2].numpy(), expected, err_msg=name)
    for name, exact in dataset.selection.statistics("hand").items():
        flat = np.concatenate([values[name] for values in put]).reshape(-1, 4).astype(np.float64)
        assert exact.count == len(flat)
        np.testing.assert_allclose(exact.mean, flat.mean(0), rtol=1e-12)
        np.testing.assert_allclose(exact.std(), flat.std(0, ddof=1), rtol=1e-12)
    assert_same(tmp_path / "feats", "hand", HAND)


@pytest.mark.parametrize("codec", ["int8", "int8-zstd", "int4"])
def test_decoding_rounds_alike(codec: str) -> None:
    """The order of the operations shows in one value of some thousands only."""
    rng, shape = np.random.default_rng(11), (64, 64, 32)
    packed = codec == "int4"
    low, high = (0, 256) if packed else (-127, 128)
    stored = {
        "patches": rng.integers(low, high, shape).astype(np.uint8 if packed else np.int8),
        "scale_patches": rng.uniform(1, 3, shape[:2]).astype(np.float16),
    }
    stored["scale_patches"][::2] = 1
    channels = shape[-1] * (2 if packed else 1)
    mean, std = rng.normal(0, 1, channels), rng.uniform(0.1, 2, channels)
    calibration = {n: v.astype(np.float32).tolist() for n, v in (("mean", mean), ("std", std))}
    arrays = {name: torch.from_numpy(array) for name, array in stored.items()}
    ours = Codec(codec, calibration).decode(arrays, "patches").numpy()
    theirs = foreign.decode({"codec": codec, "calibration": calibration}, stored)
    np.testing.assert_array_equal(ours.view(np.uint16), theirs.view(np.uint16))


def test_a_group_is_named_by_its_content(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "feats", "fp16")
    path = tmp_path / "feats" / "hand" / HAND / "0" / "hand.json"
    content = json.loads(path.read_text())
    del content["content_sha256"]
    other = f"hand-{'0' * 12}.zarr"
    (path.parent / content["group"]).rename(path.parent / other)
    write_sealed(path, {**content, "group": other})
    with pytest.raises(BrokenError, match="another digest"):
        ForeignCache(tmp_path / "feats").features("hand", HAND, 0, "hand")


JOINS = {
    **{name: f"{name} do not match" for name in ("views", "encoder", "codec")},
    **{"subset": "kept patches do not match", "tar_sha256": "tar sha256 do not match"},
    **{"keys_digest": "keys do not match", "key": "other keys than the views"},
    **{"image_index": "is 'class/é2', not the one", "image_crc32c": "bytes of image 0"},
}


THEIRS = {
    **{"tar_sha256": "features of another tar", "keys_digest": "features of other keys"},
    **{"key": "other keys than the views", "image_index": "image 2 is class/é2"},
    "image_crc32c": "image 0 has other bytes",
}


@pytest.mark.parametrize(("fault", "refusal"), JOINS.items())
def test_both_refuse_rows_that_do_not_belong_together(
    fault: str, refusal: str, tmp_path: Path
) -> None:
    write_by_hand(tmp_path / "feats", "int4", fault)
    with pytest.raises(CacheError, match=refusal):
        CachedViews(select(Cache(tmp_path / "feats"))).__getitems__([0])
    with pytest.raises(BrokenError, match=THEIRS.get(fault, f"another {fault}")):
        read_all(ForeignCache(tmp_path / "feats"), ("hand", HAND, 0, "hand"))


# The fixture -------------------------------------------------------------------------------------


# Of each array: the sum of its values and the last of them; of patch tokens also how many were
# beyond the codec's range.
GOLDEN: dict[tuple[str, str, int], dict[str, tuple[float, ...]]] = {
    ("four", "center@16", 0): {
        "cls": (5.5100555419921875, 0.60107421875),
        "patches": (3.6219853162765503, 0.0164337158203125, 0),
    },
    ("four", "center@16r20", 0): {
        "cls": (5.533905029296875, 0.6005859375),
        "patches": (0.2673305869102478, 0.371337890625, 0),
    },
    ("four", "unic@16", 0): {
        "cls": (5.331146240234375, 0.5830078125),
        "patches": (17.514130890369415, 1.181640625, 3),
    },
    ("four", "unic@16", 1): {
        "cls": (5.33642578125, 0.6572265625),
        "patches": (21.003440856933594, 0.978515625, 20),
    },
    ("kept", "center@16r20", 0): {"cls": (-2.30584716796875, -0.226318359375)},
    ("kept", "unic@16", 0): {
        "cls": (-3.18023681640625, -0.2401123046875),
        "patches": (-4.923290252685547, -0.1187744140625, 0),
    },
    ("kept", "unic@16", 1): {
        "cls": (-2.66046142578125, -0.252197265625),
        "patches": (-8.89898681640625, -0.13134765625, 2),
    },
}
CODECS = {"center@16": "int8-zstd", "center@16r20": "fp16", "unic@16": "int4"}
POSITIONS = ([[0, 1, 3], [0, 1, 3], [0, 1, 2]], [[1, 2, 3], [0, 1, 3], [0, 1, 3]])
# Sums of all pixels; views of 16 pixels a side are their own fingerprints.
PIXELS = {("center@16", 0): 269340, ("center@16r20", 0): 267079}
PRINTS = {**PIXELS, ("unic@16", 0): 293691, ("unic@16", 1): 254525}
STATISTICS = {"cls": (6, 1.7779747011760871, 0.04045750807536254)}
STATISTICS |= {"patches": (96, 0.3924723702463477, 87.62558471736881)}


@pytest.fixture(scope="module")
def fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored cache of this format version, unpacked; made by make_fixture.py."""
    folder = tmp_path_factory.mktemp("fixture")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "feats"


@pytest.mark.parametrize(("encoder", "recipe"), sorted({key[:2] for key in GOLDEN}))
def test_both_readers_agree_on_the_fixture(encoder: str, recipe: str, fixture: Path) -> None:
    assert_same(fixture, encoder, recipe)


def test_features_of_the_fixture_keep_their_values(fixture: Path) -> None:
    cache = ForeignCache(fixture)
    found = {unit[:3] for owner in ("four", "kept") for unit in cache.units(owner)}
    assert found == set(GOLDEN)
    for unit, golden in GOLDEN.items():
        tokens = cache.features(*unit, "photos")
        assert set(tokens) == set(golden)
        for name, (total, last, *rescaled) in golden.items():
            values = tokens[name].astype(np.float64)
            assert (values.sum(), values.flat[-1]) == (total, last), (unit, name)
            assert rescaled in ([], [cache.manifest(*unit, "photos")["rescaled"]])
    for recipe, codec in CODECS.items():
        assert Cache(fixture).codec("four", recipe).codec == codec
    for view, kept in enumerate(POSITIONS):
        positions = cache.positions("kept", "unic@16", view, "photos")
        assert positions is not None and positions.tolist() == kept


def test_views_and_statistics_of_the_fixture_keep_their_values(fixture: Path) -> None:
    cache = ForeignCache(fixture)
    ((ordinal, key, reason),) = cache.tar("photos")["skipped"]
    assert (ordinal, key) == (3, "n03/cut") and "cannot be decoded" in reason
    for (recipe, view), total in PRINTS.items():
        columns = cache.arrays("views", recipe, view, "photos")
        assert columns["fingerprint_grid"].sum() == total
        assert columns["image_index"].tolist() == [0, 1, 2]
        assert columns["key"][0] == 1499969632960066467
        if (recipe, view) in PIXELS:
            assert cache.views(recipe, view, "photos").sum() == total
    merged = cache.statistics("four", "unic@16", (0, 1), ("photos",))
    for name, (count, mean, m2) in STATISTICS.items():
        assert merged[name]["count"] == count
        np.testing.assert_allclose(merged[name]["mean"].sum(), mean, rtol=1e-14)
        np.testing.assert_allclose(merged[name]["m2"].sum(), m2, rtol=1e-14)


def test_another_format_version_is_refused_by_both(tmp_path: Path) -> None:
    content = {"format_version": 7, "seed": 0, "decoder": "pillow-rgb"}
    write_sealed(tmp_path / "cache.json", content)
    with pytest.raises(CacheError, match=r"format version 7, this unic-extract reads version \d"):
        Cache(tmp_path)
    with pytest.raises(BrokenError, match="format_version 7"):
        ForeignCache(tmp_path)
