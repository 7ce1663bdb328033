"""The tasks: which features they take, which probe they run, and which figures come of it."""

from collections.abc import Callable
from dataclasses import dataclass

from console.progress import ProgressBar
from evaluate.classification import linear_probe
from evaluate.encoder import EvaluationError, Split, count_categories
from evaluate.knn import knn
from evaluate.segmentation import segmentation_probe
from evaluate.table import Role, Score

NEIGHBOURS = 20


@dataclass(frozen=True)
class Request:
    """One encoder on one task: its name and role, both splits, and how to run."""

    encoder: str
    role: Role
    train: Split
    test: Split
    classes: int
    seed: int
    steps: int | None = None


def score_knn(request: Request) -> list[Score]:
    """k-NN on global tokens (facts of DINO's protocol in `evaluate.knn`), reported at k = 20."""
    name, train, test = request.encoder, request.train, request.test
    found = knn(train.cls(name), train.labels, test.cls(name), test.labels)
    return [
        Score(
            encoder=name,
            task="knn",
            metric="top-1 %",
            value=found[NEIGHBOURS],
            protocol=f"k-NN on the global token, k {NEIGHBOURS}, temperature 0.07, centre view",
            role=request.role,
            details={"top1_by_k": {str(k): value for k, value in found.items()}},
        )
    ]


def score_classification(request: Request) -> list[Score]:
    """The paper's linear probe on global tokens: top-1, and apart the mean over classes."""
    name, train, test = request.encoder, request.train, request.test
    # 22 is the seed of the protocol's split; a different --seed moves it along.
    result = linear_probe(
        train.cls(name), train.labels, test.cls(name), test.labels, seed=22 + request.seed
    )
    return [
        Score(
            encoder=name,
            task="classification",
            metric="top-1 %",
            value=result.top1,
            protocol=result.protocol,
            role=request.role,
            details={
                "mean_per_class": result.mean_per_class,
                "log_odds": result.log_odds,
                "val_top1": result.val_top1,
                "hyperparameters": result.hyperparameters,
                "solver": result.solver,
                "unconverged": result.unconverged,
            },
        )
    ]


def score_segmentation(request: Request) -> list[Score]:
    """Linear head on frozen patch tokens, mIoU over the test set's summed areas."""
    name, train, test = request.encoder, request.train, request.test
    classes = request.classes or max(count_categories(train.masks), count_categories(test.masks))
    with ProgressBar(f"segmentation {name}", 1, "steps") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        result = segmentation_probe(
            train.patches(name),
            train.masks.long(),
            test.patches(name),
            test.masks.long(),
            classes,
            train.grid(name),
            steps=request.steps,
            seed=request.seed,
            progress=show,
        )
    return [
        Score(
            encoder=name,
            task="segmentation",
            metric="mIoU %",
            value=result.miou,
            protocol=result.protocol,
            role=request.role,
            details={
                "per_class_iou": result.per_class_iou,
                "pixel_accuracy": result.pixel_accuracy,
            },
        )
    ]


TASKS: dict[str, Callable[[Request], list[Score]]] = {
    "knn": score_knn,
    "classification": score_classification,
    "segmentation": score_segmentation,
}


def run_task(task: str, request: Request) -> list[Score]:
    """Scores of one encoder; raises `EvaluationError` when the data do not suit the task."""
    try:
        return TASKS[task](request)
    except ValueError as error:
        raise EvaluationError(f"{task} of {request.encoder}: {error}") from None
