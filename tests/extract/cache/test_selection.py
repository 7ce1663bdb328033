"""Choosing a part of a cache: what is whole is accepted, anything else is refused by name."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE

from extract.cache import Cache, CacheError, select
from extract.cache.schema import (
    CacheRecord,
    CodecRecord,
    EncoderRecord,
    Record,
    TarRecord,
    UnitRecord,
)
from extract.cache.staging import Staging
from extract.cache.statistics import Moments, merged
from extract.config import ExtractConfig
from extract.run import extract

LABEL = f"unic@{SIZE}"
TARS = ("train-000000", "train-000001")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut can tell; extraction of small units is otherwise four fifths waiting."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def cache(feats: Path, tmp_path: Path) -> Cache:
    """A copy of the complete cache, for damage."""
    shutil.copytree(feats, tmp_path / "feats")
    return Cache(tmp_path / "feats")


def rewrite(cache: Cache, path: Path, record: Record) -> None:
    """Put another record, sealed as it should be, in the place of one."""
    with Staging(cache.root) as staging:
        record.write(path, staging.folder)


def test_everything_is_chosen_unless_named(feats: Path) -> None:
    cache = Cache(feats)
    selection = select(cache)
    assert (selection.encoders, selection.recipe) == (("alpha", "beta"), LABEL)
    assert (selection.views, selection.tars) == ((0, 1), TARS)
    assert selection.rows_per_tar.tolist() == [30, 21]
    part = select(cache, encoders=["beta"], recipe=LABEL, views=1, tars=[TARS[1]])
    assert (part.encoders, part.views, part.tars) == (("beta",), (0,), (TARS[1],))
    assert part.rows_per_tar.tolist() == [21]
    assert select(cache, encoders=["beta", "alpha"]).encoders == ("beta", "alpha")


def test_statistics_are_of_the_chosen_part(feats: Path) -> None:
    cache = Cache(feats)
    manifests = [
        UnitRecord.read(cache.layout.manifest("alpha", LABEL, 0, tar)).statistics["cls"]
        for tar in TARS
    ]
    moments = select(cache, views=1).statistics("alpha")["cls"]
    expected = merged(Moments.from_json(content) for content in manifests)
    assert moments.count == 51
    np.testing.assert_array_equal(moments.mean, expected.mean)
    one = select(cache, views=1, tars=[TARS[1]]).statistics("alpha")["patches"]
    assert one.count == 21 * 9


@pytest.mark.parametrize("owner", ["views", "alpha"])
def test_a_missing_manifest_is_named(cache: Cache, owner: str) -> None:
    cache.layout.manifest(owner, LABEL, 1, TARS[0]).unlink()
    with pytest.raises(
        CacheError, match=rf"{owner}/{LABEL} lacks 1 of 4 units.*view 1 of {TARS[0]}"
    ):
        select(cache)
    assert select(cache, views=1).views == (0,)
    assert select(cache, tars=[TARS[1]]).tars == (TARS[1],)


def test_a_missing_view_of_one_encoder_is_named(cache: Cache) -> None:
    shutil.rmtree(cache.root / "beta" / LABEL / "1")
    with pytest.raises(CacheError, match=rf"beta/{LABEL} lacks 2 of 4 units.*view 1 of {TARS[0]}"):
        select(cache)
    assert select(cache, encoders=["alpha"]).views == (0, 1)
    assert select(cache, views=1).encoders == ("alpha", "beta")


def test_what_the_cache_does_not_have_is_listed(feats: Path) -> None:
    cache = Cache(feats)
    with pytest.raises(CacheError, match=r"no features of 'gamma'; it has \['alpha', 'beta'\]"):
        select(cache, encoders=["alpha", "gamma"])
    with pytest.raises(CacheError, match=r"has 2 views of .*, 3 were asked for"):
        select(cache, views=3)
    with pytest.raises(CacheError, match="0 were asked for"):
        select(cache, views=0)
    with pytest.raises(CacheError, match=r"lacks 2 of 2 units.*view 0 of train-000007"):
        select(cache, tars=["train-000007"])
    with pytest.raises(CacheError, match=r"no features of 'alpha' under unic@224; it has unic@48"):
        select(cache, recipe="unic@224")


def test_no_cache_no_encoders_and_another_format_are_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not a feature cache"):
        Cache(tmp_path)
    rewrite(cache, cache.layout.cache, replace(cache.record, format_version=1))
    with pytest.raises(CacheError, match="format version 1, this unic-extract reads version 0"):
        Cache(cache.root)
    rewrite(cache, cache.layout.cache, CacheRecord(0, 0, cache.record.decoder))
    for name in ("alpha", "beta"):
        shutil.rmtree(cache.root / name)
    with pytest.raises(CacheError, match="holds no encoder's features yet"):
        select(Cache(cache.root))


def test_features_of_other_views_are_refused(cache: Cache) -> None:
    path = cache.layout.manifest("views", LABEL, 1, TARS[1])
    record = UnitRecord.read(path)
    name, (size, _) = next(iter(record.objects.items()))
    rewrite(cache, path, replace(record, objects={**record.objects, name: [size, "0" * 64]}))
    with pytest.raises(CacheError, match=rf"alpha/{LABEL}/1/{TARS[1]}: views do not match"):
        select(cache)
    select(cache, views=1)


def test_features_of_another_encoder_are_refused(cache: Cache) -> None:
    stolen = EncoderRecord.read(cache.layout.encoder("beta"))
    rewrite(cache, cache.layout.encoder("alpha"), replace(stolen, name="alpha"))
    with pytest.raises(CacheError, match=rf"alpha/{LABEL}/0/{TARS[0]}: encoder do not match"):
        select(cache)
    assert select(cache, encoders=["beta"]).encoders == ("beta",)


def test_a_tar_record_of_other_bytes_is_refused(cache: Cache) -> None:
    path = cache.layout.tar(TARS[0])
    rewrite(cache, path, replace(TarRecord.read(path), sha256="0" * 64))
    with pytest.raises(CacheError, match=r"tar sha256 do not match.*expected 0000"):
        select(cache)


@pytest.mark.parametrize("codec", ["int2", "fp32"])
def test_an_unknown_codec_is_refused(cache: Cache, codec: str) -> None:
    rewrite(cache, cache.layout.codec("beta", LABEL), CodecRecord(codec, {"cls": [8]}))
    with pytest.raises(CacheError, match=f"beta/{LABEL} is stored with codec '{codec}'.*fp16"):
        select(cache)


def test_manifests_of_an_unknown_codec_are_refused(cache: Cache) -> None:
    path = cache.layout.manifest("beta", LABEL, 0, TARS[0])
    rewrite(cache, path, replace(UnitRecord.read(path), codec="int8"))
    with pytest.raises(CacheError, match="codec do not match"):
        select(cache)


def test_of_two_recipes_one_must_be_named(
    fresh_cache: Callable[..., Path], tars: list[Path], encoders: dict[str, Path]
) -> None:
    root = fresh_cache("alpha")
    config = ExtractConfig(
        data=(str(tars[1]),),
        cache=root,
        teachers=(f"alpha={encoders['alpha']}",),
        recipe=f"center@{SIZE}",
        views=1,
        device="cpu",
    )
    extract(config)
    cache = Cache(root)
    with pytest.raises(CacheError, match=rf"found \['center@{SIZE}', '{LABEL}'\].*--recipe"):
        select(cache)
    assert select(cache, recipe=LABEL).tars == TARS
    assert select(cache, recipe=f"center@{SIZE}").tars == (TARS[1],)
