"""`unic.toml`: a folder that has one is a project, in which the commands need few arguments.

    data = "images/train-*.tar"        # image tars, a pattern, a list, or an ImageFolder
    cache = "feats"
    runs = "runs"
    recipe = "unic@224"                # optional, like views, seed and student
    views = 4

    [teachers]                         # names for timm folders of your own
    mine = "models/mine"

    [tasks.pets]                       # data sets for unic-eval
    train = "pets/train-*.tar"
    test = "pets/test-*.tar"

Paths are relative to the folder of the file. Flags override it.
"""

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from console.locations import Location, location
from extract.cache.errors import UserError

FILE = "unic.toml"


class ProjectError(UserError):
    """A `unic.toml` that cannot be understood, or something that it should have said."""


@dataclass(frozen=True)
class Task:
    """A data set for evaluation: labelled tars (or an ImageFolder) to train probes on, and to test.

    `classes` names the categories of its masks, where it has masks.
    """

    train: list[str]
    test: list[str]
    classes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Project:
    """What the commands take when a flag is not given; everything may be absent."""

    data: list[str] = field(default_factory=list)
    cache: Location | None = None
    runs: Path | None = None
    recipe: str | None = None
    views: int | None = None
    seed: int | None = None
    student: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    drop_path: float | None = None
    warmup_epochs: int | None = None
    teachers: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)

    def encoder(self, name: str) -> str:
        """What `name` means here: `NAME=FOLDER` for a teacher named in `unic.toml`, else itself."""
        return f"{name}={self.teachers[name]}" if name in self.teachers else name

    @property
    def size(self) -> int | None:
        """Side of the views in pixels, from the recipe's label."""
        digits = (self.recipe or "").partition("@")[2].partition("r")[0]
        return int(digits) if digits.isdigit() else None


def read_project(folder: Path = Path()) -> Project:
    """The project of `folder`; an empty one when it has no `unic.toml`.

    Raises `ProjectError` for bad TOML, unknown entries and values of the wrong type.
    """
    path = folder / FILE
    if not path.exists():
        return Project()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProjectError(f"{path} is not valid TOML: {error}") from None
    _check_known(path, "", content, {item.name for item in fields(Project)})
    return Project(**{name: _parse(path, name, value) for name, value in content.items()})


def given(*choices: Any) -> Any:
    """The first choice that is not None; 0 counts, so that it is refused rather than replaced."""
    return next(choice for choice in choices if choice is not None)


def _parse(path: Path, name: str, value: Any) -> Any:
    base = path.parent
    if name == "data":
        return _patterns(path, name, value)
    if name == "tasks":
        return {key: _task(path, key, table) for key, table in _table(path, name, value).items()}
    if name == "teachers":
        table = _table(path, name, value)
        return {key: str(base / _typed(path, f"{name}.{key}", v, str)) for key, v in table.items()}
    if name == "runs":
        return base / _typed(path, name, value, str)
    if name == "cache":
        return _based(base, _typed(path, name, value, str))
    numbers: dict[str, tuple[type, ...]] = {
        "views": (int,),
        "seed": (int,),
        "epochs": (int,),
        "batch_size": (int,),
        "learning_rate": (int, float),
        "drop_path": (int, float),
        "warmup_epochs": (int,),
    }
    return _typed(path, name, value, numbers.get(name, str))


def _task(path: Path, name: str, value: Any) -> Task:
    table = _table(path, f"tasks.{name}", value)
    _check_known(path, f"tasks.{name}.", table, {item.name for item in fields(Task)})
    if not {"train", "test"} <= set(table):
        raise ProjectError(f"{path}: tasks.{name} needs both train and test, found {list(table)}")
    return Task(
        train=_patterns(path, f"tasks.{name}.train", table["train"]),
        test=_patterns(path, f"tasks.{name}.test", table["test"]),
        classes=[
            str(item)
            for item in _typed(path, f"tasks.{name}.classes", table.get("classes", []), list)
        ],
    )


def _patterns(path: Path, name: str, value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [str(_based(path.parent, _typed(path, name, item, str))) for item in items]


def _based(base: Path, text: str) -> Location:
    """A path below the project's folder, or a URL."""
    found = location(text)
    return base / found if isinstance(found, Path) else found


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    table: dict[str, Any] = _typed(path, name, value, dict)
    return table


def _typed(path: Path, name: str, value: Any, wanted: type | tuple[type, ...]) -> Any:
    if not isinstance(value, wanted) or isinstance(value, bool):
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ProjectError(f"{path}: {name} must be {expected}, found {value!r}")
    return value


def _check_known(path: Path, prefix: str, found: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(found) - known)
    if unknown:
        raise ProjectError(
            f"{path}: unknown entries {', '.join(prefix + name for name in unknown)}; "
            f"known are {', '.join(sorted(known))}"
        )
