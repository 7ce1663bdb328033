import math

import pytest
import torch
import torch.nn.functional as F

from evaluate.segmentation import (
    LinearHead,
    confusion,
    default_steps,
    iou_from_confusion,
    learning_rate,
    pixel_loss,
    segmentation_probe,
    upsample,
)


def _scenes(n, seed, classes=4, side=4, noise=0.0):
    """Patch tokens that spell their class, and masks of 4 x 4 pixels a patch."""
    draw = torch.Generator().manual_seed(seed)
    grid = torch.randint(0, classes, (n, side, side), generator=draw)
    tokens = F.one_hot(grid.flatten(1), classes).float()
    tokens = tokens + noise * torch.randn(tokens.shape, generator=draw)
    masks = grid.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return tokens, masks.byte()


def _halves(n, seed, classes=4):
    """Images of one class each: no boundary for the interpolation to blur."""
    labels = torch.arange(n) % classes
    draw = torch.Generator().manual_seed(seed)
    tokens = F.one_hot(labels, classes).float()[:, None].repeat(1, 16, 1)
    tokens = tokens + 0.01 * torch.randn(tokens.shape, generator=draw)
    return tokens, labels[:, None, None].repeat(1, 16, 16).byte()


def test_one_hot_patches_of_eight_images_are_learnt_in_200_steps():
    tokens, masks = _halves(8, 0)
    result = segmentation_probe(tokens, masks, *_halves(8, 1), 4, 4, steps=200)
    assert result.miou > 99
    assert result.pixel_accuracy > 99
    assert result.protocol == "linear, 200 steps (reduced from 80,000)"


def test_mixed_scenes_are_learnt_up_to_the_blur_at_their_borders():
    result = segmentation_probe(*_scenes(32, 0), *_scenes(16, 1), 4, 4, steps=200)
    assert 80 < result.miou < 100


def test_permuted_masks_give_chance():
    (tokens, masks), (test, wanted) = _halves(40, 0), _halves(100, 1)
    draw = torch.Generator().manual_seed(3)
    # Of training and test alike: then each image is an independent draw, however they cluster.
    masks, wanted = (m[torch.randperm(len(m), generator=draw)] for m in (masks, wanted))
    result = segmentation_probe(tokens, masks, test, wanted, 4, 4, steps=100, batch=8)
    sigma = 100 * math.sqrt(0.25 * 0.75 / 100)
    assert abs(result.pixel_accuracy - 25) < 3 * sigma


def test_golden_learning_rates():
    rate = [learning_rate(step, 40_000) for step in (750, 1500, 20_000, 39_999)]
    assert rate == pytest.approx([4.906e-4, 9.625e-4, 5.0e-4, 2.5e-8], rel=1e-4)
    assert learning_rate(0, 40_000) == pytest.approx(1e-9)
    # UNIC's 80,000 steps keep 1,500 of warm-up; a short run scales it.
    assert learning_rate(750, 80_000) == pytest.approx(1e-3 * (1 - 750 / 80_000) / 2, rel=1e-4)
    assert max(range(800), key=lambda s: learning_rate(s, 800)) == 30
    assert learning_rate(0, 1) == 1e-3


def test_hand_computed_iou():
    # Truth [0, 1, 1, ignored]: class 0 has 1 of 2 pixels right in the union, class 1 likewise.
    counts = confusion(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 255]), 2)
    assert iou_from_confusion(counts).tolist() == [0.5, 0.5]


def test_a_class_in_neither_prediction_nor_truth_is_left_out_of_the_mean():
    counts = confusion(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 0, 1, 1]), 4)
    iou = iou_from_confusion(counts)
    # Class 2 is absent; class 3 is predicted but never true, which is an error and counts as 0.
    assert iou[[0, 1, 3]].tolist() == [1.0, 0.5, 0.0]
    assert math.isnan(iou[2])
    assert float(iou.nanmean()) == pytest.approx(0.5)


def test_areas_are_summed_over_images_before_dividing():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    guess = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])
    summed = iou_from_confusion(confusion(guess, truth, 2))
    apart = torch.stack(
        [iou_from_confusion(confusion(g, t, 2)) for g, t in zip(guess, truth, strict=True)]
    )
    assert summed.tolist() == pytest.approx([3 / 5, 3 / 5])
    assert apart.nanmean(0).tolist() == pytest.approx([3 / 8, 3 / 8])


