"""Extraction end to end with tiny real encoders: the right features, the same tree however made."""

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import webdataset as wds
from conftest import SIZE, make_cache, open_unit, write_tar
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from extract.cache.codecs import FeatureError
from extract.cache.errors import CacheError
from extract.cache.images import decode, image_extension, index_tar
from extract.cache.reader import Cache, select
from extract.cache.views import draw_view, parse_recipe
from extract.config import ExtractConfig
from extract.run import extract

LABEL = f"unic@{SIZE}"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut can tell; extraction of small units is otherwise four fifths waiting."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def tree(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def config(
    cache: Path, tars: list[Path], encoders: dict[str, Path], *names: str, **changes: Any
) -> ExtractConfig:
    """What `make_cache` runs, with changes."""
    plain = ExtractConfig(
        data=tuple(map(str, tars)),
        cache=cache,
        teachers=tuple(f"{name}={encoders[name]}" for name in names),
        recipe=LABEL,
        views=2,
        batch_size=16,
        workers=2,
        device="cpu",
    )
    return replace(plain, **changes)


def rendered(tar: Path, view: int, seed: int = 0, label: str = LABEL) -> Tensor:
    """Every image of the tar as that view, uint8 [N, 3, S, S]: drawn and applied once more."""
    recipe, index, views = parse_recipe(label), index_tar(tar), []
    for sample in index.samples:
        image = decode(index.read(sample, image_extension(sample)), sample.key)
        place = (index.stem, sample.ordinal, sample.key, view)
        views.append(recipe.apply(image, draw_view(recipe, seed, *place, *image.shape[1:])))
    return torch.stack(views)


@torch.inference_mode()
def plain_tokens(folder: Path, views_N3SS: Tensor) -> Tensor:
    """The timm model's own tokens, float32 [N, 1 + P, D], without anything of ours."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    tokens: Tensor = model.forward_features((views_N3SS.float() / 255 - 0.5) / 0.5)
    return tokens


def test_features_are_those_of_the_timm_model_on_the_rendered_views(
    feats: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    for tar in tars:
        for view in (0, 1):
            views = rendered(tar, view)
            for name in ("alpha", "beta"):
                group = open_unit(feats, name, view, tar.stem)
                expected = plain_tokens(encoders[name], views).numpy()
                for array, tokens in (("cls", expected[:, 0]), ("patches", expected[:, 1:])):
                    found = np.asarray(group[array][:])
                    assert found.dtype == np.float16
                    np.testing.assert_allclose(
                        found.astype(np.float32), tokens, rtol=2.0**-11, atol=2e-5
                    )


def test_statistics_are_exact_over_all_rows_before_rounding(
    feats: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    selection = select(Cache(feats))
    views = torch.cat([rendered(tar, view) for tar in tars for view in (0, 1)])
    for name in ("alpha", "beta"):
        tokens = plain_tokens(encoders[name], views).double().numpy()
        for array, rows in (
            ("cls", tokens[:, 0]),
            ("patches", tokens[:, 1:].reshape(-1, tokens.shape[-1])),
        ):
            moments = selection.statistics(name)[array]
            assert moments.count == len(rows)
            np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(moments.std(), rows.std(0, ddof=1), rtol=1e-5)


def test_one_run_for_two_encoders_equals_two_runs_and_other_workers(
    feats: Path, tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    # Both copies lie as deep below their base as `feats` does, but not beside it.
    extract(config(tmp_path / "apart", tars, encoders, "beta", workers=1))
    extract(config(tmp_path / "apart", tars, encoders, "alpha", workers=5))
    together, apart = tree(feats), tree(tmp_path / "apart")
    assert together.keys() == apart.keys()
    changed = {name for name in together if together[name] != apart[name]}
    # The tars' records say where the tars are, seen from the cache.
    assert not {name for name in changed if not name.startswith("tars/")}


def test_views_tars_and_encoders_added_later_equal_all_at_once(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    extract(config(tmp_path / "once", tars, encoders, "alpha", "beta"))
    later = tmp_path / "later"
    extract(config(later, tars[1:], encoders, "alpha", views=1))
    extract(config(later, tars, encoders, "alpha", views=1))
    done = extract(config(later, tars, encoders, "alpha", "beta"))
    assert [line.computed for line in done] == [51, 102]
    assert tree(tmp_path / "once") == tree(later)
    again = extract(config(later, tars, encoders, "alpha", "beta"))
    assert [(line.images, line.computed) for line in again] == [(51, 0), (51, 0)]
    assert tree(tmp_path / "once") == tree(later)


@pytest.mark.parametrize("batch_size", [7, 21, 64])
def test_the_last_partial_batch_is_kept(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path], batch_size: int, feats: Path
) -> None:
    cache = tmp_path / "feats"
    extract(config(cache, tars[1:], encoders, "alpha", views=1, batch_size=batch_size))
    for array in ("key", "cls", "patches"):
        found = np.asarray(open_unit(cache, "alpha", 0, tars[1].stem)[array][:])
        expected = np.asarray(open_unit(feats, "alpha", 0, tars[1].stem)[array][:])
        if array == "key":
            np.testing.assert_array_equal(found, expected)
        else:
            np.testing.assert_allclose(
                found.astype(float), expected.astype(float), rtol=2e-3, atol=2e-5
            )


def test_an_image_is_decoded_once_for_all_encoders_and_views(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(data: bytes, where: str) -> Tensor:
        seen.append(where)
        return decode(data, where)

    monkeypatch.setattr("extract.rendering.decode", spy)
    extract(config(tmp_path / "feats", tars, encoders, "alpha", "beta", views=3))
    assert len(seen) == len(set(seen)) == 51


def changed_weights(source: Path, folder: Path, factor: float) -> Path:
    """A copy of a timm folder whose final norm is scaled."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"] = weights["norm.weight"] * factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("factor", "fault"), [(float("nan"), "is not finite"), (1e6, "expected finite values up to")]
)
def test_features_that_cannot_be_stored_stop_the_run_and_name_the_row(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path], factor: float, fault: str
) -> None:
    cache = tmp_path / "feats"
    extract(config(cache, tars, encoders, "alpha"))
    before = tree(cache)
    bad = changed_weights(encoders["beta"], tmp_path / "bad", factor)
    with pytest.raises(FeatureError, match=fault) as error:
        extract(config(cache, tars, {"bad": bad}, "bad"))
    assert "bad: cls of 'train-000000_0000'" in str(error.value)
    assert "tar train-000000, view 0" in str(error.value)
    after = tree(cache)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"bad/teacher.json", f"bad/{LABEL}/codec.json"}
    assert not list(cache.glob(".staging-*"))
    # Nothing relies on what is left, so mended weights may take the name.
    good = changed_weights(encoders["beta"], tmp_path / "good", 2.0)
    assert extract(config(cache, tars, {"bad": good}, "bad"))[0].computed == 102


