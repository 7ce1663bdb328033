"""The ladder of projectors against the reference's numbers and against plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.projectors import Ladder, hidden_widths

GOLDEN = np.load(Path(__file__).parent / "golden" / "c_lp.npz")
DIMS = {"t_b": 24, "t_a": 20}


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def reference_weights(variant):
    """Rename the reference's weights: heads.T.K.<block>.layers.<i>.* -> projectors.T.K.<block>."""
    weights = {}
    for name in GOLDEN.files:
        if name.startswith(f"{variant}/sd/heads."):
            _, teacher, token, block, _, layer, kind = name.split("/")[-1].split(".")
            token = {"cls": "cls", "patch": "patches"}[token]
            weights[f"projectors.{teacher}.{token}.{block}.{layer}.{kind}"] = golden(name)
    return weights


@pytest.mark.parametrize("variant, blocks", [("default", None), ("subset02", [0, 2])])
def test_ladder_equals_the_reference(variant, blocks):
    ladder = Ladder(16, 3, DIMS, blocks=blocks, hidden=(18, 40))
    ladder.load_state_dict(reference_weights(variant))
    # Entry 0 of the reference's list is the embedding, which nothing reads.
    outputs = [(golden(f"x_cls/{i}"), golden(f"x_patch/{i}")) for i in (1, 2, 3)]
    predicted = ladder(outputs)
    assert list(predicted) == ["t_a", "t_b"]
    for teacher, (cls, patches) in predicted.items():
        for found, token in ((cls, "cls"), (patches, "patch")):
            expected = golden(f"{variant}/out/{teacher}/{token}")
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def random_outputs(depth=3, width=8, grid=(4, 4), batch=2):
    generator = torch.Generator().manual_seed(0)
    patches = grid[0] * grid[1]
    return [
        (
            torch.randn(batch, width, generator=generator),
            torch.randn(batch, patches, width, generator=generator),
        )
        for _ in range(depth)
    ]


def apply(projector, token):
    first, _, second = projector
    return second.weight @ F.gelu(first.weight @ token + first.bias) + second.bias


def test_ladder_is_equation_3_written_as_a_loop():
    torch.manual_seed(0)
    ladder = Ladder(8, 3, {"dino": 5})
    outputs = random_outputs()
    cls, patches = ladder(outputs)["dino"]
    heads = ladder.projectors["dino"]
    for image in range(2):
        total = sum(apply(heads["cls"][str(i)], outputs[i][0][image]) for i in range(3))
        torch.testing.assert_close(cls[image], total)
        for p in range(16):
            total = sum(apply(heads["patches"][str(i)], outputs[i][1][image, p]) for i in range(3))
            torch.testing.assert_close(patches[image, p], total)


def test_without_a_ladder_only_the_last_block_counts():
    ladder = Ladder(8, 3, {"dino": 5}, blocks=[2], shared=True)
    outputs = random_outputs()
    others = [(cls + 1, patches - 1) for cls, patches in outputs[:2]] + outputs[2:]
    for found, expected in zip(ladder(others)["dino"], ladder(outputs)["dino"], strict=True):
        assert torch.equal(found, expected)
    assert len(list(ladder.parameters())) == 4
    assert ladder.projectors["dino"]["tokens"]["2"][0].out_features == 32


def test_shared_projector_treats_cls_and_patches_alike():
    ladder = Ladder(8, 2, {"dino": 5}, shared=True)
    outputs = [(patches[:, 3], patches) for _, patches in random_outputs(depth=2)]
    cls, patches = ladder(outputs)["dino"]
    torch.testing.assert_close(cls, patches[:, 3])


def test_hidden_widths_and_initial_weights():
    ladder = Ladder(64, 2, {"dino": 48})
    sizes = [ladder.projectors["dino"]["cls"][str(i)][0].out_features for i in range(2)]
    assert sizes == [64, 256]
    assert hidden_widths("reference", 64) == (768, 3072)
    weights = torch.cat([p.flatten() for n, p in ladder.named_parameters() if "weight" in n])
    biases = torch.cat([p.flatten() for n, p in ladder.named_parameters() if "bias" in n])
    assert weights.std().item() == pytest.approx(0.02, rel=0.03)
    assert not biases.any()