def test_counts_stay_exact_where_float32_would_not():
    counts = torch.tensor([[2**24 + 1, 0], [1, 2**24]])
    assert float(iou_from_confusion(counts)[0]) == (2**24 + 1) / (2**24 + 2)


def test_head_equals_batch_norm_and_a_1x1_convolution():
    head = LinearHead(6, 3, 2, 5, torch.Generator().manual_seed(0))
    assert head.classify.weight.std() < 0.02
    assert not head.classify.bias.any()
    tokens = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(1))
    norm, conv = torch.nn.BatchNorm2d(6), torch.nn.Conv2d(6, 3, 1)
    conv.weight.data = head.classify.weight.data[:, :, None, None]
    conv.bias.data.zero_()
    image = tokens.transpose(1, 2).unflatten(2, (2, 5))
    torch.testing.assert_close(head(tokens), conv(norm(image)))
    # At test both use what they saw in training, whatever is in the batch.
    head.eval(), norm.eval()
    torch.testing.assert_close(head(tokens[:1]), conv(norm(image[:1])))
    torch.testing.assert_close(head(tokens[:1]), head(tokens)[:1])


@pytest.mark.parametrize("size", [(32, 32), (30, 47), (2, 3)])
def test_upsampling_equals_interpolate(size):
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample(logits, *size), wanted)


def test_loss_ignores_255_but_divides_by_all_pixels():
    logits = torch.zeros(1, 2, 2, 2)
    masks = torch.tensor([[[0, 1], [255, 255]]])
    assert float(pixel_loss(logits, masks)) == pytest.approx(math.log(2) / 2)
    assert float(pixel_loss(logits, torch.full((1, 2, 2), 255))) == 0


def test_ignored_pixels_change_neither_training_nor_score():
    tokens, masks = _halves(8, 0)
    masks[:, :4] = 255
    result = segmentation_probe(tokens, masks, tokens, masks, 4, 4, steps=200)
    assert result.miou > 99


def test_same_seed_same_result_other_seed_another():
    data = (*_scenes(16, 0, noise=0.8), *_scenes(8, 1, noise=0.8), 4, 4)
    first, again, other = (segmentation_probe(*data, steps=30, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.miou != other.miou


def test_tokens_may_be_read_on_demand_and_in_half_precision():
    tokens, masks = _scenes(16, 0, noise=0.3)
    tokens = tokens.half()

    class OnDisk:
        def __len__(self):
            return len(tokens)

        def __getitem__(self, rows):
            return torch.stack([tokens[int(row)] for row in rows])

    seen = []
    lazy = segmentation_probe(
        OnDisk(), masks, OnDisk(), masks, 4, (4, 4), steps=20, progress=lambda *s: seen.append(s)
    )
    assert lazy == segmentation_probe(tokens, masks, tokens, masks, 4, 4, steps=20)
    assert seen == [(step, 20) for step in range(1, 21)]


def test_default_steps_follow_the_protocols_epochs():
    assert default_steps(20_210, 16) == 40_000  # ADE20K under DINOv2
    assert default_steps(20_210, 8) == 80_000  # and under UNIC
    assert default_steps(1_000_000, 16) == 40_000
    assert default_steps(1_000, 16) == 1979
    assert default_steps(8, 8) == 500


def test_errors_name_the_fault():
    tokens, masks = _scenes(4, 0)
    with pytest.raises(ValueError, match="grid of 5 x 5 patches"):
        segmentation_probe(tokens, masks, tokens, masks, 4, 5, steps=1)
    with pytest.raises(ValueError, match="expected mask values 0 to 1 or 255, found"):
        segmentation_probe(tokens, masks, tokens, masks, 2, 4, steps=1)
    with pytest.raises(ValueError, match="one for each of 4 rows"):
        segmentation_probe(tokens, masks[:3], tokens, masks, 4, 4, steps=1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        segmentation_probe(tokens * float("nan"), masks, tokens, masks, 4, 4, steps=1)
    with pytest.raises(ValueError, match="no labelled pixel"):
        segmentation_probe(tokens, masks, tokens, masks * 0 + 255, 4, 4, steps=1)
