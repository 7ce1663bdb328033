"""Linear classification of frozen global tokens, the paper's transfer protocol.

The steps of one probe, for either solver:
1. `per_class_split` takes 20 % of every class of trainval as validation rows (seed 22);
2. a head is fitted on the rest for every hyper-parameter, the best validation top-1 chooses;
3. one head is refitted on all of trainval, and tested once. Test labels choose nothing.

Solvers: `lbfgs` (scikit-learn, tokens as they are) for the small sets, `sgd` (L2-normalised tokens,
many heads trained side by side) for ImageNet-sized ones. The reference searches with 40 Optuna
trials; one strength of regularisation is found as well by a coarse and a fine grid.

Shapes: N rows, D channels, C classes, H heads, B rows of a mini-batch.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from evaluate.knn import check_features, class_indices

Solver = Literal["lbfgs", "sgd", "auto"]

# The paper's sets fall into 2,040 to 75,750 rows (L-BFGS) and 265,213 rows and more (SGD).
SGD_FROM_ROWS = 100_000
ONE_THREAD_BELOW = 2_000_000  # values; 2,600 tokens of a ViT-B
COARSE_C = tuple(float(c) for c in np.logspace(-5, 6, 12))
FINE_STEPS = (-2 / 3, -1 / 3, 1 / 3, 2 / 3)
# 10 x 4 = 40 heads, as many as the reference's trials, over the same ranges.
SGD_LR = tuple(float(lr) for lr in np.logspace(-1, 2, 10))
SGD_WEIGHT_DECAY = tuple(float(wd) for wd in np.logspace(-12, -4, 4))


@dataclass(frozen=True)
class ProbeResult:
    """Scores of a linear probe in percent, and how they were reached.

    `mean_per_class` is the mean of per-class accuracies over the classes that the test rows have.
    `log_odds` is t-ReX's figure, see `log_odds()`. `unconverged` counts the L-BFGS fits that
    stopped early (or the SGD heads that diverged) out of `fits`.
    """

    top1: float
    mean_per_class: float
    log_odds: float
    val_top1: float
    solver: str
    hyperparameters: dict[str, float]
    fits: int
    unconverged: int
    protocol: str


def linear_probe(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    test_labels_N: Tensor,
    solver: Solver = "auto",
    *,
    seed: int = 22,
    val_fraction: float = 0.2,
    grid_c: Sequence[float] = COARSE_C,
    grid_lr: Sequence[float] = SGD_LR,
    grid_weight_decay: Sequence[float] = SGD_WEIGHT_DECAY,
    epochs: int = 100,
    batch: int = 1024,
    device: torch.device | str | None = None,
) -> ProbeResult:
    """Fit a linear classifier on trainval tokens `[N, D]`, choose on a split of it, test once.

    Labels are `[N]` integers of any values. `auto` takes SGD from 100,000 trainval rows. L-BFGS
    runs on the CPU in float64; SGD on `device` (default: where the tokens are), in float32.
    The same arguments give the same result.

    Protocol: UNIC and t-ReX, linear classification on 15 transfer sets and ImageNet-1K.

    Raises ValueError for shapes that do not match, tokens that are not finite, fewer than two
    classes, test labels without a training row, and trainval without a class of two images.
    """
    check_features(train_ND, train_labels_N, "train")
    check_features(test_ND, test_labels_N, "test")
    classes_C, labels_N, test_N = class_indices(train_labels_N, test_labels_N)
    if len(classes_C) < 2:
        raise ValueError(f"expected at least two classes, found only {classes_C.tolist()}")
    fit_rows, val_rows = per_class_split(labels_N, val_fraction, seed)
    if not len(val_rows):
        raise ValueError("every class has a single image: none can be held out for validation")
    if solver == "auto":
        solver = "lbfgs" if len(train_ND) < SGD_FROM_ROWS else "sgd"
    if solver == "lbfgs":
        found = _search_lbfgs(train_ND, labels_N, fit_rows, val_rows, grid_c)
        predicted_N = found.predict(test_ND)
        protocol = "linear, L-BFGS"
    elif solver == "sgd":
        trainer = SgdHeads(len(classes_C), epochs, batch, seed)
        train_ND = F.normalize(train_ND.to(device or train_ND.device).float(), dim=1)
        grid = [(lr, wd) for lr in grid_lr for wd in grid_weight_decay]
        found = _search_sgd(trainer, train_ND, labels_N, fit_rows, val_rows, grid)
        predicted_N = found.predict(F.normalize(test_ND.to(train_ND.device).float(), dim=1))
        protocol = f"linear, SGD, {epochs} epochs" + (
            "" if epochs >= 100 else " (reduced from 100)"
        )
    else:
        raise ValueError(f"expected solver lbfgs, sgd or auto, found {solver!r}")
    top1 = _top1(predicted_N, test_N)
    return ProbeResult(
        top1=top1,
        mean_per_class=mean_per_class(predicted_N, test_N),
        log_odds=log_odds(top1, len(test_N)),
        val_top1=found.val_top1,
        solver=solver,
        hyperparameters=found.hyperparameters,
        fits=found.fits,
        unconverged=found.unconverged,
        protocol=protocol,
    )


def per_class_split(labels_N: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted row numbers (train, validation): floor(fraction * n) validation rows of every class.

    At least one row of a class is validation and at least one is training; a class of one image
    stays in training. Each class counts for itself: the reference lets one small class change the
    fraction of all classes after it. Drawn from a generator of its own.

    Raises ValueError unless 0 < fraction < 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"expected a validation fraction between 0 and 1, found {fraction}")
    _, class_N, size_C = labels_N.cpu().unique(return_inverse=True, return_counts=True)
    # .29 * 100 is 28.999999999999996 in binary: a hair keeps floor at what was meant.
    held_C = (size_C.double() * fraction + 1e-9).floor().long().clamp(min=1)
    held_C = held_C.minimum(size_C - 1)
    shuffled_N = torch.randperm(len(class_N), generator=torch.Generator().manual_seed(seed))
    grouped_N = shuffled_N[class_N[shuffled_N].argsort(stable=True)]
    first_C = size_C.cumsum(0) - size_C
    grouped_class_N = class_N[grouped_N]
    rank_N = torch.arange(len(class_N)) - first_C[grouped_class_N]
    is_val_N = rank_N < held_C[grouped_class_N]
    return grouped_N[~is_val_N].sort().values, grouped_N[is_val_N].sort().values


def log_odds(top1: float, n: int) -> float:
    """ln(p / (1 - p)) of an accuracy in percent over n images (t-ReX averages these over sets).

    Kept finite: an accuracy of 0 or 100 % counts as half an image away from it.
    """
    p = min(max(top1 / 100, 0.5 / n), 1 - 0.5 / n)
    return math.log(p / (1 - p))


def mean_per_class(predicted_N: Tensor, wanted_N: Tensor) -> float:
    """Mean over the classes in `wanted_N` of the accuracy within a class, in percent."""
    hits_C = torch.bincount(wanted_N, weights=(predicted_N == wanted_N).double())
    size_C = torch.bincount(wanted_N)
    return float(100 * (hits_C / size_C)[size_C > 0].mean())


def _top1(predicted_N: Tensor, wanted_N: Tensor) -> float:
    return float(100 * (predicted_N == wanted_N).double().mean())


@dataclass
class _Search:
    """The fits made so far and the best of them, then the classifier refitted on trainval."""

    val_top1: float = -1.0
    hyperparameters: dict[str, float] = field(default_factory=dict)
    fits: int = 0
    unconverged: int = 0
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor = field(default_factory=lambda: torch.empty(0))

    def predict(self, features_ND: Tensor) -> Tensor:
        logits_NC = features_ND.to(self.weight) @ self.weight.T + self.bias
        return logits_NC.argmax(1).cpu()


def _search_lbfgs(
    train_ND: Tensor, labels_N: Tensor, fit_rows: Tensor, val_rows: Tensor, grid: Sequence[float]
) -> _Search:
    features_ND = train_ND.cpu().double()
    fit_x, fit_y = features_ND[fit_rows].numpy(), labels_N[fit_rows].numpy()
    val_x, val_y = features_ND[val_rows].numpy(), labels_N[val_rows].numpy()
    found = _Search()
    scores: dict[float, float] = {}

    def walk(path: Sequence[float]) -> None:
        # Neighbours on the path have close optima, so each fit starts from the one before.
        model = _logistic(warm_start=True)
        for c in sorted(path):
            found.unconverged += _fit(model.set_params(C=c), fit_x, fit_y)
            scores[c] = 100 * float(model.score(val_x, val_y))

    walk(grid)
    coarse = _strongest_best(scores)
    walk([coarse * 10**step for step in FINE_STEPS if min(grid) <= coarse * 10**step <= max(grid)])
    best = _strongest_best(scores)
    model = _logistic().set_params(C=best)
    found.unconverged += _fit(model, features_ND.numpy(), labels_N.numpy())
    found.fits = len(scores) + 1
    found.val_top1, found.hyperparameters = scores[best], {"C": best}
    found.weight, found.bias = _both_classes(model)
    return found


def _strongest_best(scores: dict[float, float]) -> float:
    # Of equal scores the smallest C, the strongest regularisation: the choice is then unique.
    return min(scores, key=lambda c: (-scores[c], c))


def _logistic(warm_start: bool = False) -> LogisticRegression:
    # l2 and lbfgs are the defaults; naming the penalty is deprecated since scikit-learn 1.8.
    return LogisticRegression(max_iter=2000, warm_start=warm_start)


def _fit(model: LogisticRegression, x: np.ndarray, y: np.ndarray) -> bool:
    """Fit; True where L-BFGS stopped before converging. Other warnings pass through."""
    # Small products wait for each other's threads: on two busy cores, one thread took 0.2 s for a
    # search over 1,500 tokens of 96 channels, two threads 10 s.
    threads = 1 if x.size < ONE_THREAD_BELOW else None
    with threadpool_limits(threads, "blas"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y)
    early = [w for w in caught if issubclass(w.category, ConvergenceWarning)]
    for w in caught:
        if w not in early:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    return bool(early)


def _both_classes(model: LogisticRegression) -> tuple[Tensor, Tensor]:
    weight_CD, bias_C = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(weight_CD) > 1:
        return weight_CD, bias_C
    # scikit-learn keeps one row for two classes: the logit of the second against zero.
    return torch.cat([0 * weight_CD, weight_CD]), torch.cat([0 * bias_C, bias_C])


def _search_sgd(
    trainer: "SgdHeads",
    train_ND: Tensor,
    labels_N: Tensor,
    fit_rows: Tensor,
    val_rows: Tensor,
    grid: list[tuple[float, float]],
) -> _Search:
    labels_N = labels_N.to(train_ND.device)
    weight_HDC, bias_HC, alive_H = trainer.fit(train_ND[fit_rows], labels_N[fit_rows], grid)
    wanted_N = labels_N[val_rows].cpu()
    scores = [-1.0] * len(grid)
    for head in alive_H.nonzero().flatten().tolist():
        logits_NC = train_ND[val_rows] @ weight_HDC[head] + bias_HC[head]
        scores[head] = _top1(logits_NC.argmax(1).cpu(), wanted_N)
    best = max(range(len(grid)), key=scores.__getitem__)
    refit_DC, refit_C, refit_alive = trainer.fit(train_ND, labels_N, [grid[best]])
    if scores[best] < 0 or not bool(refit_alive.all()):
        raise ValueError(f"no SGD head stayed finite over (learning rate, weight decay) in {grid}")
    return _Search(
        val_top1=scores[best],
        hyperparameters={"lr": grid[best][0], "weight_decay": grid[best][1]},
        fits=len(grid) + 1,
        unconverged=int((~alive_H).sum()),
        weight=refit_DC[0].T,
        bias=refit_C[0],
    )


@dataclass(frozen=True)
class SgdHeads:
    """Trains one linear head for every (learning rate, weight decay), all in one pass.

    Softmax cross-entropy, SGD with momentum 0.9, weight decay on weight and bias alike, the rate
    on a cosine that moves once an epoch (epoch e of E: half of 1 + cos(pi e / E); the reference
    sets it one epoch late). Every head sees the same batches and starts from the same weights, and
    none influences another: a head that diverges is reported, the others go on.
    """

    num_classes: int
    epochs: int = 100
    batch: int = 1024
    seed: int = 22
    momentum: float = 0.9

    def fit(
        self, features_ND: Tensor, labels_N: Tensor, grid: Sequence[tuple[float, float]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights `[H, D, C]`, biases `[H, C]` and which heads stayed finite `[H]`.

        Features are `[N, D]` float32, labels `[N]` class indices on the same device.
        """
        device = features_ND.device
        draw = torch.Generator().manual_seed(self.seed)
        rate_H, decay_H = torch.tensor(grid, dtype=torch.float32, device=device).unbind(1)
        params = [p.to(device) for p in self._init(features_ND.shape[1], len(grid), draw)]
        speeds = [torch.zeros_like(p) for p in params]
        alive_H = torch.ones(len(grid), dtype=torch.bool, device=device)
        for epoch in range(self.epochs):
            scale = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
            order_N = torch.randperm(len(features_ND), generator=draw).to(device)
            for rows_B in order_N.split(self.batch):
                loss_H, grads = _loss_and_grads(params, features_ND[rows_B], labels_N[rows_B])
                alive_H &= loss_H.isfinite()
                for p, grad, speed in zip(params, grads, speeds, strict=True):
                    each = (-1,) + (1,) * (p.ndim - 1)
                    speed.mul_(self.momentum).add_(grad + decay_H.view(each) * p)
                    p.sub_(scale * rate_H.view(each) * speed)
        finite_H = torch.stack([p.flatten(1).isfinite().all(1) for p in params]).all(0)
        return params[0], params[1], alive_H & finite_H

    def _init(self, width: int, heads: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        # torch.nn.Linear's own initialisation, from the given generator.
        bound = 1 / math.sqrt(width)
        weight_DC = torch.empty(width, self.num_classes).uniform_(-bound, bound, generator=draw)
        bias_C = torch.empty(self.num_classes).uniform_(-bound, bound, generator=draw)
        return weight_DC.repeat(heads, 1, 1), bias_C.repeat(heads, 1)


def _loss_and_grads(
    params: list[Tensor], features_BD: Tensor, labels_B: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Mean cross-entropy `[H]` of each head, and its gradients in closed form."""
    weight_HDC, bias_HC = params
    logp_HBC = torch.log_softmax(features_BD @ weight_HDC + bias_HC[:, None], dim=-1)
    wanted_BC = F.one_hot(labels_B, bias_HC.shape[1]).to(logp_HBC.dtype)
    rows = torch.arange(len(labels_B), device=labels_B.device)
    loss_H = -logp_HBC[:, rows, labels_B].mean(1)
    error_HBC = logp_HBC.exp_().sub_(wanted_BC).div_(len(labels_B))
    return loss_H, [features_BD.T @ error_HBC, error_HBC.sum(1)]
