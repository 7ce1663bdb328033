"""`unic-extract`: run frozen encoders once over fixed, seeded views, and cache what they give.

    unic-extract --teacher dino …        extract
    unic-extract plan --teacher dino …   what that would take
    unic-extract info                    what a cache holds
    unic-extract convert --codec int8 …  the same features, stored in another codec
    unic-extract verify                  whether it is whole, and what the encoders say today

In a project's folder all of them find cache and data by themselves.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from console.command import run_command
from console.project import Project, ProjectError, given, read_project
from extract.cache.schema import CODECS
from extract.config import ExtractConfig
from extract.options import (
    DEFAULTS,
    INPUT,
    RUNNING,
    BatchSize,
    CacheFolder,
    Codec,
    Data,
    Device,
    ExtractGroup,
    Json,
    MaxBad,
    NumShards,
    Patches,
    Recipe,
    Seed,
    ShardIndex,
    SkipBad,
    StoreViews,
    Teachers,
    Tokens,
    Views,
    Weights,
    Workers,
)
from extract.sharing.workers import worker

if TYPE_CHECKING:
    from extract.run import Extracted

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    cls=ExtractGroup,
    subcommand_metavar="[plan|info|verify|convert]",
)


@app.callback(invoke_without_command=True)
def unic_extract(
    context: typer.Context,
    teacher: Teachers = None,
    data: Data = None,
    cache: CacheFolder = None,
    weights: Weights = None,
    views: Views = None,
    recipe: Recipe = None,
    seed: Seed = None,
    codec: Codec = DEFAULTS.codec,
    tokens: Tokens = DEFAULTS.tokens,
    patches: Patches = DEFAULTS.patches,
    store_views: StoreViews = DEFAULTS.store_views,
    batch_size: BatchSize = DEFAULTS.batch_size,
    workers: Workers = DEFAULTS.workers,
    skip_bad: SkipBad = DEFAULTS.skip_bad,
    max_bad: MaxBad = DEFAULTS.max_bad,
    shard_index: ShardIndex = None,
    num_shards: NumShards = None,
    device: Device = DEFAULTS.device,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what the run would take, as unic-extract plan does, and stop.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
) -> None:
    """Run frozen TEACHERs once over seeded views of DATA and write their features to CACHE.

    Run it again to go on where it stopped, to add a teacher, views or tars: only what is missing
    is computed.
    """
    if context.invoked_subcommand is not None:
        _refuse_misplaced(context)
        return
    index, count = worker(os.environ)
    config = _config(
        context,
        *(teacher, data, cache, recipe, views, seed),
        weights=weights,
        codec=codec,
        tokens=tokens,
        patches=patches,
        store_views=store_views,
        batch_size=batch_size,
        workers=workers,
        skip_bad=skip_bad,
        max_bad=max_bad,
        shard_index=given(shard_index, 0 if num_shards is not None else index),
        num_shards=given(num_shards, count),
        device=device,
    )
    if dry_run:
        _plan(config)
        return
    # Here, so that --help does not wait for torch.
    from extract.run import extract

    for line in extract(config):
        typer.echo(summary(line))


@app.command()
def plan(
    context: typer.Context,
    teacher: Teachers = None,
    data: Data = None,
    cache: CacheFolder = None,
    weights: Weights = None,
    views: Views = None,
    recipe: Recipe = None,
    seed: Seed = None,
    codec: Codec = DEFAULTS.codec,
    tokens: Tokens = DEFAULTS.tokens,
    patches: Patches = DEFAULTS.patches,
    store_views: StoreViews = DEFAULTS.store_views,
    batch_size: BatchSize = DEFAULTS.batch_size,
    workers: Workers = DEFAULTS.workers,
    device: Device = DEFAULTS.device,
    images: Annotated[
        int, typer.Option(help="Images of the data that are measured.", min=2, max=1000)
    ] = 32,
    as_json: Json = False,
) -> None:
    """Say what a run with these options would take: bytes by teacher and codec, disk, time, cores.

    Nothing is written and no weights are fetched. Exit code 1 if the disk is too small.
    """
    config = _config(
        context,
        *(teacher, data, cache, recipe, views, seed),
        weights=weights,
        codec=codec,
        tokens=tokens,
        patches=patches,
        store_views=store_views,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    _plan(config, images, as_json)


@app.command()
def info(cache: CacheFolder = None, as_json: Json = False) -> None:
    """Say what a cache holds: encoders, views, tars, complete or not, statistics, licences.

    Only manifests are read, no features: unic-extract verify checks those.
    """
    folder = _cache_folder(read_project(), cache)
    from extract.checking.info import describe_cache, info_json
    from extract.checking.info_report import print_info

    found = describe_cache(folder)
    if as_json:
        _print_json(info_json(found))
    else:
        print_info(found)


@app.command()
def verify(
    cache: CacheFolder = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Where the image tars are now, if they moved.", rich_help_panel=INPUT),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER, or NAME=CHECKPOINT: where the weights of an encoder are whose name "
            "in the cache does not say it. Repeatable.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(
            help="Random rows of each encoder that are computed again by the live encoder; 0 "
            "leaves that out.",
            min=0,
        ),
    ] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the choice of rows.")] = 0,
    min_cosine: Annotated[
        float, typer.Option(help="Lowest cosine of a token, standardized, with the live one.")
    ] = 0.999,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out checksums of features, views and tars.")
    ] = False,
    device: Device = DEFAULTS.device,
) -> None:
    """Check a cache: structure, checksums, keys, and random rows against the live teachers.

    Lists every fault. Exit code 0: intact; 1: it is not.
    """
    project = read_project()
    folder = _cache_folder(project, cache)
    from extract.checking.verify import VerifyConfig, print_report, verify_cache

    named = dict(_named(item) for item in teacher or [])
    report = verify_cache(
        VerifyConfig(
            cache=folder,
            data=tuple(data or ()),
            teachers={**project.teachers, **named},
            rows=rows,
            seed=seed,
            min_cosine=min_cosine,
            quick=quick,
            device=device,
        )
    )
    print_report(report)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def convert(
    to: Annotated[
        Path,
        typer.Option(help="Folder of the second cache, made beside the first.", show_default=False),
    ],
    codec: Annotated[
        str,
        typer.Option(help="How patch tokens are stored there: fp16, int8, int8-zstd or int4."),
    ] = CODECS[1],
    cache: CacheFolder = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="Encoder of the cache, repeatable.  (default: all)"),
    ] = None,
) -> None:
    """Store a cache's features in another codec, in a second cache, without their teachers.

    Run it again to go on where it stopped.
    """
    folder = _cache_folder(read_project(), cache)
    from extract.convert import ConvertConfig
    from extract.convert import convert as convert_cache

    for done in convert_cache(ConvertConfig(folder, to, codec, tuple(teacher or ()))):
        loss = f"; relative L2 {done.fidelity['relative_l2']:.4f}" if done.fidelity else ""
        typer.echo(
            f"{to / done.encoder / done.recipe}: {done.before} to {done.after}, "
            f"{done.bytes_before:,} to {done.bytes_after:,} bytes{loss}"
        )


def summary(done: "Extracted") -> str:
    """One line about one encoder's part of the cache."""
    shapes = ", ".join(f"{name} {shape}" for name, shape in done.arrays.items())
    rows = done.images * done.views
    left_out = f"; {done.skipped:,} bad images left out" if done.skipped else ""
    state = f"{done.computed:,} computed now" if done.computed else "all there already"
    return (
        f"{os.fspath(done.folder)}: {rows:,} rows ({done.images:,} images x {done.views} views), "
        f"{state}; {shapes}{left_out}"
    )


