"""`unic-extract info` for people: tables of encoders and units, then what is missing."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from extract.checking.info import CacheInfo, Part
from extract.planning.sizes import gigabytes

HASH = 12
SHOWN = 3


def print_info(info: CacheInfo, console: Console | None = None) -> None:
    """Tables of encoders and of units, then what is missing or left over."""
    console = console or Console()
    skipped = f", {info.skipped:,} bad ones left out" if info.skipped else ""
    console.print(
        f"{info.cache}: format {info.format_version}, seed {info.seed}; {info.images:,} images in "
        f"{info.tars:,} tars ({gigabytes(info.image_bytes)}){skipped}; "
        f"{'complete' if info.complete else 'INCOMPLETE'}",
        highlight=False,
        soft_wrap=True,
    )
    if info.encoders:
        console.print(_encoder_table(info))
    if info.parts:
        console.print(_part_table(info))
    for line in _lines(info):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _encoder_table(info: CacheInfo) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
    for name in ("encoder", "architecture", "weights", "grid", "widths", "licence"):
        table.add_column(name, overflow="fold")
    for encoder in info.encoders:
        table.add_row(
            encoder["name"],
            encoder["architecture"],
            encoder["weights_sha256"][:HASH],
            "x".join(map(str, encoder["grid"])),
            "\n".join(f"{name} {shape[-1]}" for name, shape in encoder["arrays"].items()),
            encoder["licence"],
        )
    return table


def _part_table(info: CacheInfo) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("units of", overflow="fold", min_width=12)
    table.add_column("stored as", overflow="fold")
    for name in ("units", "rows", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("std of channels", no_wrap=True)
    for part in info.parts:
        table.add_row(
            f"{part.owner}/{part.recipe}",
            _stored_as(part),
            f"{part.units}/{part.expected}",
            f"{part.rows:,}",
            gigabytes(part.bytes),
            "\n".join(
                f"{name} {s['std_min']:.2g} {s['std_median']:.2g} {s['std_max']:.2g}"
                for name, s in part.statistics.items()
            ),
        )
    return table


def _stored_as(part: Part) -> str:
    if not part.codec:
        return f"parameters, {part.pixels} pixels" if part.pixels else "parameters"
    if "patches" not in part.arrays:
        return f"{part.codec}, CLS only"
    kept = f", {part.patches} patches" if part.patches else ""
    return f"{part.codec}{kept}"


def _lines(info: CacheInfo) -> Iterator[str]:
    if any(part.statistics for part in info.parts):
        yield "std of channels: smallest, median, largest, over all rows, before coding"
    for part in info.parts:
        if part.missing:
            more = f" and {len(part.missing) - SHOWN} more" if len(part.missing) > SHOWN else ""
            yield f"missing of {part.owner}/{part.recipe}: {', '.join(part.missing[:SHOWN])}{more}"
    if not info.complete:
        yield "run unic-extract again with the same arguments: only what is missing is computed"
    for name in info.leftovers:
        yield f"left over, in nobody's manifest: {name} (of a run that is going on or was killed)"
    for fault in info.unreadable:
        yield f"damaged: {fault} (see unic-extract verify)"
    if info.evaluation:
        yield f"caches of evaluation, each with an info of its own: {', '.join(info.evaluation)}"
