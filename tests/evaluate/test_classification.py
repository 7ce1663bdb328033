import math

import pytest
import torch
import torch.nn.functional as F

from evaluate.classification import (
    SgdHeads,
    linear_probe,
    log_odds,
    mean_per_class,
    per_class_split,
)

QUICK_SGD = {
    "epochs": 20,
    "batch": 256,
    "grid_lr": (0.1, 1.0, 10.0, 30.0),
    "grid_weight_decay": (1e-12, 1e-4),
}


def _blobs(n, seed, classes=5, width=16, distance=2.0):
    """Classes of equal spread in directions of equal length, and the Bayes classifier's choice."""
    draw = torch.Generator().manual_seed(seed)
    means = distance * torch.eye(classes, width)
    labels = torch.arange(n) % classes
    features = means[labels] + torch.randn(n, width, generator=draw)
    return features, labels, torch.cdist(features, means).argmin(1)


def _probe(solver, train, labels, test, wanted, **options):
    options = {**(QUICK_SGD if solver == "sgd" else {}), **options}
    return linear_probe(train, labels, test, wanted, solver, **options)


def test_both_solvers_come_within_a_point_of_bayes():
    train, labels, _ = _blobs(4000, 1, distance=2.5)
    test, wanted, ideal = _blobs(4000, 2, distance=2.5)
    bayes = 100 * float((ideal == wanted).double().mean())
    assert 80 < bayes < 95
    lbfgs = _probe("lbfgs", train, labels, test, wanted).top1
    sgd = _probe("sgd", train, labels, test, wanted).top1
    assert lbfgs == pytest.approx(bayes, abs=1)
    assert sgd == pytest.approx(bayes, abs=1)
    assert sgd == pytest.approx(lbfgs, abs=1)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_permuted_labels_give_chance(solver):
    train, labels, _ = _blobs(1000, 3)
    test, wanted, _ = _blobs(1000, 4)
    draw = torch.Generator().manual_seed(0)
    # Of training and test alike: else a blob is right or wrong as a whole, which is no 3 sigma.
    labels, wanted = (x[torch.randperm(1000, generator=draw)] for x in (labels, wanted))
    sigma = 100 * math.sqrt(0.2 * 0.8 / 1000)
    assert abs(_probe(solver, train, labels, test, wanted).top1 - 20) < 3 * sigma


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_label_that_only_the_test_tokens_hold_is_not_used(solver):
    (train, labels, _), (test, wanted, _) = _blobs(500, 5), _blobs(500, 6)
    empty = torch.zeros(500, 1)
    blind = _probe(
        solver, torch.cat([empty, train], 1), labels, torch.cat([empty, test], 1), wanted
    )
    # Tenths: SGD normalises rows, so that a large new channel would shrink all the others.
    leak = wanted[:, None] / 10
    leaked = _probe(
        solver, torch.cat([empty, train], 1), labels, torch.cat([leak, test], 1), wanted
    )
    assert leaked.hyperparameters == blind.hyperparameters
    assert leaked.val_top1 == blind.val_top1
    assert leaked.top1 == pytest.approx(blind.top1, abs=0.5)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_test_labels_choose_nothing(solver):
    (train, labels, _), (test, wanted, _) = _blobs(500, 5), _blobs(500, 6)
    right = _probe(solver, train, labels, test, wanted)
    wrong = _probe(solver, train, labels, test, (wanted + 1) % 5)
    assert right.hyperparameters == wrong.hyperparameters
    assert right.top1 > 60 > 20 > wrong.top1


def test_sgd_does_not_see_the_scale_of_the_tokens():
    (train, labels, _), (test, wanted, _) = _blobs(500, 7), _blobs(500, 8)
    plain = _probe("sgd", train, labels, test, wanted)
    assert _probe("sgd", train * 1024, labels, test * 1024, wanted) == plain
    assert _probe("sgd", train * 1000, labels, test * 1000, wanted).top1 == plain.top1


def test_lbfgs_follows_the_scale_by_another_c():
    (train, labels, _), (test, wanted, _) = _blobs(1000, 9), _blobs(1000, 10)
    plain = _probe("lbfgs", train, labels, test, wanted)
    scaled = _probe("lbfgs", train / 100, labels, test / 100, wanted)
    assert scaled.hyperparameters["C"] > 100 * plain.hyperparameters["C"]
    assert scaled.top1 == pytest.approx(plain.top1, abs=0.5)


def test_two_classes_and_labels_of_any_value():
    (train, labels, _), (test, wanted, _) = _blobs(400, 11, classes=2), _blobs(400, 12, classes=2)
    plain = _probe("lbfgs", train, labels, test, wanted)
    odd = _probe("lbfgs", train, labels * 90 - 5, test, wanted * 90 - 5)
    assert odd == plain
    assert plain.top1 > 85


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_the_last_fit_uses_the_validation_rows_too(solver):
    labels = torch.arange(300) % 3
    _, val_rows = per_class_split(labels, 0.2, seed=22)
    train = F.one_hot(labels, 4).float()
    hidden = val_rows[labels[val_rows] == 2]
    # Without these rows, channel 3 has no weight and class 0 would win here.
    disguise = torch.tensor([0.6, 0.0, 0.0, 0.8])
    train[hidden] = disguise
    train += 0.01 * torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    options = {"grid_c": (1000.0,)} if solver == "lbfgs" else {"grid_lr": (30.0,)}
    result = _probe(solver, train, labels, disguise.repeat(3, 1), torch.full((3,), 2), **options)
    assert result.top1 == 100


