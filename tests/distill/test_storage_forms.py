"""Training from quantised features, kept patches and stored pixels."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZE, STUDENT
from safetensors.torch import load_file

from distill.batches import TrainingBatches
from distill.config import DistillConfig
from distill.run import Training, build, distill
from extract.config import ExtractConfig
from extract.run import extract


@pytest.fixture
def cache(tmp_path: Path, tars: list[Path], encoders: dict[str, Path]) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        plain = ExtractConfig(
            data=tuple(map(str, tars)),
            cache=tmp_path / "feats",
            teachers=tuple(f"{name}={encoders[name]}" for name in ("alpha", "wide")),
            recipe=f"unic@{SIZE}",
            views=2,
            batch_size=16,
            workers=2,
            device="cpu",
        )
        extract(replace(plain, **changes))
        return tmp_path / "feats"

    return make


def first_loss(cache: Path, out: Path) -> tuple[Training, dict[str, torch.Tensor]]:
    """A trainer on the cache, and the metrics of its first step."""
    config = DistillConfig(
        cache=cache, out=out, student=STUDENT, epochs=1, batch_size=17, device="cpu"
    )
    batches = TrainingBatches(cache, batch_size=17, seed=config.seed)
    torch.manual_seed(0)
    run = Training(config, batches, build(config, batches).train(), torch.device("cpu"))
    run.resume()
    return run, run.step(0, next(batches.iterate(0, 1, 1)))


@pytest.mark.parametrize(("codec", "off"), [("int8", 0.01), ("int8-zstd", 0.02), ("int4", 0.08)])
def test_quantised_targets_cost_little(
    cache: Callable[..., Path], feats: Path, tmp_path: Path, codec: str, off: float
) -> None:
    plain = first_loss(cache(), tmp_path / "plain")[1]["loss"]
    (tmp_path / "feats").rename(tmp_path / "before")
    coded = first_loss(cache(codec=codec), tmp_path / "coded")[1]["loss"]
    assert 0 < abs(coded - plain) / plain < off


def test_a_subset_of_patches_trains_on_those(cache: Callable[..., Path], tmp_path: Path) -> None:
    """The loss is that of the plain formula over the kept positions, of grids 3x3 and 4x4."""
    run, metrics = first_loss(cache(patches=5), tmp_path / "run")
    batches = run.batches
    batch = batches.decoded(next(batches.iterate(0, 1, 1)))
    assert batch["targets"]["wide"]["patches"].shape == (17, 5, 48)
    assert not torch.equal(batch["positions"]["alpha"], batch["positions"]["wide"])
    torch.manual_seed(0)
    fresh = build(run.config, batches).train()
    fresh.student.set_step(0, 0, 0, 17)
    outputs = fresh.student(fresh.normalise(batch["views"]))
    with torch.no_grad():
        whole = fresh.ladder(outputs)
        kept = fresh.ladder(outputs, batch["positions"])
    for name in ("alpha", "wide"):
        chosen = batch["positions"][name]
        for image in range(17):
            torch.testing.assert_close(
                kept[name][1][image], whole[name][1][image][chosen[image]], rtol=1e-4, atol=1e-6
            )
    assert torch.isfinite(metrics["loss"])


def test_stored_jpegs_are_trained_on(cache: Callable[..., Path], tmp_path: Path) -> None:
    folder = cache(store_views="jpeg")
    run, metrics = first_loss(folder, tmp_path / "run")
    assert torch.isfinite(metrics["loss"]) and not run.batches.dataset.tars._indices


@pytest.mark.parametrize("recipe", ["basic", "unic"])
def test_cls_tokens_alone_are_trained_on(
    cache: Callable[..., Path], tmp_path: Path, encoders: dict[str, Path], recipe: str
) -> None:
    """Their term is the whole loss; a teacher with patches beside them has both."""
    folder = cache(tokens="cls")
    whole = (f"beta={encoders['beta']}",)
    cache(teachers=whole)
    config = DistillConfig(
        cache=folder, out=tmp_path / "run", student=STUDENT, epochs=20, batch_size=17,
        device="cpu", recipe=recipe, lr=3e-2, warmup_epochs=1, log_every=1,
    )  # fmt: skip
    done = distill(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["teachers"] for line in (lines[0], lines[-1]))
    for name in ("alpha", "wide"):
        assert last[name]["patches_cosine"] == 0
        half = 0.5 * (last[name]["cls_cosine"] + last[name]["cls_smooth_l1"])
        assert last[name]["teacher_loss"] == pytest.approx(half, rel=1e-4)
        assert last[name]["teacher_loss"] < first[name]["teacher_loss"]
    assert last["beta"]["patches_cosine"] > 0
    heads = load_file(tmp_path / "run" / "heads.safetensors")
    if recipe == "unic":
        assert not [name for name in heads if "alpha.patches" in name]
    assert done.student.exists()
