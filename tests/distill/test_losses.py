"""Eq. 1 and 2 against the reference's numbers and against plain Python."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.losses import teacher_loss, token_loss, token_terms

GOLDEN = np.load(Path(__file__).parent / "golden" / "a_losses.npz")
TEACHERS = ("t_a", "t_b", "t_c")
WEIGHTS = {"half": (0.5, 0.5), "cosonly": (1, 0), "sl1only": (0, 1), "w": (0.3, 0.9)}


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def tokens(side, teacher):
    return golden(f"{side}/{teacher}/cls"), golden(f"{side}/{teacher}/patch")


def close(found, name):
    torch.testing.assert_close(found, golden(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("token", ["cls", "patch"])
def test_token_terms_equal_the_reference(teacher, token):
    cosine, smooth_l1 = token_terms(
        golden(f"student/{teacher}/{token}"), golden(f"teacher/{teacher}/{token}")
    )
    close(cosine, f"cos/{teacher}/{token}")
    close(smooth_l1, f"sl1/{teacher}/{token}")


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_teacher_loss_equals_the_reference_with_mean(teacher, weights):
    loss_B, _ = teacher_loss(
        *tokens("student", teacher), *tokens("teacher", teacher), "mean", *WEIGHTS[weights]
    )
    close(loss_B, f"loss_pt/{weights}/{teacher}")


def plain_token_loss(z, y):
    dot = sum(a * b for a, b in zip(z, y, strict=True))
    norms = math.sqrt(sum(a * a for a in z)) * math.sqrt(sum(b * b for b in y))
    gaps = [abs(a - b) for a, b in zip(z, y, strict=True)]
    l1 = sum(0.5 * gap**2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)
    return 0.5 * ((1 - dot / norms) + l1)


def test_sum_is_the_papers_equations_written_as_loops():
    torch.manual_seed(0)
    z_cls, y_cls = torch.randn(3, 7, dtype=torch.float64), 3 * torch.randn(3, 7).double()
    z_patches, y_patches = torch.randn(3, 5, 7).double(), 3 * torch.randn(3, 5, 7).double()
    loss_B, parts = teacher_loss(z_cls, z_patches, y_cls, y_patches)
    for b in range(3):
        cls = plain_token_loss(z_cls[b].tolist(), y_cls[b].tolist())
        patches = [
            plain_token_loss(z_patches[b, i].tolist(), y_patches[b, i].tolist()) for i in range(5)
        ]
        assert loss_B[b].item() == pytest.approx(cls + sum(patches) / 5, rel=1e-5)
    torch.testing.assert_close(sum(parts.values()) / 2, loss_B)


def test_parts_are_detached_and_the_loss_is_not():
    z_cls, z_patches = (t.requires_grad_() for t in tokens("student", "t_a"))
    loss_B, parts = teacher_loss(z_cls, z_patches, *tokens("teacher", "t_a"))
    assert loss_B.requires_grad
    assert set(parts) == {
        "cls_cosine",
        "cls_smooth_l1",
        "patches_cosine",
        "patches_smooth_l1",
    }
    assert all(part.shape == (5,) and not part.requires_grad for part in parts.values())


def test_autocast_does_not_lower_the_precision():
    torch.manual_seed(0)
    z, y = torch.randn(4, 32), torch.randn(4, 32)
    expected = token_loss(z, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_loss(z, y)
    assert torch.equal(found, expected)
    half = token_loss(z.bfloat16(), y)
    assert half.dtype == torch.float32
    assert torch.equal(half, token_loss(z.bfloat16().float(), y))


def test_other_shapes_and_words_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 5\)"):
        token_loss(torch.ones(2, 4), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"'sum' \(paper\) or 'mean'"):
        teacher_loss(*tokens("student", "t_a"), *tokens("teacher", "t_a"), "total")
