"""`unic-distill`: train one student from the cached features of several teachers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from console.command import run_command
from console.locations import location
from console.project import ProjectError, given, read_project
from distill.config import DistillConfig
from distill.recipes import RECIPES

if TYPE_CHECKING:
    from distill.run import Finished

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEFAULTS = DistillConfig(cache=Path(), out=Path())

INPUT, METHOD, RUNNING = "Input and output", "Method", "Running"


@app.command()
def unic_distill(
    cache: Annotated[
        str | None,
        typer.Option(
            help="Feature cache to learn from: a folder, or the URL of one in a bucket.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="timm architecture, optionally with arguments ('vit_tiny_patch16_224 depth=6'), "
            f"or a timm folder to copy the architecture of.  (default: {DEFAULTS.student})",
            rich_help_panel=INPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run.  (default: runs/RECIPE)", rich_help_panel=INPUT),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="Teacher in the cache, repeatable.  (default: all)", rich_help_panel=INPUT
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Where the image tars are, if they moved since extraction.", rich_help_panel=INPUT
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help=", ".join(RECIPES) + ".", rich_help_panel=METHOD)
    ] = DEFAULTS.recipe,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            help="All choices of the paper's code where it differs from the paper's equations.",
            rich_help_panel=METHOD,
        ),
    ] = DEFAULTS.reference,
    epochs: Annotated[
        int | None,
        typer.Option(
            help=f"Passes over the images.  (default: {DEFAULTS.epochs})", rich_help_panel=METHOD
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help=f"Images a step.  (default: {DEFAULTS.batch_size})", rich_help_panel=METHOD
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help=f"Peak learning rate for 256 images a step.  (default: {DEFAULTS.lr})",
            rich_help_panel=METHOD,
        ),
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(
            help="Probability p of teacher dropping (Eq. 4).  (default: the recipe's)",
            rich_help_panel=METHOD,
        ),
    ] = None,
    drop_path: Annotated[
        float | None,
        typer.Option(
            help=f"Drop path rate of the last block.  (default: {DEFAULTS.drop_path})",
            rich_help_panel=METHOD,
        ),
    ] = None,
    warmup_epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of linear warm-up, at most half of the run.  "
            f"(default: {DEFAULTS.warmup_epochs})",
            rich_help_panel=METHOD,
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(help="Use the first views only.  (default: all)", rich_help_panel=METHOD),
    ] = None,
    view_recipe: Annotated[
        str | None,
        typer.Option(
            help="Views to train on, if the cache has several recipes.", rich_help_panel=METHOD
        ),
    ] = None,
    train_norm: Annotated[
        bool,
        typer.Option(
            "--train-norm", help="Train the student's final norm.", rich_help_panel=METHOD
        ),
    ] = DEFAULTS.train_norm,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of order, draws and initialisation.  (default: 0)", rich_help_panel=METHOD
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Threads that read and render ahead.", rich_help_panel=RUNNING)
    ] = DEFAULTS.workers,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUNNING)
    ] = DEFAULTS.device,
    log_every: Annotated[
        int, typer.Option(help="Steps between lines of metrics.", rich_help_panel=RUNNING)
    ] = DEFAULTS.log_every,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Minutes between checkpoints.", rich_help_panel=RUNNING)
    ] = DEFAULTS.checkpoint_minutes,
) -> None:
    """Distil the teachers whose features are in CACHE into one student.

    Stopped by Ctrl-C or SIGTERM it saves a checkpoint; the same command goes on from there.
    """
    project = read_project()
    found = location(cache) if cache else project.cache
    if found is None:
        raise ProjectError(
            "missing --cache: give it (for example --cache feats), or work in a folder whose "
            "unic.toml names it"
        )
    config = DistillConfig(
        cache=found,
        out=out or (project.runs or Path("runs")) / recipe,
        student=student or project.student or DEFAULTS.student,
        recipe=recipe,
        reference=reference,
        teachers=tuple(teacher or ()),
        view_recipe=view_recipe or project.recipe,
        views=views,
        epochs=given(epochs, project.epochs, DEFAULTS.epochs),
        batch_size=given(batch_size, project.batch_size, DEFAULTS.batch_size),
        lr=given(lr, project.learning_rate, DEFAULTS.lr),
        drop_path=given(drop_path, project.drop_path, DEFAULTS.drop_path),
        warmup_epochs=given(warmup_epochs, project.warmup_epochs, DEFAULTS.warmup_epochs),
        drop=drop,
        train_norm=train_norm,
        seed=given(seed, project.seed, DEFAULTS.seed),
        workers=workers,
        device=device,
        log_every=log_every,
        checkpoint_minutes=checkpoint_minutes,
        data=tuple(data or ()),
    )
    # Here, so that --help does not wait for torch.
    from distill.run import distill

    typer.echo(summary(distill(config)))


def summary(done: "Finished") -> str:
    """What was reached, and how to use it."""
    losses = ", ".join(
        f"{teacher} {values['teacher_loss']:.4f}"
        for teacher, values in done.last["teachers"].items()
    )
    made = f"{done.made:,} made now" if done.made else "finished before"
    return (
        f"{done.steps:,} steps ({made}); loss {losses}\n"
        f'student: timm.create_model("local-dir:{done.student}", pretrained=True)'
    )


def main() -> NoReturn:
    """Entry point of the command."""
    run_command(app)
