"""The structure of a cache: every record parses, and units agree with all that they rest on.

Every check adds what it finds to `Faults` and goes on, so that one run lists all that is wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from extract.cache.errors import UserError
from extract.cache.reader import Cache
from extract.cache.schema import (
    VIEWS,
    ArraySpec,
    CodecRecord,
    EncoderRecord,
    TarRecord,
    UnitRecord,
    jpeg_specs,
    subset_owner,
    subset_specs,
    view_specs,
)
from extract.cache.views import parse_recipe
from extract.cache.writer import file_sha256, group_name
from extract.checking.inventory import counted, owners, recipes

Place = tuple[str, str, int, str]


@dataclass
class Faults:
    """All that was found wrong, each once, in the order of finding."""

    found: dict[str, None] = field(default_factory=dict)

    def add(self, where: object, what: str) -> None:
        """Record that `where` has the fault `what`."""
        self.found.setdefault(f"{where}: {what}")

    @contextmanager
    def caught(self, where: object = "") -> Iterator[None]:
        """Inside, a `UserError` becomes a fault."""
        try:
            yield
        except UserError as error:
            self.found.setdefault(f"{where}: {error}" if where else str(error))


@dataclass(frozen=True)
class StoredUnit:
    """A unit whose manifest could be read: `record` lacks the statistics, `seal` is with them."""

    owner: str
    recipe: str
    view: int
    tar: str
    manifest: Path
    record: UnitRecord
    seal: str

    @property
    def place(self) -> Place:
        """(owner, recipe, view, tar)."""
        return self.owner, self.recipe, self.view, self.tar

    @property
    def folder(self) -> Path:
        """Its Zarr group."""
        return self.manifest.parent / self.record.group

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(size for size, _ in self.record.objects.values())

    def __str__(self) -> str:
        return f"{self.owner}/{self.recipe}, view {self.view} of {self.tar}"


@dataclass(frozen=True)
class Contents:
    """Every record of a cache that could be read."""

    cache: Cache
    tars: dict[str, TarRecord]
    encoders: dict[str, EncoderRecord]
    codecs: dict[tuple[str, str], CodecRecord]
    units: dict[Place, StoredUnit]

    def kept(self, owner: str, recipe: str) -> int:
        """How many patches the encoders of a `patches@RxC` folder keep; 0 where none does."""
        for (name, label), codec in self.codecs.items():
            grid = self.encoders[name].grid if name in self.encoders else [0, 0]
            if label == recipe and codec.patches and subset_owner((grid[0], grid[1])) == owner:
                return codec.patches
        return 0

    def features(self) -> dict[tuple[str, str], list[StoredUnit]]:
        """Units of encoders, by (encoder, recipe)."""
        found: dict[tuple[str, str], list[StoredUnit]] = {key: [] for key in self.codecs}
        for unit in self.units.values():
            if (unit.owner, unit.recipe) in found:
                found[unit.owner, unit.recipe].append(unit)
        return {key: units for key, units in found.items() if units}


def read_contents(cache: Cache, faults: Faults) -> Contents:
    """Read every record; those that are damaged become faults."""
    contents = Contents(cache, {}, {}, {}, {})
    for stem in cache.tars():
        with faults.caught():
            contents.tars[stem] = cache.tar(stem)
    for name in cache.encoders():
        with faults.caught():
            contents.encoders[name] = cache.encoder(name)
    for recipe in recipes(cache):
        for owner in owners(cache):
            if owner in cache.encoders() and cache.units(owner, recipe):
                with faults.caught():
                    contents.codecs[owner, recipe] = cache.codec(owner, recipe)
            for view, tar in counted(sorted(cache.units(owner, recipe)), f"read {owner}"):
                manifest = cache.layout.manifest(owner, recipe, view, tar)
                with faults.caught():
                    record = UnitRecord.read(manifest)
                    # 100 kB a unit in memory, of which verification needs a few units' worth.
                    light = replace(record, statistics={})
                    place = (owner, recipe, view, tar)
                    contents.units[place] = StoredUnit(*place, manifest, light, record.seal())
    return contents


def check_structure(contents: Contents, faults: Faults) -> None:
    """Compare every unit with the records and units that it rests on, and its files' sizes."""
    for name, encoder in contents.encoders.items():
        if encoder.name != name:
            faults.add(f"{name}/teacher.json", f"it is of an encoder named {encoder.name!r}")
    for unit in contents.units.values():
        with faults.caught(unit):
            for what, (found, wanted) in expectations(contents, unit).items():
                if found != wanted:
                    faults.add(
                        unit, f"{what} do not match the rest of the cache: {found}, not {wanted}"
                    )
        if contents.cache.mirror is None:
            _check_files(unit, faults)


def expectations(contents: Contents, unit: StoredUnit) -> dict[str, tuple[Any, Any]]:
    """`{what: (found, wanted)}` for one unit; wanted is None where what it rests on is missing."""
    record, units, recipe = unit.record, contents.units, unit.recipe
    tar = contents.tars.get(unit.tar)
    expected: dict[str, tuple[Any, Any]] = {
        "tar, recipe and view": (
            (record.tar, record.recipe, record.view),
            (unit.tar, recipe, unit.view),
        ),
        "name and content of the group": (record.group, group_name(record.tar, record.objects)),
        "sha256 of the tar": (record.tar_sha256, tar and tar.sha256),
        "keys": (record.keys_digest, tar and tar.keys_digest),
    }
    specs = _view_arrays(unit)
    if unit.owner != VIEWS:
        views = units.get((VIEWS, recipe, unit.view, unit.tar))
        expected["rows"] = (record.rows, views and views.record.rows)
        specs = subset_specs(contents.kept(unit.owner, recipe))
    if unit.owner in contents.encoders:
        encoder, codec = contents.encoders[unit.owner], contents.codecs.get((unit.owner, recipe))
        owner = subset_owner((encoder.grid[0], encoder.grid[1]))
        kept_unit = units.get((owner, recipe, unit.view, unit.tar))
        subset = kept_unit.seal if kept_unit and codec and codec.patches else None
        expected |= {
            "seals of the views": (record.views, views and views.seal),
            "seals of teacher.json": (record.encoder, encoder.seal()),
            "seals of codec.json": (record.codec, codec and codec.seal()),
            "seals of the kept patches": (record.subset, subset),
        }
        specs = codec.specs() if codec else {}
    arrays = {name: [spec.dtype, list(spec.row_shape)] for name, spec in specs.items()}
    return {**expected, "arrays": (record.arrays, arrays)}


def _view_arrays(unit: StoredUnit) -> dict[str, ArraySpec]:
    recipe = parse_recipe(unit.recipe)
    columns = {name: ArraySpec(c.dtype, c.shape) for name, c in recipe.columns.items()}
    specs = view_specs(columns, recipe.size, "raw" if "pixels" in unit.record.arrays else "")
    return specs | (jpeg_specs(unit.record.rows, 0) if "jpeg" in unit.record.arrays else {})


def _check_files(unit: StoredUnit, faults: Faults) -> None:
    """Every file is there in its size, and every `zarr.json` as written."""
    for name, (size, checksum) in unit.record.objects.items():
        path = unit.folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            faults.add(unit, f"{path} {state}")
        elif path.name == "zarr.json" and file_sha256(path) != checksum:
            faults.add(unit, f"{path} was changed")
