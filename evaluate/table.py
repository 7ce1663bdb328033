"""Scores of many encoders: one table to read, one `results.json` to keep.

A results file holds one record for each (encoder, task, metric), with what is needed to reach the
figure again: protocol, weights, data, seed, versions. Writing merges: the new records replace their
namesakes, everything else stays.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Role = Literal["teacher", "student", "baseline"]
FORMAT = 1
_ORDER: tuple[Role, ...] = ("teacher", "baseline", "student")


@dataclass(frozen=True)
class Score:
    """One figure of one encoder. `protocol` says how it was reached, and whether it is reduced.

    `details` is whatever belongs to the figure (chosen hyper-parameters, IoU of each class): plain
    numbers, strings, lists, mappings; NaN is stored as null.

    Raises ValueError for a value that is not finite or a role that is unknown.
    """

    encoder: str
    task: str
    metric: str
    value: float
    higher_is_better: bool = True
    protocol: str = ""
    role: Role = "baseline"
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.encoder}, {self.task}: {self.metric} is {self.value}")
        if self.role not in get_args(Role):
            raise ValueError(f"expected a role of {get_args(Role)}, found {self.role!r}")

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the figure in a results file."""
        return self.encoder, self.task, self.metric


@dataclass(frozen=True)
class Provenance:
    """What the scores of one run were computed from and with.

    `data` describes the data sets, `encoder_sha256` maps encoder names to the digest of their
    weights, `seconds` maps tasks to the time they took.
    """

    data: str
    seed: int
    encoder_sha256: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that a score depends on."""
    return {name: version(name) for name in ("torch", "timm", "scikit-learn", "torchmetrics")}


def write_results(path: str | Path, scores: Sequence[Score], provenance: Provenance) -> None:
    """Add scores to the JSON file at `path`, or create it; the file is replaced in one step.

    A record with the same encoder, task and metric is replaced. Where an encoder's weights
    changed under the same name (another sha256), its other records no longer describe it: they move
    to "superseded", which the table does not show.

    Raises ValueError where the file exists and is not a results file; it is then left alone.
    """
    path = Path(path)
    stored = _load(path) if path.exists() else {"scores": [], "superseded": []}
    new = [_record(score, provenance) for score in scores]
    replaced = {score.key for score in scores}
    kept = [r for r in stored["scores"] if (r["encoder"], r["task"], r["metric"]) not in replaced]
    stale = [r for r in kept if _weights_changed(r, provenance.encoder_sha256)]
    kept = [r for r in kept if r not in stale]
    document = {
        "format": FORMAT,
        "scores": kept + new,
        "superseded": stored["superseded"] + stale,
    }
    _replace(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_results(path: str | Path) -> list[Score]:
    """The scores of a results file, oldest first.

    Raises ValueError where it is not a results file, FileNotFoundError where there is none.
    """
    names = Score.__dataclass_fields__
    return [Score(**{n: r[n] for n in names}) for r in _load(Path(path))["scores"]]


def score_tables(scores: Sequence[Score], width: int = 80) -> list[Table]:
    """Tables with encoders as rows and tasks as columns, as many as it takes to fit `width`.

    The best figure of a column is bold and has an asterisk. Rows that are not teachers show below
    the figure the relative gain over the best teacher of that column (for errors, the relative
    reduction). Teachers come first, then baselines, then students.
    """
    columns = list(dict.fromkeys((s.task, s.metric) for s in scores))
    tables, shown = [], 0
    while shown < len(columns):
        fitting = 1
        while shown + fitting < len(columns):
            trial = _table(scores, columns[shown : shown + fitting + 1])
            if _width(trial) > width:
                break
            fitting += 1
        tables.append(_table(scores, columns[shown : shown + fitting]))
        shown += fitting
    return tables


def print_scores(scores: Sequence[Score], console: Console | None = None) -> None:
    """Print the tables, what the marks mean, and the protocol of every column."""
    console = console or Console()
    if not scores:
        console.print("No scores yet.")
        return
    for table in score_tables(scores, console.width):
        console.print(table)
    legend = "* best of its column"
    if {s.role for s in scores} > {"teacher"}:
        legend += "; below a figure: relative gain over the best teacher"
    console.print(legend, style="dim", highlight=False)
    for task, metric in dict.fromkeys((s.task, s.metric) for s in scores):
        column = [s for s in scores if (s.task, s.metric) == (task, metric)]
        protocols = list(dict.fromkeys(s.protocol for s in column if s.protocol))
        warning = "PROTOCOLS DIFFER, do not compare: " if len(protocols) > 1 else ""
        if protocols:
            line = f"{task} ({metric}): {warning}{' | '.join(protocols)}"
            console.print(line, style="bold" if warning else "dim", highlight=False, markup=False)


def relative_gain(value: float, reference: float, higher_is_better: bool) -> float | None:
    """Gain over a reference in percent of it; positive is better. None where the reference is 0."""
    if reference == 0:
        return None
    gain = 100 * (value - reference) / abs(reference)
    return gain if higher_is_better else -gain


def _table(scores: Sequence[Score], columns: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
    table.add_column("encoder", overflow="fold", min_width=8)
    for task, metric in columns:
        arrow = "" if _column(scores, task, metric)[0].higher_is_better else " (low)"
        table.add_column(Text(f"{task}\n{metric}{arrow}"), justify="right", overflow="fold")
    rows = sorted(dict.fromkeys((s.encoder, s.role) for s in scores), key=_by_role)
    for i, (encoder, role) in enumerate(rows):
        cells = [_cell(_column(scores, *c), encoder, role) for c in columns]
        last = i + 1 == len(rows) or rows[i + 1][1] != role
        table.add_row(Text(f"{encoder}\n{role}"), *cells, end_section=last)
    return table


def _by_role(row: tuple[str, Role]) -> int:
    return _ORDER.index(row[1])


def _column(scores: Iterable[Score], task: str, metric: str) -> list[Score]:
    return [s for s in scores if (s.task, s.metric) == (task, metric)]


def _cell(column: list[Score], encoder: str, role: Role) -> Text:
    own = [s for s in column if (s.encoder, s.role) == (encoder, role)]
    if not own:
        return Text("-")
    score = own[-1]
    best = score.value == _best(column)
    digits = _digits(column)
    # A space under the asterisk keeps the decimal points of a column in line.
    mark = "*" if best else " "
    cell = Text(f"{score.value:.{digits}f}{mark}", style="bold" if best else "")
    teachers = [s for s in column if s.role == "teacher"]
    if role != "teacher" and teachers:
        gain = relative_gain(score.value, _best(teachers), score.higher_is_better)
        if gain is not None:
            cell.append(f"\n{gain:+.1f}% ", style="not bold")
    return cell


def _best(column: Sequence[Score]) -> float:
    values = [s.value for s in column]
    return max(values) if column[0].higher_is_better else min(values)


def _digits(column: Sequence[Score]) -> int:
    # Percentages have one decimal in the paper, errors in metres three.
    return 1 if max(abs(s.value) for s in column) >= 10 else 3


def _width(table: Table) -> int:
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def _record(score: Score, provenance: Provenance) -> dict[str, Any]:
    return {
        **asdict(score),
        "details": _plain(score.details),
        "encoder_sha256": provenance.encoder_sha256.get(score.encoder),
        "data": provenance.data,
        "seed": provenance.seed,
        "seconds": provenance.seconds.get(score.task),
        "versions": dict(provenance.versions),
    }


def _plain(value: Any) -> Any:
    """The same value in JSON's types; tensors and arrays as lists, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _weights_changed(record: Mapping[str, Any], sha256: Mapping[str, str]) -> bool:
    old, new = record["encoder_sha256"], sha256.get(record["encoder"])
    return None not in (old, new) and old != new


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a results file ({error!r}); move it away, or choose another path"
        ) from error
    if found != FORMAT:
        raise ValueError(f"{path}: expected results format {FORMAT}, found {found}")
    return document


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Aside in the same folder, so that the rename is one step and a reader never sees half a file.
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