def test_chosen_patches_are_those_of_the_whole():
    ladder = Ladder(8, 3, {"dino": 5, "ibot": 7})
    outputs = random_outputs()
    positions = torch.tensor([[3, 0, 15], [7, 8, 2]])
    whole, chosen = ladder(outputs), ladder(outputs, positions)
    for teacher in ("dino", "ibot"):
        torch.testing.assert_close(chosen[teacher][0], whole[teacher][0])
        for image in range(2):
            torch.testing.assert_close(
                chosen[teacher][1][image], whole[teacher][1][image, positions[image]]
            )


def test_patches_can_be_chosen_for_one_teacher_alone():
    ladder = Ladder(8, 3, {"dino": 5, "ibot": 7})
    outputs = random_outputs()
    positions = torch.tensor([[3], [7]])
    chosen = ladder(outputs, {"dino": positions, "ibot": None})
    torch.testing.assert_close(chosen["dino"][1], ladder(outputs, positions)["dino"][1])
    torch.testing.assert_close(chosen["ibot"][1], ladder(outputs)["ibot"][1])


def test_other_grids_are_interpolated_before_the_projection():
    torch.manual_seed(0)
    plain = Ladder(8, 2, {"dino": 5, "dinov2-g": 6})
    mixed = Ladder(
        8, 2, {"dino": 5, "dinov2-g": 6}, grid=(4, 4), grids={"dino": (4, 4), "dinov2-g": (5, 3)}
    )
    mixed.load_state_dict(plain.state_dict())
    # A bilinear resize keeps a linear ramp: the value at a patch's centre is known.
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    ramp = (rows * 10 + columns).flatten()[None, :, None].expand(2, -1, 8)
    outputs = [(cls, ramp) for cls, _ in random_outputs(depth=2)]
    found = mixed(outputs)
    assert found["dino"][1].shape == (2, 16, 5) and found["dinov2-g"][1].shape == (2, 15, 6)
    torch.testing.assert_close(found["dino"][1], plain(outputs)["dino"][1])
    row, column = 1, 0
    value = ((row + 0.5) * 4 / 5 - 0.5) * 10 + (column + 0.5) * 4 / 3 - 0.5
    flat = [(cls, torch.full((2, 1, 8), value)) for cls, _ in outputs]
    expected = plain(flat)["dinov2-g"][1][:, 0]
    torch.testing.assert_close(found["dinov2-g"][1][:, row * 3 + column], expected)
    positions = {"dino": torch.tensor([[1], [2]]), "dinov2-g": torch.tensor([[3], [3]])}
    chosen = mixed(outputs, positions)
    torch.testing.assert_close(chosen["dinov2-g"][1][:, 0], expected)
    torch.testing.assert_close(chosen["dino"][1][1, 0], found["dino"][1][1, 2])


def test_names_with_dots_are_teachers_too():
    ladder = Ladder(8, 2, {"timm:vit_base.dino": 5})
    assert ladder(random_outputs(depth=2))["timm:vit_base.dino"][0].shape == (2, 5)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one teacher"):
        Ladder(8, 2, {})
    with pytest.raises(ValueError, match="indices 0 to 1"):
        Ladder(8, 2, {"dino": 5}, blocks=[2])
    with pytest.raises(ValueError, match="student's grid"):
        Ladder(8, 2, {"dino": 5}, grids={"dino": (4, 4)})
    with pytest.raises(ValueError, match="'paper', 'reference' or two integers"):
        Ladder(8, 2, {"dino": 5}, hidden="wide")
    with pytest.raises(ValueError, match="outputs of 2 blocks, got 3"):
        Ladder(8, 2, {"dino": 5})(random_outputs())
