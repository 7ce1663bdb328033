"""The student's outputs, its drop path and its gradients."""

import pytest
import torch

from distill.balancing import aggregate, draws, teacher_dropping
from distill.droppath import DropPath, DropPathMasks, uniform
from distill.losses import teacher_loss
from distill.projectors import Ladder
from distill.student import Student

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)


def small_student(**kwargs):
    torch.manual_seed(0)
    return Student("vit_tiny_patch16_224", **(SMALL | kwargs))


def images(batch=8):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_outputs_are_the_raw_residual_stream_of_every_block():
    student = small_student().eval()
    assert (student.width, student.depth, student.grid) == (32, 3, (4, 4))
    assert (student.patch_size, student.image_size) == ((8, 8), (32, 32))
    x = images(2)
    outputs = student(x)
    encoder = student.encoder
    tokens = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(x)))
    assert len(outputs) == 3
    for block, (cls, patches) in zip(encoder.blocks, outputs, strict=True):
        tokens = block(tokens)
        torch.testing.assert_close(cls, tokens[:, 0])
        torch.testing.assert_close(patches, tokens[:, 1:])
    plain_norm = torch.nn.functional.layer_norm(tokens, (32,), eps=encoder.norm.eps)
    torch.testing.assert_close(student.features(x), plain_norm)


def test_final_norm_is_a_frozen_identity_unless_it_is_trained():
    norm = small_student().encoder.norm
    assert not norm.weight.requires_grad and not norm.bias.requires_grad
    assert torch.equal(norm.weight, torch.ones(32)) and not norm.bias.any()
    student = small_student(train_norm=True).eval()
    assert student.encoder.norm.weight.requires_grad
    cls, patches = student(images(2))[-1]
    features = student.features(images(2))
    torch.testing.assert_close(cls, features[:, 0])
    torch.testing.assert_close(patches, features[:, 1:])


@pytest.mark.parametrize("train_norm", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_step_reaches_every_trainable_parameter(train_norm, shared):
    student = small_student(train_norm=train_norm)
    ladder = Ladder(32, 3, {"dino": 8, "deit3": 12}, shared=shared)
    student.set_step(seed=0, step=0, offset=0, global_batch=8)
    predicted = ladder(student(images()))
    losses = [
        teacher_loss(cls, patches, torch.randn_like(cls), torch.randn_like(patches)).loss_B
        for cls, patches in predicted.values()
    ]
    loss_MB = torch.stack(losses)
    aggregate(loss_MB, teacher_dropping(loss_MB, 0.5, draws(0, 0, 0, 8, 2, "cpu"))).backward()
    for module in (student, ladder):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_halves_of_a_batch_drop_what_the_whole_drops():
    student = small_student(drop_path_rate=0.5)
    student.set_step(3, 5, 0, 8)
    whole = student(images())
    halves = []
    for offset in (0, 4):
        student.set_step(3, 5, offset, 8)
        halves.append(student(images()[offset : offset + 4]))
    for (cls, patches), first, second in zip(whole, *halves, strict=True):
        torch.testing.assert_close(torch.cat([first[0], second[0]]), cls)
        torch.testing.assert_close(torch.cat([first[1], second[1]]), patches)
    for seed, step in ((4, 5), (3, 6)):
        student.set_step(seed, step, 0, 8)
        assert not torch.allclose(student(images())[-1][0], whole[-1][0])


def test_drop_path_masks_are_the_same_for_one_process_and_two():
    masks = DropPathMasks()
    for rate in (0.2, 0.5):
        DropPath(masks, rate)
    masks.set_step(1, 2, 0, 8, torch.device("cpu"))
    whole = masks.scale_NB
    masks.set_step(1, 2, 4, 8, torch.device("cpu"))
    assert torch.equal(masks.scale_NB, whole[:, 4:])


def test_rates_rise_linearly_and_kept_branches_are_scaled():
    student = small_student(depth=5, drop_path_rate=0.4)
    layers = [module for module in student.modules() if isinstance(module, DropPath)]
    rates = [layer.rate for layer in layers]
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])
    student.set_step(0, 0, 0, 20_000)
    branch = torch.ones(20_000, 1, 1)
    kept = torch.stack([layer(branch).flatten() > 0 for layer in layers]).float()
    for layer, keep in zip(layers, kept, strict=True):
        assert layer(branch).max().item() == pytest.approx(1 / (1 - layer.rate))
        assert keep.mean().item() == pytest.approx(1 - layer.rate, abs=0.015)
        assert layer(branch).mean().item() == pytest.approx(1, abs=0.03)
    assert torch.corrcoef(kept).fill_diagonal_(0).abs().max() < 0.03


def test_steps_and_seeds_are_independent():
    positions = torch.arange(512)
    stream = torch.zeros(1, dtype=torch.int64)
    by_step = torch.stack([uniform(0, step, stream, positions) for step in range(64)])
    by_seed = torch.stack([uniform(seed, 0, stream, positions) for seed in range(64)])
    for table in (by_step, by_seed, by_step.T):
        assert torch.corrcoef(table).fill_diagonal_(0).abs().mean() < 0.15
        assert table.mean().item() == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(uniform(1 << 32, 0, stream, positions), by_seed[0])


def test_drop_path_passes_in_evaluation_and_needs_masks_in_training():
    student = small_student(drop_path_rate=0.9).eval()
    torch.testing.assert_close(
        student(images())[-1], small_student(drop_path_rate=0.0).eval()(images())[-1]
    )
    with pytest.raises(ValueError, match="batch of 8 images: call set_step"):
        student.train()(images())
    student.set_step(0, 0, 0, 4)
    with pytest.raises(ValueError, match="batch of 8 images"):
        student(images())
    with pytest.raises(ValueError, match="offset 4 lies outside the global batch of 4"):
        student.set_step(0, 0, 4, 4)


def test_recomputed_blocks_drop_the_same_branches():
    grads = []
    for recompute in (False, True):
        student = small_student(drop_path_rate=0.5)
        student.encoder.set_grad_checkpointing(recompute)
        student.set_step(0, 1, 0, 8)
        student(images())[-1][1].square().mean().backward()
        grads.append(student.encoder.patch_embed.proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_register_tokens_are_left_out():
    student = small_student(reg_tokens=2).eval()
    cls, patches = student(images(2))[0]
    assert cls.shape == (2, 32) and patches.shape == (2, 16, 32)
    assert student.features(images(2)).shape == (2, 19, 32)


def test_models_that_cannot_be_students_are_refused():
    with pytest.raises(ValueError, match="has no class token"):
        small_student(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="expected a ViT"):
        Student("resnet10t", drop_path_rate=0.0)
    with pytest.raises(ValueError, match="global_pool='token'"):
        small_student(global_pool="avg")