def test_split_takes_its_share_of_every_class():
    sizes = torch.tensor([10, 2, 100, 1])
    labels = torch.arange(4).repeat_interleave(sizes)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    train, val = per_class_split(labels, 0.2, seed=22)
    # The reference lets the class of 2 change the classes after it: [2, 1, 50].
    assert labels[val].bincount(minlength=4).tolist() == [2, 1, 20, 0]
    assert labels[train].bincount().tolist() == [8, 1, 80, 1]
    assert sorted(torch.cat([train, val]).tolist()) == list(range(113))


def test_split_depends_on_the_seed_alone():
    labels = torch.arange(200) % 4
    first, again, other = (per_class_split(labels, 0.2, s)[1] for s in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


def test_split_is_not_led_astray_by_binary_fractions():
    _, val = per_class_split(torch.zeros(100, dtype=torch.long), 0.29, seed=0)
    assert len(val) == 29
    with pytest.raises(ValueError, match="between 0 and 1"):
        per_class_split(torch.zeros(4, dtype=torch.long), 1.0, seed=0)


def test_one_pass_of_many_heads_equals_torch_sgd_one_by_one():
    features, labels, _ = _blobs(200, 13)
    grid = [(0.5, 1e-2), (5.0, 1e-4)]
    trainer = SgdHeads(num_classes=5, epochs=4, batch=64, seed=3)
    weight, bias, alive = trainer.fit(features, labels, grid)
    assert alive.all()
    for head, (lr, decay) in enumerate(grid):
        draw = torch.Generator().manual_seed(3)
        linear = torch.nn.Linear(16, 5)
        with torch.no_grad():
            linear.weight.copy_(torch.empty(16, 5).uniform_(-0.25, 0.25, generator=draw).T)
            linear.bias.copy_(torch.empty(5).uniform_(-0.25, 0.25, generator=draw))
        sgd = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
        for epoch in range(4):
            sgd.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / 4)) / 2
            for rows in torch.randperm(200, generator=draw).split(64):
                sgd.zero_grad()
                F.cross_entropy(linear(features[rows]), labels[rows]).backward()
                sgd.step()
        torch.testing.assert_close(weight[head], linear.weight.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bias[head], linear.bias, rtol=1e-4, atol=1e-4)


def test_a_diverging_head_is_dropped_and_harms_no_other():
    features, labels, _ = _blobs(300, 14)
    trainer = SgdHeads(num_classes=5, epochs=5, batch=100)
    alone, _, _ = trainer.fit(features, labels, [(0.1, 0.0)])
    both, _, alive = trainer.fit(features, labels, [(0.1, 0.0), (1e30, 1e30)])
    assert alive.tolist() == [True, False]
    torch.testing.assert_close(both[0], alone[0])
    options = {"epochs": 5, "grid_weight_decay": (1e-4,)}
    result = _probe("sgd", features, labels, features, labels, grid_lr=(1.0, 1e38), **options)
    assert result.unconverged == 1
    assert result.hyperparameters["lr"] == 1.0
    with pytest.raises(ValueError, match="no SGD head stayed finite"):
        _probe("sgd", features, labels, features, labels, grid_lr=(1e38,), **options)


def test_unconverged_fits_are_counted_not_raised(monkeypatch):
    from evaluate import classification

    monkeypatch.setattr(
        classification,
        "_logistic",
        lambda warm_start=False: classification.LogisticRegression(
            max_iter=1, warm_start=warm_start
        ),
    )
    features, labels, _ = _blobs(300, 15)
    result = _probe("lbfgs", features, labels, features, labels, grid_c=(1.0, 100.0))
    assert result.unconverged == result.fits > 1


def test_auto_takes_lbfgs_for_small_sets_and_repeats_itself():
    (train, labels, _), (test, wanted, _) = _blobs(300, 16), _blobs(300, 17)
    first = linear_probe(train, labels, test, wanted)
    assert first.solver == "lbfgs"
    assert first == linear_probe(train, labels, test, wanted)
    assert "reduced" in _probe("sgd", train, labels, test, wanted).protocol


def test_mean_per_class_and_log_odds():
    wanted = torch.tensor([0, 0, 0, 1, 3])
    predicted = torch.tensor([0, 0, 1, 1, 0])
    assert mean_per_class(predicted, wanted) == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert (log_odds(50, 1000) + log_odds(90, 1000)) / 2 == pytest.approx(1.0986, abs=1e-4)
    assert log_odds(100, 50) == pytest.approx(math.log(99))


def test_errors_name_the_fault():
    features, labels, _ = _blobs(20, 18)
    with pytest.raises(ValueError, match="no training row: 9"):
        linear_probe(features, labels, features, torch.full((20,), 9))
    with pytest.raises(ValueError, match="at least two classes"):
        linear_probe(features, labels * 0, features, labels * 0)
    with pytest.raises(ValueError, match="every class has a single image"):
        linear_probe(features, torch.arange(20), features, torch.arange(20))
    with pytest.raises(ValueError, match="lbfgs, sgd or auto"):
        linear_probe(features, labels, features, labels, "adam")  # type: ignore[arg-type]
