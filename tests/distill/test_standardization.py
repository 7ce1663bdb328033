"""Standardization against the reference's recursion and against numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.optim import ema_momentum
from distill.standardization import Ema, Exact, Standardization, batch_statistics

GOLDEN = np.load(Path(__file__).parent / "golden" / "b_standardize.npz")


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("token", ["cls", "patch"])
def test_ema_follows_the_reference(token):
    ema = Ema(12)
    for step, momentum in enumerate(GOLDEN["momentum"]):
        assert ema_momentum(step, 5) == pytest.approx(momentum, abs=1e-12)
        close(ema(golden(f"{token}/x")[step], float(momentum)), golden(f"{token}/y")[step])
        close(ema.mean, golden(f"{token}/mean_ema_after")[step].flatten())
        close(ema.std, golden(f"{token}/std_ema_after")[step].flatten())
    before = ema.mean.clone()
    close(ema(golden(f"{token}/eval_x")), golden(f"{token}/eval_y_momentum0"))
    assert torch.equal(ema.mean, before)


def test_eps_enters_the_running_std_as_well():
    ema = Ema(2)
    ema(torch.ones(4, 2), momentum=1.0)
    torch.testing.assert_close(ema.std, torch.full((2,), 1e-6), rtol=1e-5, atol=0)
    # A channel without variance is then divided by 2e-6.
    found = ema(torch.full((4, 2), 1.5))
    torch.testing.assert_close(found, torch.full((4, 2), 0.5 / 2e-6), rtol=1e-5, atol=0)


@pytest.mark.parametrize("token", ["cls", "patch"])
def test_exact_statistics_of_a_batch_standardize_it(token):
    x = golden(f"{token}/eval_x")
    y = Exact(*batch_statistics(x))(x)
    close(y, golden(f"{token}/batchstat_y"))
    flat = y.flatten(0, -2)
    close(flat.mean(0), torch.zeros(12))
    close(flat.std(0), torch.ones(12))


def test_two_processes_share_the_statistics_of_the_global_batch():
    x = 100 + torch.randn(8, 9, 12, generator=torch.Generator().manual_seed(0))
    halves = [x[:5].flatten(0, 1), x[5:].flatten(0, 1)]
    whole = Ema(12)
    whole(x, 0.7)
    mean = x.flatten(0, 1).mean(0)
    sums = [torch.cat([h.sum(0), torch.tensor([float(len(h))])]) for h in halves]
    squares = [(h - mean).square().sum(0) for h in halves]
    for own in (0, 1):
        part = Ema(12)
        others = iter([sums[1 - own], squares[1 - own]])
        part(halves[own], 0.7, lambda tensor, others=others: tensor + next(others))
        torch.testing.assert_close(part.mean, whole.mean)
        torch.testing.assert_close(part.std, whole.std)


def teacher_statistics(width):
    return {
        "cls": (torch.full((width,), 2.0), torch.full((width,), 4.0)),
        "patches": (torch.full((width,), -1.0), torch.full((width,), 0.5)),
    }


def test_standardization_treats_teachers_and_tokens_apart():
    statistics = {"dino": teacher_statistics(3), "timm:vit.tag": teacher_statistics(2)}
    targets = {
        "dino": (torch.full((4, 3), 6.0), torch.zeros(4, 5, 3)),
        "timm:vit.tag": (torch.full((4, 2), 6.0, dtype=torch.float16), torch.zeros(4, 5, 2)),
    }
    exact = Standardization("exact", statistics)(targets)
    for teacher, width in (("dino", 3), ("timm:vit.tag", 2)):
        close(exact[teacher][0], torch.ones(4, width))
        close(exact[teacher][1], torch.full((4, 5, width), 2.0))
    raw = Standardization("none", statistics)(targets)
    assert torch.equal(raw["dino"][0], targets["dino"][0])
    assert raw["timm:vit.tag"][0].dtype == torch.float32


def test_running_statistics_travel_in_a_checkpoint():
    statistics = {"dino": teacher_statistics(3)}
    ema = Standardization("ema", statistics)
    assert not list(ema.parameters())
    first = (torch.randn(4, 3), torch.randn(4, 5, 3))
    close(ema({"dino": first}, momentum=1.0)["dino"][0], first[0])
    resumed = Standardization("ema", statistics)
    resumed.load_state_dict(ema.state_dict())
    batch = {"dino": (torch.randn(4, 3), torch.randn(4, 5, 3))}
    assert torch.equal(resumed(batch)["dino"][1], ema(batch)["dino"][1])
    assert not torch.equal(ema(batch)["dino"][1], batch["dino"][1])


def test_wrong_statistics_are_refused():
    with pytest.raises(ValueError, match="'exact', 'ema' or 'none'"):
        Standardization("phi-s", {"dino": teacher_statistics(3)})
    with pytest.raises(ValueError, match=r"statistics of cls and patches; found \['patches'\]"):
        Standardization("exact", {"dino": {"patches": (torch.ones(2), torch.ones(2))}})
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        Exact(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        Exact(torch.tensor([float("nan")]), torch.ones(1))
