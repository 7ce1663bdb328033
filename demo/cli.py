"""`unic-demo`: the whole pipeline on made-up scenes, offline, in little more than a minute."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from console.command import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def unic_demo(
    folder: Annotated[Path, typer.Option(help="Project folder to make.")] = Path("unic-demo"),
    seed: Annotated[int, typer.Option(help="Seed of scenes, views and training.")] = 0,
) -> None:
    """Distil two tiny cached teachers into a student and score it beside them.

    Makes scenes, extracts both teachers' features over four views, distils, and probes teachers,
    student, a random-init encoder and raw pixels. Leaves a project folder to play in.
    """
    # Here, so that --help does not wait for torch.
    import torch

    from demo.run import DemoConfig, demo
    from evaluate.table import print_scores

    # Tensors of 64 channels gain nothing from several threads.
    torch.set_num_threads(1)
    scores = demo(DemoConfig(folder=folder, seed=seed))
    print_scores(scores)
    typer.echo(
        f"\nfigures: {folder}/results.json; PCA of patch tokens: {folder}/features.png\n"
        f"go on in the folder: cd {folder} && unic-eval knn"
    )


def main() -> NoReturn:
    """Entry point of the command."""
    run_command(app)
