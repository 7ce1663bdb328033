"""Images that cannot be decoded: a failing tar by default, recorded and left out on request."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SIZE, open_unit, write_tar

from extract.cache.dataset import CachedViews
from extract.cache.errors import CacheError, ImageError
from extract.cache.images import key_id
from extract.cache.reader import Cache, select
from extract.config import ExtractConfig
from extract.run import extract

LABEL = f"unic@{SIZE}"


def spoil(tar: Path, *ordinals: int) -> list[str]:
    """Rewrite a tar with some of its JPEGs cut in half; returns their keys."""
    with tarfile.open(tar) as archive:
        members = [(m, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    keys = []
    with tarfile.open(tar, "w") as archive:
        for i, (member, content) in enumerate(members):
            if i // 3 in ordinals and member.name.endswith(".jpg"):
                content = content[: len(content) // 2]
                member.size = len(content)
                keys.append(member.name.removesuffix(".jpg"))
            archive.addfile(member, io.BytesIO(content))
    return keys


@pytest.fixture
def run(tmp_path: Path, encoders: dict[str, Path]) -> Callable[..., Any]:
    def extracted(tars: list[Path], names: tuple[str, ...] = ("alpha",), **changes: Any) -> Any:
        plain = ExtractConfig(
            data=tuple(map(str, tars)),
            cache=tmp_path / "feats",
            teachers=tuple(f"{name}={encoders[name]}" for name in names),
            recipe=LABEL,
            views=2,
            batch_size=8,
            workers=2,
            device="cpu",
        )
        return extract(replace(plain, **changes))

    return extracted


@pytest.fixture
def own(tmp_path: Path) -> list[Path]:
    (tmp_path / "data").mkdir()
    return [write_tar(tmp_path / "data" / f"t-{i}.tar", 12, seed=i) for i in range(3)]


def test_by_default_a_bad_image_costs_its_tar_and_no_other(
    run: Callable[..., Any], own: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (key,) = spoil(own[1], 4)
    with pytest.raises(ImageError, match=rf"t-1\.tar:{key}"):
        run(own)
    assert f"t-1.tar was left out: t-1.tar:{key}" in capsys.readouterr().err
    cache = Cache(tmp_path / "feats")
    assert cache.units("alpha", LABEL) == {(v, t) for v in (0, 1) for t in ("t-0", "t-2")}
    write_tar(own[1], 12, seed=1)  # Mended, it is all that is left to do.
    assert [line.computed for line in run(own)] == [24]


def test_several_bad_tars_are_all_named(run: Callable[..., Any], own: list[Path]) -> None:
    spoil(own[0], 0)
    own[2].write_bytes(own[2].read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"2 of 3 tars could not") as error:
        run(own)
    assert "t-0.tar: t-0.tar:t-0_0000" in str(error.value) and "t-2.tar: " in str(error.value)


def test_skipped_images_are_recorded_and_all_others_kept(
    run: Callable[..., Any],
    own: list[Path],
    tmp_path: Path,
    encoders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = tmp_path / "whole"
    run(own, cache=whole)
    keys = spoil(own[1], 0, 4)
    (done,) = run(own, skip_bad=True, max_bad=0.1)
    assert (done.images, done.skipped) == (34, 2)
    assert f"skipped {keys[0]}: " in capsys.readouterr().err
    cache = Cache(tmp_path / "feats")
    record = cache.tar("t-1")
    assert record.rows == 10
    assert [(ordinal, key) for ordinal, key, _ in record.skipped] == [(0, keys[0]), (4, keys[1])]
    kept = [i for i in range(12) if i not in (0, 4)]
    views, features = (open_unit(tmp_path / "feats", o, 1, "t-1") for o in ("views", "alpha"))
    assert views["image_index"][:].tolist() == kept
    assert key_id(keys[0]) not in views["key"][:]
    # The others' views are those of their ordinals, so their features are the same as before.
    before = open_unit(whole, "alpha", 1, "t-1")
    np.testing.assert_array_equal(features["cls"][:], before["cls"][:][kept])
    dataset = CachedViews(select(cache))
    assert len(dataset) == 68
    dataset.check_pixels(1000)
    # An encoder that comes later has the same rows.
    assert [line.computed for line in run(own, names=("beta",))] == [68]


def test_it_stops_above_the_share_that_may_be_bad(
    run: Callable[..., Any], own: list[Path], tmp_path: Path
) -> None:
    spoil(own[0], 1)
    spoil(own[2], 1)
    with pytest.raises(CacheError, match=r"1 of 36 images cannot be decoded.*share 0\.001"):
        run(own, skip_bad=True)
    with pytest.raises(CacheError, match=r"2 of 36 images cannot be decoded.*share 0\.03"):
        run(own, skip_bad=True, max_bad=0.03)
    assert run(own, skip_bad=True, max_bad=0.06)[0].skipped == 2


def test_images_that_units_rely_on_are_never_skipped(
    run: Callable[..., Any], own: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that was whole for the first encoder and fails for the second is a fault."""
    run(own)

    def fail(data: bytes, where: str) -> None:
        raise ImageError(f"{where} is damaged")

    monkeypatch.setattr("extract.rendering.decode", fail)
    with pytest.raises(ImageError, match="3 of 3 tars could not"):
        run(own, names=("beta",), skip_bad=True, max_bad=1.0)
    assert Cache(tmp_path / "feats").tar("t-0").rows == 12


def test_a_bad_image_among_the_rows_of_the_calibration(
    run: Callable[..., Any], own: list[Path], tmp_path: Path
) -> None:
    spoil(own[0], 2)
    with pytest.raises(ImageError, match=r"t-0\.tar:t-0_0002"):
        run(own, codec="int8")
    assert run(own, codec="int8", skip_bad=True, max_bad=0.1)[0].skipped == 1
    assert Cache(tmp_path / "feats").codec("alpha", LABEL).fidelity["relative_l2"] < 0.03
