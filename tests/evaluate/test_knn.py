import logging

import pytest
import torch

from evaluate.knn import knn, vote


def _blobs(n, seed, spread=0.6, classes=5):
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, classes, (n,), generator=draw)
    return means[labels] + spread * torch.randn(n, 8, generator=draw), labels


def test_one_near_neighbour_outvotes_two_farther_ones():
    sims, classes = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[0, 1, 1]])
    votes = vote(sims, classes, 2, temperature=0.07)[0]
    # exp(.9/.07) = 383,518 against 2 exp(.8/.07) = 183,821: a plain majority would say 1.
    assert votes.argmax() == 0
    assert float(votes[0] / votes[1]) == pytest.approx(383_518 / 183_821, rel=1e-5)


def test_the_same_vote_through_the_whole_classifier():
    angles = torch.tensor([0.9, 0.8, 0.8]).acos()
    train = torch.stack([angles.cos(), angles.sin()], 1)
    query, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 1])
    assert knn(train, labels, query, torch.tensor([0]), k=[3])[3] == 100
    # A high temperature makes it the majority's vote.
    assert knn(train, labels, query, torch.tensor([1]), k=[3], temperature=100)[3] == 100


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_equal_the_full_matrix(block):
    train, test = _blobs(300, 1), _blobs(101, 2)
    whole = knn(*train, *test, k=(1, 10, 100), block=101)
    assert knn(*train, *test, k=(1, 10, 100), block=block) == whole
    assert 60 < whole[10] < 100  # neither trivial nor broken


def test_agrees_with_a_plain_loop():
    (train, labels), (test, wanted) = _blobs(120, 3), _blobs(40, 4)
    hits = 0
    for query, label in zip(test, wanted, strict=True):
        sims = torch.cosine_similarity(train.double(), query.double()[None])
        near = sims.argsort(descending=True)[:20]
        votes = [sum((sims[i] / 0.07).exp() for i in near if labels[i] == c) for c in range(5)]
        hits += int(torch.tensor(votes).argmax() == label)
    assert knn(train, labels, test, wanted, k=[20])[20] == pytest.approx(100 * hits / 40)


def test_train_as_test_with_one_neighbour_is_perfect():
    train, labels = _blobs(200, 5, spread=3.0)
    assert knn(train, labels, train, labels, k=[1])[1] == 100


def test_scale_of_the_tokens_does_not_matter():
    (train, labels), (test, wanted) = _blobs(200, 6), _blobs(100, 7)
    scaled = train * torch.logspace(-3, 3, 200)[:, None]
    assert knn(scaled, labels, test * 1000, wanted, k=[10]) == knn(
        train, labels, test, wanted, k=[10]
    )


def test_labels_need_not_be_contiguous():
    (train, labels), (test, wanted) = _blobs(200, 8), _blobs(100, 9)
    plain = knn(train, labels, test, wanted, k=[10])
    assert knn(train, labels * 1000 - 7, test, wanted * 1000 - 7, k=[10]) == plain


def test_too_many_neighbours_are_clipped_and_said(caplog):
    (train, labels), test = _blobs(30, 10), _blobs(50, 11)
    with caplog.at_level(logging.WARNING):
        scores = knn(train, labels, *test, k=(10, 200))
    assert "k = 200 clipped to the 30 training rows" in caplog.text
    assert "k = 10" not in caplog.text
    assert scores[200] == knn(train, labels, *test, k=[30])[30]


def test_tiny_temperature_does_not_overflow():
    train, test = _blobs(200, 12), _blobs(100, 13)
    assert knn(*train, *test, k=[20], temperature=1e-4) == {20: knn(*train, *test, k=[1])[1]}


def test_errors_name_the_fault():
    train, labels = _blobs(20, 14)
    with pytest.raises(ValueError, match="no training row: 77, 88"):
        knn(train, labels, train[:2], torch.tensor([77, 88]))
    with pytest.raises(ValueError, match="1 of 20 rows hold NaN"):
        broken = train.clone()
        broken[3, 2] = float("nan")
        knn(broken, labels, train, labels)
    with pytest.raises(ValueError, match="expected 20 integer labels"):
        knn(train, labels[:19], train, labels)
    with pytest.raises(ValueError, match="k >= 1"):
        knn(train, labels, train, labels, k=[0])