def retarred(source: Path, target: Path, change: Callable[[int, str, bytes], bytes]) -> Path:
    """A copy of a tar with `change(number of the sample, extension, bytes)` of each member."""
    with wds.TarWriter(str(target), mtime=0) as out:
        index = index_tar(source)
        for i, sample in enumerate(index.samples):
            members = {ext: change(i, ext, index.read(sample, ext)) for ext in sample.members}
            out.write({"__key__": sample.key, **members})
    return target


def test_a_bad_image_leaves_earlier_tars_and_can_be_mended(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    def cut(i: int, ext: str, data: bytes) -> bytes:
        return data[: len(data) // 2] if i == 17 and ext == "jpg" else data

    data = tmp_path / "data"
    data.mkdir()
    mine = [Path(shutil.copy(tars[0], data)), retarred(tars[1], data / tars[1].name, cut)]
    with pytest.raises(Exception, match="train-000001_0017") as error:
        extract(config(tmp_path / "feats", mine, encoders, "alpha"))
    assert type(error.value).__name__ == "ImageError"
    stems = {path.stem for path in (tmp_path / "feats").glob("*/*/*/*.json")}
    assert stems == {"train-000000"}
    assert not list((tmp_path / "feats").rglob("*train-000001.zarr"))
    shutil.copy(tars[1], data)
    extract(config(tmp_path / "feats", mine, encoders, "alpha"))
    extract(config(tmp_path / "once", mine, encoders, "alpha"))
    assert tree(tmp_path / "feats") == tree(tmp_path / "once")


def test_other_weights_under_the_same_name_are_refused_or_replaced(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    extract(config(tmp_path / "feats", tars, encoders, "alpha", "beta"))
    cache = Cache(tmp_path / "feats")
    old, other = cache.encoder("alpha").weights_sha256, cache.encoder("beta").weights_sha256
    before = tree(cache.root)
    swapped = {"alpha": encoders["beta"]}
    with pytest.raises(CacheError, match="another encoder") as error:
        extract(config(cache.root, tars, swapped, "alpha"))
    assert old in str(error.value) and other in str(error.value)
    assert tree(cache.root) == before
    extract(config(cache.root, tars, swapped, "alpha", replace=True))
    assert cache.encoder("alpha").weights_sha256 == other
    after = tree(cache.root)
    kept = {name for name in before if not name.startswith("alpha/")}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    extract(config(tmp_path / "new", tars, swapped, "alpha"))
    assert tree(cache.root / "alpha") == tree(tmp_path / "new" / "alpha")
    select(cache)


def test_another_seed_a_foreign_folder_and_a_doubled_name_are_refused(
    fresh_cache: Callable[..., Path], tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    cache = fresh_cache("alpha")
    before = tree(cache)
    with pytest.raises(CacheError, match="made with seed 0, now --seed 5"):
        extract(config(cache, tars, encoders, "alpha", seed=5))
    assert tree(cache) == before and not list(cache.glob(".staging-*"))
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.jpg").write_bytes(b"1")
    with pytest.raises(CacheError, match=r"not empty and is no feature cache.*holiday\.jpg"):
        extract(config(foreign, tars, encoders, "alpha"))
    assert [path.name for path in foreign.iterdir()] == ["holiday.jpg"]
    twice = (f"a={encoders['alpha']}", f"a={encoders['beta']}")
    with pytest.raises(CacheError, match="would both be stored as 'a'"):
        extract(config(tmp_path / "new", tars, encoders, "alpha", teachers=twice))


def test_a_rewritten_tar_of_the_same_name_is_refused(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    tar = Path(shutil.copy(tars[1], tmp_path))
    extract(config(tmp_path / "feats", [tar], encoders, "alpha"))
    before = tree(tmp_path / "feats")
    other = bytearray(tar.read_bytes())
    index = index_tar(tar)
    other[index.samples[3].members["cls"].offset] ^= 1
    tar.write_bytes(other)
    with pytest.raises(CacheError, match="is not the tar that"):
        extract(config(tmp_path / "feats", [tar], encoders, "beta"))
    write_tar(tar, 20)
    with pytest.raises(CacheError, match="is not the tar that"):
        extract(config(tmp_path / "feats", [tar], encoders, "alpha"))
    after = tree(tmp_path / "feats")
    assert {name for name in after if not name.startswith("beta/")} == before.keys()
    assert before.items() <= after.items()
    assert not list((tmp_path / "feats").glob("beta/*/*/*"))


def test_stored_views_are_the_rendered_pixels(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path], feats: Path
) -> None:
    cache = tmp_path / "feats"
    extract(config(cache, tars, encoders, "alpha", "beta", store_views="raw"))
    for tar in tars:
        for view in (0, 1):
            group = open_unit(cache, "views", view, tar.stem)
            np.testing.assert_array_equal(group["pixels"][:], rendered(tar, view).numpy())
    for name in ("alpha", "beta"):
        zarrs = {k: v for k, v in tree(feats / name).items() if ".zarr/" in k}
        assert zarrs == {k: v for k, v in tree(cache / name).items() if ".zarr/" in k}


def test_an_image_folder_is_packed_and_extracted(tmp_path: Path, encoders: dict[str, Path]) -> None:
    rng = np.random.default_rng(0)
    for i in range(9):
        folder = tmp_path / "pictures" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    cache = tmp_path / "feats"
    arguments = config(cache, [tmp_path / "pictures"], encoders, "alpha")
    assert extract(arguments)[0].images == 9
    (tar,) = (cache / "images").glob("*.tar")
    with tarfile.open(tar) as archive:
        jpegs = [
            archive.extractfile(m).read()  # type: ignore[union-attr]
            for m in archive.getmembers()
            if m.name.endswith(".jpg")
        ]
    originals = [path.read_bytes() for path in (tmp_path / "pictures").rglob("*.jpg")]
    assert sorted(jpegs) == sorted(originals)
    assert all(Image.open(io.BytesIO(data)).size == (70, 60) for data in jpegs)
    group = open_unit(cache, "alpha", 1, tar.stem)
    expected = plain_tokens(encoders["alpha"], rendered(tar, 1)).numpy()[:, 0]
    np.testing.assert_allclose(group["cls"][:].astype(float), expected, rtol=2e-3, atol=2e-5)
    before = tree(cache)
    assert extract(arguments)[0].computed == 0
    assert tree(cache) == before


def test_encoders_of_another_grid_share_the_views(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    cache = make_cache(tmp_path / "feats", tars[1:], encoders, ("alpha", "wide"))
    selection = select(Cache(cache))
    assert Cache(cache).encoder("wide").arrays == {"cls": [48], "patches": [16, 48]}
    assert selection.encoders == ("alpha", "wide")
    group = open_unit(cache, "wide", 0, tars[1].stem)
    expected = plain_tokens(encoders["wide"], rendered(tars[1], 0)).numpy()[:, 1:]
    np.testing.assert_allclose(group["patches"][:].astype(float), expected, rtol=2e-3, atol=2e-5)
