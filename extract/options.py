"""The options of `unic-extract`, which extraction and its plan share."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from extract.config import PIXELS, ExtractConfig

STORE_VIEWS = "--store-views"
DEFAULTS = ExtractConfig(data=(), cache=Path(), teachers=("dino",))


class ExtractGroup(TyperGroup):
    """Lets `--store-views` stand without a value, as click's optional values do: raw pixels."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line of the command and of its subcommands."""
        whole: list[str] = []
        for arg, after in zip(args, [*args[1:], "-"], strict=False):
            whole += [arg, PIXELS[0]] if arg == STORE_VIEWS and after[:1] == "-" else [arg]
        return super().parse_args(ctx, whole)


INPUT, VIEWS, STORING, RUNNING = "Input and output", "Views", "What is stored", "Running"

Teachers = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher",
        help="Encoder to run, repeatable (at least one): dino, deit3, timm:TAG, a timm folder, "
        "NAME=FOLDER to choose its name in the cache, or a name from unic.toml.",
        rich_help_panel=INPUT,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Image tars (WebDataset), repeatable: paths, patterns such as "
        "'train-{000000..000099}.tar', or an ImageFolder, which is packed into tars.",
        rich_help_panel=INPUT,
    ),
]
CacheFolder = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="Folder of the feature cache, or its URL (s3://…, gs://…).",
        rich_help_panel=INPUT,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint file for the one --teacher, loaded strictly.", rich_help_panel=INPUT
    ),
]
Views = Annotated[
    int | None,
    typer.Option(help=f"Views of each image.  (default: {DEFAULTS.views})", rich_help_panel=VIEWS),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="unic@SIZE (the training augmentation) or center@SIZE (for evaluation).  "
        f"(default: {DEFAULTS.recipe})",
        rich_help_panel=VIEWS,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help=f"Seed of the views.  (default: {DEFAULTS.seed})", rich_help_panel=VIEWS),
]
Codec = Annotated[
    str | None,
    typer.Option(
        help="How patch tokens are stored: fp16, int8, int8-zstd or int4.  (default: as the cache "
        "has them, fp16 at first)",
        rich_help_panel=STORING,
    ),
]
Tokens = Annotated[
    str,
    typer.Option(
        help="all, or cls for the global token alone: 8 GB a view of ImageNet where all take 1.5 "
        "TB with four ViT-Bs.",
        rich_help_panel=STORING,
    ),
]
Patches = Annotated[
    int | None,
    typer.Option(
        help="Keep a random subset of so many patch tokens of each view.  (default: all)",
        rich_help_panel=STORING,
    ),
]
StoreViews = Annotated[
    str,
    typer.Option(
        STORE_VIEWS,
        metavar="[raw|jpeg]",
        show_default=False,
        help="Keep the pixels of the views too, raw (also without a word behind it) or as jpeg: "
        "training needs no decoding of images then.",
        rich_help_panel=STORING,
    ),
]
BatchSize = Annotated[int, typer.Option(help="Views a forward pass.", rich_help_panel=RUNNING)]
Workers = Annotated[int, typer.Option(help="Threads that decode images.", rich_help_panel=RUNNING)]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Leave out images that cannot be decoded, and record which.",
        rich_help_panel=RUNNING,
    ),
]
MaxBad = Annotated[
    float,
    typer.Option(
        help="With --skip-bad: the share of images that may be bad.", rich_help_panel=RUNNING
    ),
]
ShardIndex = Annotated[
    int | None,
    typer.Option(
        help="With --num-shards: which tars this process begins with.  (default: from torchrun or "
        "SLURM, else 0)",
        rich_help_panel=RUNNING,
    ),
]
NumShards = Annotated[
    int | None,
    typer.Option(
        help="Processes that fill this cache side by side.  (default: from torchrun or SLURM, "
        "else 1)",
        rich_help_panel=RUNNING,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUNNING)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
