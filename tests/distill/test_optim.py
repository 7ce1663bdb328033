"""Optimiser groups, schedules and recipes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.optim import (
    adamw,
    ema_momentum,
    lr_at,
    parameter_groups,
    peak_lr,
    set_lr,
    warmup_steps,
)
from distill.projectors import Ladder
from distill.recipes import RECIPES, reference, resolve
from distill.student import Student

GOLDEN = np.load(Path(__file__).parent / "golden" / "e_schedules.npz")


@pytest.mark.parametrize("case", ["small", "nowarm", "world4"])
def test_schedules_equal_the_reference(case):
    base, batch, world, minimum, epochs, per_epoch, warm = GOLDEN[f"{case}/config"].tolist()
    total = int(epochs * per_epoch)
    warmup = warmup_steps(total, int(per_epoch), int(warm))
    assert warmup == warm * per_epoch
    peak = peak_lr(int(batch * world), base)
    lr = [lr_at(s, peak=peak, total=total, warmup=warmup, minimum=minimum) for s in range(total)]
    np.testing.assert_allclose(lr, GOLDEN[f"{case}/lr"], rtol=0, atol=1e-12)
    momentum = [ema_momentum(step, total) for step in range(total)]
    np.testing.assert_allclose(momentum, GOLDEN[f"{case}/ema_momentum"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
def test_short_runs_still_warm_up_and_come_down(total):
    warmup = warmup_steps(total, per_epoch=50)
    assert warmup == total // 2
    lr = [lr_at(step, peak=1.0, total=total, warmup=warmup) for step in range(total)]
    assert max(lr) == 1.0 and min(lr) >= 0
    assert lr[warmup] == 1.0
    assert sorted(lr[:warmup]) == lr[:warmup]
    assert sorted(lr[warmup:], reverse=True) == lr[warmup:]


def test_steps_outside_the_run_are_refused():
    with pytest.raises(ValueError, match="step 10 lies outside the run of 10"):
        lr_at(10, peak=1.0, total=10, warmup=0)
    with pytest.raises(ValueError, match="11 warm-up steps do not fit"):
        lr_at(0, peak=1.0, total=10, warmup=11)


def small_modules():
    student = Student(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    )
    return student, Ladder(32, 2, {"dino": 8})


def test_biases_and_vectors_are_not_decayed_and_embeddings_are():
    student, ladder = small_modules()
    decayed, plain = parameter_groups(student, ladder)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.03, 0.0)
    ids = {id(parameter) for parameter in decayed["params"]}
    assert {id(student.encoder.cls_token), id(student.encoder.pos_embed)} <= ids
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in plain["params"])
    trainable = [p for m in (student, ladder) for p in m.parameters() if p.requires_grad]
    assert len(trainable) == len(decayed["params"]) + len(plain["params"])
    assert id(student.encoder.norm.weight) not in {id(p) for p in plain["params"]}
    student.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(student)


def test_adamw_moves_by_the_rate_that_was_set():
    layer = torch.nn.Linear(3, 2)
    optimizer = adamw(layer)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before)
    set_lr(optimizer, 0.1)
    optimizer.step()
    # Adam's step is the rate for a constant gradient; decay first shrinks the weight.
    torch.testing.assert_close(layer.weight, before * (1 - 0.1 * 0.03) - 0.1)
    assert optimizer.defaults["betas"] == (0.9, 0.99) and optimizer.defaults["eps"] == 1e-8


def test_recipes_are_the_rows_of_table_1():
    rows = {
        r.name: (r.standardize != "none", r.dedicated, r.ladder, r.drop > 0)
        for r in RECIPES.values()
    }
    assert rows == {
        "basic": (False, False, False, False),
        "std": (True, False, False, False),
        "dedicated": (True, True, False, False),
        "ladder": (True, True, True, False),
        "unic": (True, True, True, True),
        "single": (True, True, False, False),
    }
    assert all(r.summary and r.cost for r in RECIPES.values())


def test_reference_switches_every_choice_at_once():
    unic = resolve("unic", use_reference=True)
    assert (unic.standardize, unic.reduce, unic.normalise) == ("ema", "mean", "reference")
    assert (unic.hidden, unic.first_only, unic.drop) == ("reference", True, 0.5)
    assert reference(RECIPES["basic"]).standardize == "none"
    assert RECIPES["unic"].reduce == "sum"


def test_resolve_says_what_there_is():
    with pytest.raises(ValueError, match=r"no recipe 'unique'(?s:.*)basic(?s:.*)single"):
        resolve("unique")
    with pytest.raises(ValueError, match="'single' takes one teacher, got 2"):
        resolve("single", teachers=2)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 50"):
        resolve("unic", drop=50)
    assert resolve("unic", drop=0.25, teachers=2).drop == 0.25
