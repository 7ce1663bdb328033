"""Eq. 4 and the aggregate against the reference's numbers and against plain Python."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.balancing import aggregate, draws, teacher_dropping
from distill.losses import teacher_loss

GOLDEN = np.load(Path(__file__).parent / "golden" / "a_losses.npz")
TEACHERS = ("t_a", "t_b", "t_c")
WEIGHTS = {"half": (0.5, 0.5), "cosonly": (1, 0), "sl1only": (0, 1), "w": (0.3, 0.9)}


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def student_tokens(grad=False):
    return {
        (teacher, token): golden(f"student/{teacher}/{token}").clone().requires_grad_(grad)
        for teacher in TEACHERS
        for token in ("cls", "patch")
    }


def losses(student, weights="half"):
    return torch.stack(
        [
            teacher_loss(
                student[teacher, "cls"],
                student[teacher, "patch"],
                golden(f"teacher/{teacher}/cls"),
                golden(f"teacher/{teacher}/patch"),
                "mean",
                *WEIGHTS[weights],
            ).loss_B
            for teacher in TEACHERS
        ]
    )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("p", [0, 1])
def test_aggregate_equals_the_reference(weights, p):
    loss_MB = losses(student_tokens(), weights)
    coefficient_MB = teacher_dropping(loss_MB, p, torch.rand(3, 5), first_only=True)
    name = f"agg/{weights}/p{p}"
    close(aggregate(loss_MB, coefficient_MB, "reference"), golden(f"{name}/loss"))
    share_M = coefficient_MB.sum(1) / coefficient_MB.sum()
    close(share_M, golden(f"{name}/coeff_sum_per_teacher"))


@pytest.mark.parametrize("p", [0, 1])
def test_gradients_equal_the_reference(p):
    student = student_tokens(grad=True)
    loss_MB = losses(student)
    aggregate(loss_MB, teacher_dropping(loss_MB, p, torch.rand(3, 5)), "reference").backward()
    for (teacher, token), tensor in student.items():
        close(tensor.grad, golden(f"grad/half/p{p}/{teacher}/{token}"))


def test_half_dropping_equals_the_reference():
    loss_MB = losses(student_tokens())
    close(loss_MB, golden("loss_matrix_MxB"))
    # The reference draws image by image, and nothing for the teacher that it keeps anyway.
    stream = iter(GOLDEN["p05/python_random_draws"].tolist())
    largest = loss_MB.argmax(0).tolist()
    draws_MB = torch.zeros(3, 5)
    for image in range(5):
        for teacher in range(3):
            if teacher != largest[image]:
                draws_MB[teacher, image] = next(stream)
    assert next(stream, None) is None
    keep_MB = teacher_dropping(loss_MB, 0.5, draws_MB, first_only=True)
    assert torch.equal(keep_MB, golden("p05/keep_mask_MxB"))
    close(aggregate(loss_MB, keep_MB, "reference"), golden("p05/loss"))
    close(keep_MB.sum(1) / keep_MB.sum(), golden("p05/coeff_sum_per_teacher"))


def test_ties_follow_the_paper_or_the_reference():
    loss_M1 = golden("tie/losses")[:, None]
    zeros = torch.zeros(3, 1)
    reference = teacher_dropping(loss_M1, 1.0, zeros, first_only=True)
    assert torch.equal(reference[:, 0], golden("tie/keep_p1"))
    assert teacher_dropping(loss_M1, 1.0, zeros)[:, 0].tolist() == [1, 1, 0]


def test_dropping_is_equation_4_written_as_a_loop():
    torch.manual_seed(1)
    loss_MB, draws_MB = torch.rand(4, 50), torch.rand(4, 50)
    loss_MB[2, :9] = loss_MB[1, :9] = 2.0
    total = 0.0
    found = teacher_dropping(loss_MB, 0.3, draws_MB)
    for b in range(50):
        column = loss_MB[:, b].tolist()
        for t in range(4):
            dropped = column[t] != max(column) and draws_MB[t, b].item() < 0.3
            assert found[t, b].item() == (0.0 if dropped else 1.0)
            total += 0.0 if dropped else column[t]
    assert aggregate(loss_MB, found).item() == pytest.approx(total / 50, rel=1e-5)


def test_four_teachers_at_one_half_keep_two_and_a_half():
    draws_MB = draws(seed=3, step=7, offset=0, batch=20_000, teachers=4, device="cpu")
    loss_MB = torch.rand(4, 20_000, generator=torch.Generator().manual_seed(0))
    kept = teacher_dropping(loss_MB, 0.5, draws_MB).sum(0)
    assert kept.min() >= 1
    assert kept.mean().item() == pytest.approx(2.5, abs=0.03)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_one_teacher_is_never_dropped(p):
    loss_1B = torch.rand(1, 64, requires_grad=True)
    coefficient_1B = teacher_dropping(loss_1B, p, torch.zeros(1, 64))
    assert torch.equal(coefficient_1B, torch.ones(1, 64))
    for normalise in ("paper", "reference"):
        torch.testing.assert_close(aggregate(loss_1B, coefficient_1B, normalise), loss_1B.mean())


def test_extremes_of_p_are_the_sum_and_the_maximum():
    loss_MB = torch.rand(3, 16)
    zeros, ones = torch.zeros(3, 16), torch.full((3, 16), 1 - 2**-24)
    torch.testing.assert_close(
        aggregate(loss_MB, teacher_dropping(loss_MB, 0.0, zeros)), loss_MB.sum(0).mean()
    )
    torch.testing.assert_close(
        aggregate(loss_MB, teacher_dropping(loss_MB, 1.0, ones)), loss_MB.amax(0).mean()
    )


def test_coefficients_carry_no_gradient():
    loss_MB = torch.rand(2, 8, requires_grad=True)
    coefficient_MB = teacher_dropping(loss_MB, 0.5, torch.rand(2, 8))
    assert not coefficient_MB.requires_grad
    aggregate(loss_MB, coefficient_MB * loss_MB.mean(), "reference").backward()
    weights = coefficient_MB * loss_MB.detach().mean()
    torch.testing.assert_close(loss_MB.grad, weights / weights.sum())


@pytest.mark.parametrize("normalise", ["paper", "reference"])
def test_two_processes_have_the_gradient_of_one(normalise):
    loss_MB = torch.rand(3, 8)
    whole_draws = draws(1, 2, 0, 8, 3, "cpu")
    whole = loss_MB.clone().requires_grad_()
    aggregate(whole, teacher_dropping(whole, 0.5, whole_draws), normalise).backward()

    halves = [loss_MB[:, :4].clone().requires_grad_(), loss_MB[:, 4:].clone().requires_grad_()]
    coefficients = [
        teacher_dropping(half, 0.5, draws(1, 2, offset, 4, 3, "cpu"))
        for half, offset in zip(halves, (0, 4), strict=True)
    ]
    mean = sum(c.sum() for c in coefficients) / 2
    for half, coefficient in zip(halves, coefficients, strict=True):
        # DistributedDataParallel averages over the two processes.
        (aggregate(half, coefficient, normalise, lambda _: mean) / 2).backward()
    torch.testing.assert_close(torch.cat([half.grad for half in halves], 1), whole.grad)


def test_draws_depend_on_seed_step_teacher_and_position_alone():
    whole = draws(5, 11, 0, 8, 3, "cpu")
    assert torch.equal(
        whole, torch.cat([draws(5, 11, 0, 4, 3, "cpu"), draws(5, 11, 4, 4, 3, "cpu")], 1)
    )
    others = [draws(6, 11, 0, 8, 3, "cpu"), draws(5, 12, 0, 8, 3, "cpu"), whole.roll(1, 0)]
    assert all((whole != other).float().mean() > 0.9 for other in others)
    many = draws(0, 0, 0, 40_000, 3, "cpu")
    assert many.min() >= 0 and many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.005)
    assert many.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert torch.corrcoef(many).fill_diagonal_(0).abs().max() < 0.02


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        teacher_dropping(torch.rand(2, 3), 1.5, torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\) and draws \(3, 2\)"):
        teacher_dropping(torch.rand(2, 3), 0.5, torch.rand(3, 2))
    with pytest.raises(ValueError, match="'paper' or 'reference'"):
        aggregate(torch.rand(2, 3), torch.ones(2, 3), "mean")