def _config(
    context: typer.Context,
    teacher: list[str] | None,
    data: list[str] | None,
    cache: str | None,
    recipe: str | None,
    views: int | None,
    seed: int | None,
    **others: Any,
) -> ExtractConfig:
    """The options, completed by the project's file and by defaults."""
    if not teacher:
        context.fail("Missing option '--teacher'.")
    project = read_project()
    return ExtractConfig(
        data=tuple(data or project.data or _lacking("--data 'images/train-*.tar'")),
        cache=_cache_folder(project, cache),
        teachers=tuple(project.encoder(name) for name in teacher),
        recipe=recipe or project.recipe or DEFAULTS.recipe,
        views=given(views, project.views, DEFAULTS.views),
        seed=given(seed, project.seed, DEFAULTS.seed),
        **others,
    )


def _plan(config: ExtractConfig, images: int = 32, as_json: bool = False) -> None:
    from extract.planning.plan import make_plan, refuse_beyond
    from extract.planning.plan_report import plan_json, print_plan

    made = make_plan(config, images)
    if as_json:
        _print_json(plan_json(made))
    else:
        print_plan(made)
    refuse_beyond(made.needed_bytes, made.free_bytes, config.cache)


def _cache_folder(project: Project, cache: str | None) -> Path | str:
    if cache is not None:
        return cache if "://" in cache else Path(cache)
    return project.cache or Path(_lacking("--cache feats"))


def _refuse_misplaced(context: typer.Context) -> None:
    """An option in front of a subcommand would be dropped silently."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            context.fail(
                f"{parameter.opts[0]} belongs behind the command: "
                f"unic-extract {context.invoked_subcommand} {parameter.opts[0]} ..."
            )


def _named(item: str) -> tuple[str, str]:
    name, equals, where = item.partition("=")
    if not (name and equals and where):
        raise ProjectError(
            f"--teacher {item!r}: say which encoder of the cache it is, as in --teacher NAME={item}"
        )
    return name, where


def _print_json(content: Any) -> None:
    import json

    typer.echo(json.dumps(content, indent=1))


def _lacking(flag: str) -> NoReturn:
    raise ProjectError(
        f"missing {flag.split()[0]}: give it (for example {flag}), or work in a folder whose "
        "unic.toml names it"
    )


def main() -> NoReturn:
    """Entry point of the command."""
    run_command(app)
