"""`unic-extract plan` for people: what there is, what it takes, what it depends on.

Every figure says where it comes from: computed (from the format), estimated, or measured (here, in
a short run).
"""

import math
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from extract.cache.schema import CODECS
from extract.planning.projection import EncoderPlan, Plan
from extract.planning.sizes import gigabytes

RAW_CHANNELS = 3


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain numbers: its fields, and the totals that follow from them."""
    totals = ("needed_bytes", "seconds", "prepare_core_s", "forward_s", "write_s", "cores_to_feed")
    return {
        **asdict(plan),
        **{name: getattr(plan, name) for name in totals},
        "fits": plan.fits,
    }


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Tables of bytes and of measurements, then sentences about disk, time, cores and pixels."""
    console = console or Console()
    rows = plan.images * plan.views
    console.print(
        f"{plan.images:,} images in {plan.tars:,} tars, {plan.views} views of {plan.recipe}: "
        f"{rows:,} rows for each encoder",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_sizes(plan))
    console.print(
        "bytes of all rows, computed; ~ estimated (zstd: 0.58 B a value, measured on a ViT-S); "
        "* as this run stores them",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_costs(plan))
    for line in (*_disk(plan), _time(plan), _cores(plan), _pixels(plan), *_notes(plan)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _sizes(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("encoder", overflow="fold")
    for codec in CODECS:
        table.add_column(codec, justify="right")
    table.add_column("still to write", justify="right")
    for encoder in plan.encoders:
        sizes = [_size(encoder, codec) for codec in CODECS]
        table.add_row(encoder.name, *sizes, gigabytes(encoder.missing_bytes))
    stored = f" and {plan.store_views} pixels" if plan.store_views else ""
    blank = [""] * len(CODECS)
    table.add_row(f"views{stored}", *blank, gigabytes(plan.view_bytes))
    if plan.packing_bytes:
        table.add_row("images packed into tars", *blank, gigabytes(plan.packing_bytes))
    return table


def _size(encoder: EncoderPlan, codec: str) -> str:
    mark = "~" if codec.endswith("-zstd") else ""
    chosen = "*" if codec == encoder.codec else ""
    return f"{mark}{gigabytes(encoder.bytes_by_codec[codec])}{chosen}"


def _costs(plan: Plan) -> Table:
    measured, cost = plan.rehearsal, plan.rehearsal.views
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column(f"measured ({cost.images} images)", overflow="fold")
    table.add_column("ms", justify="right")
    table.add_column("of", overflow="fold")
    table.add_row("read and decode", f"{cost.decode_ms:.2f}", "an image, one CPU core")
    table.add_row("make a view", f"{cost.view_ms:.2f}", "a view, one CPU core")
    for encoder in plan.encoders:
        state = "" if encoder.loaded else "; its architecture, weights not fetched"
        table.add_row(
            encoder.name,
            f"{measured.forward_ms[encoder.name]:.2f}",
            f"a view, {measured.device}{state}",
        )
    return table


def _disk(plan: Plan) -> list[str]:
    if plan.free_bytes is None:
        return [f"{gigabytes(plan.needed_bytes)} still to write to {plan.cache}"]
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT"
    return [
        f"disk: {gigabytes(plan.needed_bytes)} still to write, {gigabytes(plan.free_bytes)} free "
        f"at {plan.cache}: {verdict}"
    ]


def _time(plan: Plan) -> str:
    rate = plan.rehearsal.disk_bytes_per_s
    disk = f"{duration(plan.write_s)} at {rate / 1e6:,.0f} MB/s" if rate else "not measured"
    return (
        f"time, estimated: {duration(plan.seconds)} (encoders {duration(plan.forward_s)}, decoding "
        f"and views {duration(plan.prepare_core_s)} of one core, writing {disk})"
    )


def _cores(plan: Plan) -> str:
    machine = f"this machine has {plan.rehearsal.cores}, and {plan.workers} --workers are set"
    if not plan.cores_to_feed:
        return f"cores: no encoder has anything left to do; {machine}"
    if plan.rehearsal.device == "cpu":
        return (
            f"cores: encoders and decoding share them; {machine}. A faster device needs "
            f"{plan.prepare_core_s / max(plan.views_to_make, 1) * 1e3:.2f} core ms for each view"
        )
    enough = plan.cores_to_feed <= min(plan.rehearsal.cores, plan.workers)
    return (
        f"cores: decoding and views need {plan.cores_to_feed} CPU cores to feed the "
        f"{plan.rehearsal.device}; {machine}{'' if enough else ': the device will wait'}"
    )


def _pixels(plan: Plan) -> str:
    """When `--store-views` pays: pixels on disk against decoding and views in every epoch."""
    cost = plan.rehearsal.views
    each = cost.decode_ms + cost.view_ms
    rows = plan.images * plan.views
    raw = rows * RAW_CHANNELS * plan.size**2
    return (
        f"--store-views: raw {gigabytes(raw)}, jpeg about {gigabytes(rows * cost.jpeg_bytes)}; "
        f"saves training {duration(plan.images * each / 1e3)} of one core in every epoch "
        f"({each:.1f} ms an image). Without, {plan.rehearsal.cores} cores make "
        f"{plan.rehearsal.cores * 1e3 / each:,.0f} views/s: it pays for students that train "
        "faster than that"
    )


def _notes(plan: Plan) -> list[str]:
    notes = [f"licence of {encoder.name}: {encoder.licence}" for encoder in plan.encoders]
    done = [encoder.name for encoder in plan.encoders if not encoder.missing_rows]
    if done:
        notes.append(f"complete already: {', '.join(done)}")
    return notes


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s`, `4.1 s`: two units at most."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = math.ceil(seconds) / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes) % 60:02d} min"
    return f"{int(minutes)} min {math.ceil(seconds) % 60:02d} s"
