"""One step's number, held against Eq. 1-4 written out in plain Python, image by image."""

import math

import numpy as np
import pytest
import torch

from distill.balancing import draws
from distill.batches import TrainingBatches
from distill.config import DistillConfig
from distill.run import build
from distill.step import Position

STUDENT = "vit_tiny_patch16_224 patch_size=16 embed_dim=32 depth=3 num_heads=2"
SEED, BATCH = 3, 10


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors of this size are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def batches(feats):
    return TrainingBatches(feats, batch_size=BATCH, seed=SEED)


@pytest.fixture(scope="module")
def batch(batches):
    return next(batches.iterate(0, 1, 1))


def prepare(feats, batches, **changes):
    config = DistillConfig(cache=feats, out=feats / "unused", student=STUDENT, **changes)
    torch.manual_seed(0)
    # Without drop path, which is drawn in training only.
    return build(config, batches).eval()


def call(distillation, batch, step=0, momentum=0.0):
    at = Position(SEED, step, 0, BATCH)
    with torch.no_grad():
        return distillation(batch["views"], batch["targets"], batch["positions"], at, momentum)


def token_loss(predicted, wanted):
    """Eq. 1 for one token: half of 1 - cosine, half of smooth-l1 averaged over channels."""
    dot = sum(p * w for p, w in zip(predicted, wanted, strict=True))
    lengths = math.sqrt(sum(p * p for p in predicted) * sum(w * w for w in wanted))
    smooth = 0.0
    for p, w in zip(predicted, wanted, strict=True):
        distance = abs(p - w)
        smooth += distance**2 / 2 if distance < 1 else distance - 0.5
    return 0.5 * (1 - dot / lengths) + 0.5 * smooth / len(wanted)


def image_loss(cls, patches, wanted_cls, wanted_patches):
    """The inner part of Eq. 2: the CLS token, and the mean over the patch tokens."""
    each = [token_loss(p, w) for p, w in zip(patches, wanted_patches, strict=True)]
    return token_loss(cls, wanted_cls) + sum(each) / len(each)


def losses(distillation, batch, standardized):
    """Loss `[teacher][image]` of the distillation's own predictions against these targets."""
    pixels = batch["views"].numpy().astype(np.float64) / 255
    mean = np.array([0.485, 0.456, 0.406])[:, None, None]
    std = np.array([0.229, 0.224, 0.225])[:, None, None]
    images = torch.from_numpy((pixels - mean) / std).float()
    with torch.no_grad():
        predicted = distillation.ladder(distillation.student(images))
    return [
        [
            image_loss(*(array[image].tolist() for array in (*predicted[name], *wanted)))
            for image in range(BATCH)
        ]
        for name, wanted in standardized.items()
    ]


def moments_of_the_cache(feats, batches, name):
    """Mean and standard deviation per channel over the whole cache, read row by row."""
    arrays = batches.dataset[0]["targets"][name]
    whole = batches.dataset.__getitems__(range(len(batches.dataset)))["targets"][name]
    assert set(arrays) == {"cls", "patches"}
    return {
        token: (flat.mean(0), flat.std(0, ddof=1))
        for token in arrays
        for flat in [whole[token].double().flatten(0, -2).numpy()]
    }


def exact_targets(feats, batches, batch):
    wanted = {}
    for name in ("alpha", "beta"):
        moments = moments_of_the_cache(feats, batches, name)
        wanted[name] = [
            (batch["targets"][name][token].double().numpy() - mean) / (std + 1e-6)
            for token, (mean, std) in moments.items()
        ]
    return wanted


def keep(loss, p, drawn):
    """Eq. 4 in words: the worst teacher of an image stays, each other goes with probability p."""
    teachers = range(len(loss))
    kept = [[1.0] * BATCH for _ in teachers]
    for image in range(BATCH):
        worst = max(teachers, key=lambda t: loss[t][image])
        for t in teachers:
            if t != worst and drawn[t][image] < p:
                kept[t][image] = 0.0
    return kept


