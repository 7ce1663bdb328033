"""The plan: bytes are those that a run writes, times are measured, a small disk is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZE
from PIL import Image

from extract.cache.errors import ImageError, UserError
from extract.cache.images import image_extension, index_tar
from extract.cache.schema import ArraySpec
from extract.cache.views import parse_recipe
from extract.config import ExtractConfig
from extract.planning.plan import check_disk, free_bytes, make_plan, refuse_beyond
from extract.planning.plan_report import duration, plan_json, print_plan
from extract.planning.projection import Plan
from extract.planning.rehearsal import Source, measure_views, write_rate
from extract.planning.sizes import array_bytes, existing, gigabytes
from extract.run import extract


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut can tell."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def config(cache: Path, tars: list[Path], encoders: dict[str, Path], **changes: Any):
    settings: dict[str, Any] = {
        "data": tuple(map(str, tars)),
        "cache": cache,
        "teachers": (f"alpha={encoders['alpha']}", f"wide={encoders['wide']}"),
        "recipe": f"unic@{SIZE}",
        "views": 2,
        "batch_size": 16,
        "workers": 1,
        "device": "cpu",
    }
    return ExtractConfig(**(settings | changes))


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"codec": "int8"},
        {"codec": "int4"},
        {"codec": "int8", "patches": 5, "views": 1},
        {"tokens": "cls"},
        {"store_views": "raw"},
        {"recipe": f"center@{SIZE}", "views": 1},
    ],
    ids=str,
)
def test_planned_bytes_are_those_that_the_run_writes(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path], changes: dict[str, Any]
) -> None:
    asked = config(tmp_path / "feats", tars, encoders, **changes)
    plan = make_plan(asked, images=4)
    assert not (tmp_path / "feats").exists()
    extract(asked)
    for encoder in plan.encoders:
        written = on_disk(tmp_path / "feats" / encoder.name)
        # Besides units there are teacher.json and codec.json, once.
        assert encoder.missing_bytes == pytest.approx(written, rel=0.05, abs=4000)
        assert encoder.missing_bytes == encoder.bytes_by_codec[encoder.codec]
    others = ("views", "patches@3x3", "patches@4x4")
    written = sum(on_disk(tmp_path / "feats" / owner) for owner in others)
    assert plan.view_bytes == pytest.approx(written, rel=0.2)
    done = make_plan(asked, images=4)
    assert (done.needed_bytes, done.images_to_decode, done.forward_s) == (0, 0, 0.0)


def test_arrays_are_computed_to_the_byte(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    extract(config(tmp_path, tars, encoders, codec="int8", store_views="raw", views=1))
    specs = {
        "alpha/*/0/*21*/cls": ArraySpec("float16", (32,), True),
        "alpha/*/0/*/patches": ArraySpec("int8", (9, 32), True),
        "alpha/*/0/*/scale_patches": ArraySpec("float16", (9,), True),
        "views/*/0/*/pixels": ArraySpec("uint8", (3, SIZE, SIZE), True),
        "views/*/0/*/fingerprint_grid": ArraySpec("uint8", (16, 16, 3)),
    }
    for pattern, spec in specs.items():
        for array in tmp_path.glob(pattern):
            rows = json.loads((array / "zarr.json").read_text())["shape"][0]
            assert array_bytes(spec, rows) == on_disk(array / "c"), array
    assert len(list(tmp_path.glob("alpha/*/0/*/patches"))) == 2


def test_a_vit_b_costs_what_the_readme_says() -> None:
    patches, cls = ArraySpec("float16", (196, 768), True), ArraySpec("float16", (768,), True)
    each = (array_bytes(patches, 10_000) + array_bytes(cls, 10_000)) / 10_000
    assert each == pytest.approx(302_592, rel=1e-3)


def test_a_plan_counts_only_what_is_missing(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    extract(config(tmp_path, tars[:1], encoders, teachers=(f"alpha={encoders['alpha']}",), views=1))
    plan = make_plan(config(tmp_path, tars, encoders), images=4)
    by_name = {encoder.name: encoder for encoder in plan.encoders}
    assert by_name["alpha"].missing_rows == 102 - 30
    assert by_name["wide"].missing_rows == 102
    # View 0 of the first tar is stored, but `wide` lacks it.
    assert (plan.images_to_decode, plan.views_to_make) == (51, 102)
    assert 0 < by_name["alpha"].missing_bytes < by_name["alpha"].bytes_by_codec["fp16"]


def test_times_follow_from_the_measurements(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    plan = make_plan(config(tmp_path / "feats", tars, encoders), images=8)
    cost = plan.rehearsal.views
    assert cost.images == 8 and cost.decode_ms > 0 and cost.view_ms > 0
    assert 300 < cost.jpeg_bytes < 3 * SIZE * SIZE
    assert plan.rehearsal.forward_ms.keys() == {"alpha", "wide"}
    assert plan.prepare_core_s == pytest.approx(
        (51 * cost.decode_ms + 102 * cost.view_ms) / 1e3, rel=1e-6
    )
    assert plan.forward_s == pytest.approx(102 * sum(plan.rehearsal.forward_ms.values()) / 1e3)
    assert plan.seconds >= plan.forward_s
    assert plan.cores_to_feed == int(np.ceil(plan.prepare_core_s / plan.forward_s))


def test_on_a_gpu_the_slowest_part_decides(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    """The arithmetic alone: figures of a GPU in the place of measured ones."""
    from dataclasses import replace

    plan = make_plan(config(tmp_path / "feats", tars, encoders, workers=4), images=2)
    cost = replace(plan.rehearsal.views, decode_ms=6.0, view_ms=4.0)
    gpu = replace(
        plan.rehearsal,
        device="a GPU",
        cores=8,
        views=cost,
        forward_ms={"alpha": 0.5, "wide": 0.5},
        disk_bytes_per_s=1e12,
    )
    plan = replace(plan, rehearsal=gpu)
    # 51 images: 51 * 6 + 102 * 4 core ms on 4 of 8 cores; 102 views by two encoders.
    assert plan.seconds == pytest.approx((51 * 6 + 102 * 4) / 4 / 1e3)
    assert plan.forward_s == pytest.approx(0.102)
    assert plan.cores_to_feed == 7
    faster = replace(plan, workers=8, rehearsal=replace(gpu, forward_ms={"alpha": 2, "wide": 2}))
    assert faster.seconds == faster.forward_s == pytest.approx(0.408)
    slow_disk = replace(plan, rehearsal=replace(gpu, disk_bytes_per_s=plan.needed_bytes / 60))
    assert slow_disk.seconds == pytest.approx(60)


def test_weights_that_would_be_fetched_are_planned_by_their_architecture(
    tmp_path: Path,
    tars: list[Path],
    encoders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    teachers = ("timm:vit_tiny_patch16_224", f"alpha={encoders['alpha']}")
    plan = make_plan(config(tmp_path / "feats", tars, encoders, teachers=teachers), images=2)
    tiny, alpha = plan.encoders
    assert (tiny.loaded, alpha.loaded) == (False, True)
    assert tiny.arrays == {"cls": [192], "patches": [9, 192]}
    print_plan(plan)
    assert "weights not" in " ".join(capsys.readouterr().out.split())


def test_an_image_folder_is_planned_without_packing_it(
    tmp_path: Path, encoders: dict[str, Path]
) -> None:
    pictures = tmp_path / "pictures" / "cats"
    pictures.mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (60 + i, 70), (i, 90, 120)).save(pictures / f"{i}.png")
    asked = config(tmp_path / "feats", [tmp_path / "pictures"], encoders, views=1)
    plan = make_plan(asked, images=3)
    assert (plan.images, plan.tars, plan.rehearsal.views.images) == (5, 1, 3)
    assert not (tmp_path / "feats").exists()
    extract(asked)
    (tar,) = (tmp_path / "feats" / "images").glob("*.tar")
    assert plan.packing_bytes == pytest.approx(tar.stat().st_size, abs=10_240)
    assert make_plan(asked, images=3).needed_bytes == 0


def test_bad_images_do_not_stop_the_rehearsal_unless_all_are_bad(tars: list[Path]) -> None:
    index = index_tar(tars[0])
    good = Source(
        "a", 0, "good", lambda: index.read(index.samples[0], image_extension(index.samples[0]))
    )
    bad = Source("a", 1, "bad", lambda: b"no picture")
    cost, made = measure_views([bad, good, bad], parse_recipe(f"unic@{SIZE}"), 0, 2)
    assert cost.images == 1 and len(made) == 2
    with pytest.raises(ImageError, match="bad"):
        measure_views([bad], parse_recipe(f"unic@{SIZE}"), 0, 2)


def test_measuring_leaves_the_number_of_threads_alone(tars: list[Path]) -> None:
    index = index_tar(tars[0])
    sample = index.samples[0]
    source = Source("a", 0, "good", lambda: index.read(sample, image_extension(sample)))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        measure_views([source], parse_recipe(f"unic@{SIZE}"), 0, 1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_the_run_would_refuse_the_plan_refuses(
    tmp_path: Path, tars: list[Path], encoders: dict[str, Path]
) -> None:
    extract(config(tmp_path, tars, encoders, views=1))
    with pytest.raises(UserError, match="seed 0, now --seed 5"):
        make_plan(config(tmp_path, tars, encoders, seed=5))
    with pytest.raises(UserError, match=r"alpha/unic@48 is stored as fp16 .* --codec would change"):
        make_plan(config(tmp_path, tars, encoders, codec="int8"))
    with pytest.raises(UserError, match="which --tokens would change"):
        make_plan(config(tmp_path, tars, encoders, tokens="cls"))
    with pytest.raises(UserError, match="which --codec and --patches would change"):
        make_plan(config(tmp_path, tars, encoders, codec="int8", patches=3))
    twice = (f"a={encoders['alpha']}", f"a={encoders['wide']}")
    with pytest.raises(UserError, match="both be stored as 'a'"):
        make_plan(config(tmp_path, tars, encoders, teachers=twice))


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    refuse_beyond(1000, 1000, folder)
    with pytest.raises(UserError) as error:
        refuse_beyond(1_550_000_000_000, 71_774_425_088, folder)
    for part in (str(folder), "1.55 TB", "71.77 GB", "--codec int8", "--tokens cls", "--views"):
        assert part in str(error.value)
    # The real disk, asked through the nearest folder that exists.
    assert existing(folder) == tmp_path
    assert free_bytes(folder) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    check_disk(1, folder)
    with pytest.raises(UserError, match="is too small"):
        check_disk(shutil.disk_usage(tmp_path).total + 1, folder)
    assert not folder.exists()


def test_a_disk_that_cannot_be_written_has_no_rate(tmp_path: Path) -> None:
    assert (write_rate(tmp_path) or 0) > 1e6
    assert list(tmp_path.iterdir()) == []
    assert write_rate(Path("/proc/nowhere")) is None


def test_the_report_and_the_json_say_the_same(
    tmp_path: Path,
    tars: list[Path],
    encoders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan: Plan = make_plan(config(tmp_path / "feats", tars, encoders), images=2)
    capsys.readouterr()
    print_plan(plan)
    said = " ".join(capsys.readouterr().out.split())
    content = json.loads(json.dumps(plan_json(plan)))
    assert content["fits"] is True and content["needed_bytes"] == plan.needed_bytes
    for part in (
        "51 images in 2 tars, 2 views of unic@48: 102 rows for each encoder",
        gigabytes(plan.needed_bytes),
        "it fits",
        "measured (2 images)",
        "--store-views: raw 705.0 kB",
        "licence of alpha: apache-2.0",
    ):
        assert part in said, part


def test_durations_are_readable() -> None:
    assert [duration(s) for s in (4.13, 200, 3725, 400_000)] == [
        "4.1 s",
        "3 min 20 s",
        "1 h 02 min",
        "4.6 days",
    ]
