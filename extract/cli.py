"""`unic-extract`: run frozen encoders once over fixed, seeded views, and cache what they give."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from console.command import run_command
from console.project import ProjectError, given, read_project
from extract.config import ExtractConfig

if TYPE_CHECKING:
    from extract.run import Extracted

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DEFAULTS = ExtractConfig(data=(), cache=Path(), teachers=("dino",))

INPUT, VIEWS, RUNNING = "Input and output", "Views", "Running"


@app.command()
def unic_extract(
    teacher: Annotated[
        list[str],
        typer.Option(
            help="Encoder to run, repeatable: dino, deit3, timm:TAG, a timm folder, "
            "NAME=FOLDER to choose its name in the cache, or a name from unic.toml.",
            rich_help_panel=INPUT,
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Image tars (WebDataset), repeatable: paths, patterns such as "
            "'train-{000000..000099}.tar', or an ImageFolder, which is packed into tars.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of the feature cache.", rich_help_panel=INPUT)
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint file for the one --teacher, loaded strictly.", rich_help_panel=INPUT
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            help=f"Views of each image.  (default: {DEFAULTS.views})", rich_help_panel=VIEWS
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="unic@SIZE (the training augmentation) or center@SIZE (for evaluation).  "
            f"(default: {DEFAULTS.recipe})",
            rich_help_panel=VIEWS,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help=f"Seed of the views.  (default: {DEFAULTS.seed})", rich_help_panel=VIEWS),
    ] = None,
    store_views: Annotated[
        bool,
        typer.Option(
            "--store-views",
            help="Keep the pixels of the views too: training needs no image decoding then.",
            rich_help_panel=VIEWS,
        ),
    ] = DEFAULTS.store_views,
    batch_size: Annotated[
        int, typer.Option(help="Views a forward pass.", rich_help_panel=RUNNING)
    ] = DEFAULTS.batch_size,
    workers: Annotated[
        int, typer.Option(help="Threads that decode images.", rich_help_panel=RUNNING)
    ] = DEFAULTS.workers,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUNNING)
    ] = DEFAULTS.device,
) -> None:
    """Run frozen TEACHERs once over seeded views of DATA and write their features to CACHE.

    Run it again to go on where it stopped, to add a teacher, views or tars: only what is missing
    is computed.
    """
    project = read_project()
    config = ExtractConfig(
        data=tuple(data or project.data or _lacking("--data 'images/train-*.tar'")),
        cache=cache or project.cache or Path(_lacking("--cache feats")),
        teachers=tuple(project.encoder(name) for name in teacher),
        recipe=recipe or project.recipe or DEFAULTS.recipe,
        views=given(views, project.views, DEFAULTS.views),
        seed=given(seed, project.seed, DEFAULTS.seed),
        batch_size=batch_size,
        workers=workers,
        store_views=store_views,
        weights=weights,
        device=device,
    )
    # Here, so that --help does not wait for torch.
    from extract.run import extract

    for line in extract(config):
        typer.echo(summary(line))


def summary(done: "Extracted") -> str:
    """One line about one encoder's part of the cache."""
    shapes = ", ".join(f"{name} {shape}" for name, shape in done.arrays.items())
    rows = done.images * done.views
    state = f"{done.computed:,} computed now" if done.computed else "all there already"
    return (
        f"{os.fspath(done.folder)}: {rows:,} rows ({done.images:,} images x {done.views} views), "
        f"{state}; {shapes}"
    )


def _lacking(flag: str) -> NoReturn:
    raise ProjectError(
        f"missing {flag.split()[0]}: give it (for example {flag}), or work in a folder whose "
        "unic.toml names it"
    )


def main() -> NoReturn:
    """Entry point of the command."""
    run_command(app)