@pytest.mark.parametrize("step", [0, 7])
def test_unic_is_equations_1_to_4(feats, batches, batch, step):
    distillation = prepare(feats, batches)
    total, metrics = call(distillation, batch, step)
    expected = losses(distillation, batch, exact_targets(feats, batches, batch))
    drawn = draws(SEED, step, 0, BATCH, 2, "cpu").tolist()
    kept = keep(expected, 0.5, drawn)
    assert {value for row in kept for value in row} == {0.0, 1.0}
    by_hand = sum(
        coefficient * loss
        for weights, row in zip(kept, expected, strict=True)
        for coefficient, loss in zip(weights, row, strict=True)
    )
    assert total.item() == pytest.approx(by_hand / BATCH, rel=1e-4)
    assert metrics["loss"].item() == total.item()
    assert metrics["coefficient"].tolist() == pytest.approx([sum(row) / BATCH for row in kept])
    means = [sum(row) / BATCH for row in expected]
    assert metrics["teacher_loss"].tolist() == pytest.approx(means, rel=1e-4)


def test_without_dropping_all_teachers_are_summed(feats, batches, batch):
    distillation = prepare(feats, batches, recipe="ladder")
    total, metrics = call(distillation, batch)
    expected = losses(distillation, batch, exact_targets(feats, batches, batch))
    assert total.item() == pytest.approx(sum(map(sum, expected)) / BATCH, rel=1e-4)
    assert metrics["coefficient"].tolist() == [1.0, 1.0]


def test_basic_learns_raw_features(feats, batches, batch):
    distillation = prepare(feats, batches, recipe="basic")
    total, _ = call(distillation, batch)
    raw = {
        name: [arrays[token].double().numpy() for token in ("cls", "patches")]
        for name, arrays in batch["targets"].items()
    }
    assert total.item() == pytest.approx(sum(map(sum, losses(distillation, batch, raw))) / BATCH)


def test_the_parts_are_the_terms_of_equation_1(feats, batches, batch):
    _, metrics = call(prepare(feats, batches), batch)
    parts = [f"{token}_{term}" for token in ("cls", "patches") for term in ("cosine", "smooth_l1")]
    halves = sum(metrics[part] for part in parts) / 2
    torch.testing.assert_close(halves, metrics["teacher_loss"])


def test_reference_normalises_by_the_coefficients_and_by_running_statistics(feats, batches, batch):
    distillation = prepare(feats, batches, reference=True)
    momenta = (1.0, 0.3, 0.0)
    running = {
        (name, token): (np.zeros(32), np.ones(32))
        for name in ("alpha", "beta")
        for token in ("cls", "patches")
    }
    for step, momentum in enumerate(momenta):
        current = next(batches.iterate(step, step + 1, 1))
        total, metrics = call(distillation, current, step, momentum)
        wanted = {"alpha": [], "beta": []}
        for (name, token), (mean, std) in running.items():
            features = current["targets"][name][token].double().numpy()
            wanted[name].append((features - mean) / (std + 1e-6))
            flat = features.reshape(-1, 32)
            running[name, token] = (
                (1 - momentum) * mean + momentum * flat.mean(0),
                (1 - momentum) * std + momentum * (flat.std(0, ddof=1) + 1e-6),
            )
        # The authors' code averages the CLS and the patch loss, the paper adds them.
        expected = [[loss / 2 for loss in row] for row in losses(distillation, current, wanted)]
        kept = keep(expected, 0.5, draws(SEED, step, 0, BATCH, 2, "cpu").tolist())
        pairs = [(kept[t][i], expected[t][i]) for t in range(2) for i in range(BATCH)]
        by_hand = sum(c * loss for c, loss in pairs) / sum(c for c, _ in pairs)
        assert total.item() == pytest.approx(by_hand, rel=1e-4)
        assert metrics["coefficient"].tolist() == pytest.approx([sum(k) / BATCH for k in kept])


def test_gradients_reach_the_student_through_kept_losses_only(feats, batches, batch):
    distillation = prepare(feats, batches, drop=1.0)
    at = Position(SEED, 0, 0, BATCH)
    total, metrics = distillation(batch["views"], batch["targets"], {}, at)
    assert sum(metrics["coefficient"].tolist()) == pytest.approx(1)
    total.backward()
    lacking = [
        name
        for name, parameter in distillation.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert not lacking
    assert not any(value.requires_grad for value in metrics.values())
