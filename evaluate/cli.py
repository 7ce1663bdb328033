"""`unic-eval`: probe any number of frozen encoders on one task, side by side."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from console.command import run_command
from console.locations import location
from console.project import Project, ProjectError, Task, read_project
from evaluate.config import EvalConfig
from evaluate.table import print_scores

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Probe frozen encoders, students and teachers alike, on one task.",
)

Encoders = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder",
        help="Encoder, repeatable: a student's folder, a teacher as for unic-extract, pixels, or "
        "random:ARCHITECTURE.  (default: all teachers and students of the project)",
    ),
]
TaskName = Annotated[
    str | None, typer.Option("--task", help="Data set named in unic.toml.  (default: its only one)")
]
Train = Annotated[
    list[str] | None, typer.Option(help="Tars (or an ImageFolder) that the probe is trained on.")
]
Test = Annotated[
    list[str] | None, typer.Option(help="Tars (or an ImageFolder) that it is tested on.")
]
CacheFolder = Annotated[
    str | None, typer.Option(help="Feature cache: a folder or a URL.  (default: feats)")
]
Results = Annotated[
    Path | None, typer.Option(help="Where the figures go.  (default: results.json)")
]
Size = Annotated[
    int | None, typer.Option(help="Side of the centre view in pixels.  (default: 224)")
]
Seed = Annotated[int, typer.Option(help="Seed of the probe.")]
BatchSize = Annotated[int, typer.Option(help="Views a forward pass.")]
Workers = Annotated[int, typer.Option(help="Threads that decode images.")]
Steps = Annotated[
    int | None,
    typer.Option(help="Training steps of the head.  (default: the protocol's 31.7 epochs)", min=1),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


@app.command()
def knn(
    encoder: Encoders = None,
    task: TaskName = None,
    train: Train = None,
    test: Test = None,
    cache: CacheFolder = None,
    results: Results = None,
    size: Size = None,
    seed: Seed = 0,
    batch_size: BatchSize = EvalConfig.batch_size,
    workers: Workers = EvalConfig.workers,
    device: Device = EvalConfig.device,
) -> None:
    """Classify by the nearest neighbours of the global token (k 20; others in results.json)."""
    _run("knn", encoder, task, train, test, cache, results, size, seed, batch_size, workers, device)


@app.command()
def classification(
    encoder: Encoders = None,
    task: TaskName = None,
    train: Train = None,
    test: Test = None,
    cache: CacheFolder = None,
    results: Results = None,
    size: Size = None,
    seed: Seed = 0,
    batch_size: BatchSize = EvalConfig.batch_size,
    workers: Workers = EvalConfig.workers,
    device: Device = EvalConfig.device,
) -> None:
    """Train a linear classifier on the global token; top-1 accuracy."""
    _run(
        *("classification", encoder, task, train, test, cache, results, size),
        *(seed, batch_size, workers, device),
    )


@app.command()
def segmentation(
    encoder: Encoders = None,
    task: TaskName = None,
    train: Train = None,
    test: Test = None,
    cache: CacheFolder = None,
    results: Results = None,
    size: Size = None,
    seed: Seed = 0,
    batch_size: BatchSize = EvalConfig.batch_size,
    workers: Workers = EvalConfig.workers,
    device: Device = EvalConfig.device,
    steps: Steps = None,
) -> None:
    """Train a linear head on patch tokens; mean IoU. The tars need .seg.png masks."""
    _run(
        *("segmentation", encoder, task, train, test, cache, results, size),
        *(seed, batch_size, workers, device, steps),
    )


def _run(
    kind: str,
    encoder: list[str] | None,
    task: str | None,
    train: list[str] | None,
    test: list[str] | None,
    cache: str | None,
    results: Path | None,
    size: int | None,
    seed: int,
    batch_size: int,
    workers: int,
    device: str,
    steps: int | None = None,
) -> None:
    project = read_project()
    name, data = choose_data(project, task, train, test)
    config = EvalConfig(
        task=kind,
        encoders=tuple(choose_encoders(project, encoder)),
        train=tuple(data.train),
        test=tuple(data.test),
        cache=location(cache) if cache else project.cache or Path("feats"),
        results=results or Path("results.json"),
        name=name,
        classes=tuple(data.classes),
        size=size or project.size or EvalConfig.size,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        device=device,
        steps=steps,
    )
    # Here, so that --help does not wait for torch.
    from evaluate.run import evaluate

    print_scores(evaluate(config))
    typer.echo(f"written to {config.results}")


def choose_data(
    project: Project, task: str | None, train: list[str] | None, test: list[str] | None
) -> tuple[str, Task]:
    """The data set: --train and --test, or a task of `unic.toml`; raises `ProjectError`."""
    if train and test:
        return task or "", Task(train, test)
    if train or test:
        raise ProjectError("--train and --test go together: the probe is trained and then tested")
    names = ", ".join(project.tasks) or "none"
    if task is None and len(project.tasks) == 1:
        task = next(iter(project.tasks))
    if task is None:
        raise ProjectError(
            "which data? Give --train TARS --test TARS, or --task NAME of a unic.toml "
            f"(it names {names})"
        )
    if task not in project.tasks:
        raise ProjectError(f"unic.toml names no task {task!r}; it names {names}")
    return task, project.tasks[task]


def choose_encoders(project: Project, given: list[str] | None) -> list[str]:
    """The encoders given, or all of the project: its teachers, then the students of its runs."""
    if given:
        return [project.encoder(name) for name in given]
    teachers = [project.encoder(name) for name in project.teachers]
    students = sorted(map(str, (project.runs or Path("runs")).glob("*/student")))
    if not teachers and not students:
        raise ProjectError(
            "which encoders? Give --encoder runs/unic/student --encoder dino, or work in a folder "
            "whose unic.toml names teachers"
        )
    return teachers + students


def main() -> NoReturn:
    """Entry point of the command."""
    run_command(app)
