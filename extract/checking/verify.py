"""`unic-extract verify`, top to bottom: is a cache whole, and is it what its encoders say?

    structure     every record parses and holds its seal; units agree with what they rest on; files
                  are there in their sizes
    checksums     sha256 of every file, crc32c of every chunk; no value that was never written
    keys          rows of features, views and tars are the same images; sha256 of the tars
    recompute     random rows through the live encoders (extract.checking.recompute)

Everything that is wrong is listed, not only the first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from console.command import errors
from extract.cache.images import expand
from extract.cache.reader import Cache
from extract.checking.checksums import check_contents, check_keys
from extract.checking.inventory import expected_units
from extract.checking.recompute import Agreement, recompute
from extract.checking.structure import Contents, Faults, check_structure, read_contents
from extract.planning.sizes import gigabytes

SHOWN = 50


@dataclass(frozen=True)
class VerifyConfig:
    """What to check. `teachers` maps names in the cache to folders or checkpoint files; `data` says
    where tars are that moved; `rows` of every encoder are computed again, chosen by `seed`.
    """

    cache: Path | str
    data: tuple[str, ...] = ()
    teachers: Mapping[str, str] = field(default_factory=dict)
    rows: int = 64
    seed: int = 0
    min_cosine: float = 0.999
    quick: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class Line:
    """One encoder under one recipe in the report."""

    encoder: str
    recipe: str
    units: int
    rows: int
    agreement: Agreement | None


@dataclass(frozen=True)
class Report:
    """What was found: `problems` make the exit code, `notes` say what was not checked."""

    cache: str
    lines: list[Line]
    problems: list[str]
    notes: list[str]
    bytes_read: int


def verify_cache(config: VerifyConfig) -> Report:
    """Run all checks; raises `UserError` when there is no cache at all."""
    cache, faults = Cache(config.cache), Faults()
    moved = {path.name.removesuffix(".tar"): path for path in expand(list(config.data))}
    contents = read_contents(cache, faults)
    check_structure(contents, faults)
    local = cache.mirror is None
    bytes_read = check_contents(contents, faults) if local and not config.quick else 0
    lacking = check_keys(contents, moved, not config.quick, faults)
    agreements: Mapping[tuple[str, str], Agreement] = {}
    if config.rows:
        agreements = recompute(
            *(contents, config.rows, config.seed, config.teachers, moved, config.device),
            *(config.min_cosine, faults),
        )
    lines = [
        Line(
            *key,
            len(units),
            sum(unit.record.rows for unit in units),
            agreements.get(key),
        )
        for key, units in contents.features().items()
    ]
    notes = _notes(contents, config, lacking)
    return Report(cache.location, lines, list(faults.found), notes, bytes_read)


def _notes(contents: Contents, config: VerifyConfig, lacking: Sequence[str]) -> list[str]:
    notes = []
    for (name, recipe), units in contents.features().items():
        missing = len(expected_units(contents.cache, recipe)) - len(units)
        if missing > 0:
            notes.append(f"incomplete: {name}/{recipe} lacks {missing} units (unic-extract info)")
    if lacking:
        notes.append(
            f"not compared with {len(lacking)} tars that are not where the cache saw them, such as "
            f"{lacking[0]} (say where with --data)"
        )
    if contents.cache.mirror is not None:
        notes.append(
            "not checked: checksums of all objects in the bucket; those that are fetched are "
            "compared with their manifests at that time"
        )
    if config.quick:
        notes.append("not checked: checksums of features, views and tars (--quick)")
    if not config.rows:
        notes.append("not checked: features against the live encoders (--rows 0)")
    return notes


def print_report(report: Report, console: Console | None = None) -> None:
    """A short table and the verdict on stdout; on stderr one red line for every problem."""
    console = console or Console()
    console.print(_table(report))
    for note in report.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if not report.problems:
        read = f", {gigabytes(report.bytes_read)} read" if report.bytes_read else ""
        console.print(
            f"{report.cache}: intact{read}", highlight=False, markup=False, soft_wrap=True
        )
    for problem in report.problems[:SHOWN]:
        errors.print(Text(f"error: {' '.join(problem.split())}", style="bold red"))
    if len(report.problems) > SHOWN:
        errors.print(Text(f"error: … and {len(report.problems) - SHOWN} more", style="bold red"))


def _table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("features", overflow="fold", min_width=12)
    for name in ("units", "rows", "live rows", "cos min", "cos p1", "error/std"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in report.lines:
        found = line.agreement
        live = ["-"] * 4
        if found is not None and found.rows:
            live = [
                *(f"{found.rows:,}", f"{found.cosine_min:.5f}", f"{found.cosine_p1:.5f}"),
                f"{found.error:.2g}",
            ]
        sizes = (f"{line.units:,}", f"{line.rows:,}")
        table.add_row(f"{line.encoder}/{line.recipe}", *sizes, *live)
    return table
