"""`unic-extract info`: what a cache holds, from its records and manifests alone.

An *owner* is a folder with units: an encoder, `views`, or the kept patches of a grid. Expected are,
under each recipe, all views and tars that any owner has there, and every tar that was begun.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from extract.cache.errors import CacheError
from extract.cache.reader import Cache
from extract.cache.schema import EncoderRecord, UnitRecord
from extract.cache.statistics import Moments
from extract.checking.inventory import (
    counted,
    expected_units,
    orphans,
    owners,
    recipes,
    staging_folders,
)


@dataclass(frozen=True)
class Part:
    """One owner's units under one recipe. `missing` names units; `statistics` summarise tokens.

    `statistics[array]` has `count`, the root mean square of the channels' means, and the smallest,
    middle and largest standard deviation of a channel.
    """

    owner: str
    recipe: str
    units: int
    expected: int
    missing: list[str]
    rows: int
    bytes: int
    codec: str = ""
    arrays: dict[str, list[int]] = field(default_factory=dict)
    patches: int | None = None
    fidelity: dict[str, float] = field(default_factory=dict)
    pixels: str = ""
    rescaled: int = 0
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether no unit is missing."""
        return not self.missing


@dataclass(frozen=True)
class CacheInfo:
    """What `unic-extract info` says; `leftovers` are groups and folders that no manifest names."""

    cache: str
    format_version: int
    seed: int
    tars: int
    images: int
    skipped: int
    image_bytes: int
    encoders: list[dict[str, Any]]
    parts: list[Part]
    leftovers: list[str]
    unreadable: list[str]
    evaluation: list[str]

    @property
    def complete(self) -> bool:
        """Whether there is something, and nothing is missing or unreadable."""
        return bool(self.parts) and not self.unreadable and all(p.complete for p in self.parts)


def describe_cache(root: Path | str) -> CacheInfo:
    """Read all records; raises `CacheError` when `root` is no cache. Damaged records are listed."""
    cache, unreadable = Cache(root), list[str]()
    tars = list(_readable(map(cache.tar, cache.tars()), unreadable))
    encoders = list(_readable(map(cache.encoder, cache.encoders()), unreadable))
    parts, leftovers = [], staging_folders(cache)
    for recipe in recipes(cache):
        expected = expected_units(cache, recipe)
        for owner in owners(cache):
            if (cache.root / owner / recipe).is_dir():
                part, left = _part(cache, owner, recipe, expected, unreadable)
                parts.append(part)
                leftovers += left
    return CacheInfo(
        cache=cache.location,
        format_version=cache.record.format_version,
        seed=cache.record.seed,
        tars=len(tars),
        images=sum(tar.rows for tar in tars),
        skipped=sum(len(tar.skipped) for tar in tars),
        image_bytes=sum(tar.bytes for tar in tars),
        encoders=[_encoder(record) for record in encoders],
        parts=parts,
        leftovers=leftovers,
        unreadable=unreadable,
        evaluation=sorted(path.parent.name for path in cache.root.glob("eval/*/cache.json")),
    )


def _readable(records: Iterator[Any], unreadable: list[str]) -> Iterator[Any]:
    while True:
        try:
            yield next(records)
        except StopIteration:
            return
        except CacheError as error:
            unreadable.append(str(error))


def _encoder(record: EncoderRecord) -> dict[str, Any]:
    kept = (
        *("name", "source", "architecture", "weights_sha256", "global_token", "tap", "size"),
        *("grid", "patch_size", "arrays", "precision", "licence", "parameters", "environment"),
    )
    return {name: getattr(record, name) for name in kept}


def _part(
    cache: Cache,
    owner: str,
    recipe: str,
    expected: set[tuple[int, str]],
    unreadable: list[str],
) -> tuple[Part, list[str]]:
    units = sorted(cache.units(owner, recipe))
    paths = [cache.layout.manifest(owner, recipe, *unit) for unit in units]
    records, groups, moments = [], [], dict[str, Moments]()
    for path in counted(paths, f"read {owner}"):
        for record in _readable(map(UnitRecord.read, [path]), unreadable):
            groups.append(cache.layout.group(path, record.group))
            for array, content in record.statistics.items():
                unit = Moments.from_json(content)
                moments[array] = moments[array].merge(unit) if array in moments else unit
            # Statistics are most of a manifest; 20,000 of them would fill the memory.
            records.append(replace(record, statistics={}))
    missing = sorted(expected - set(units))
    path = cache.layout.codec(owner, recipe)
    stored = (
        list(_readable(map(cache.codec, [owner], [recipe]), unreadable)) if path.exists() else []
    )
    part = Part(
        owner=owner,
        recipe=recipe,
        units=len(units),
        expected=len(expected),
        missing=[f"view {view} of {tar}" for view, tar in missing],
        rows=sum(record.rows for record in records),
        bytes=sum(size for record in records for size, _ in record.objects.values()),
        pixels=_pixels(records),
        rescaled=sum(record.rescaled for record in records),
        statistics={array: _summary(found) for array, found in sorted(moments.items())},
        **{
            name: getattr(codec, name)
            for codec in stored
            for name in ("codec", "arrays", "patches", "fidelity")
        },
    )
    return part, orphans(cache, owner, recipe, groups)


def _pixels(records: list[UnitRecord]) -> str:
    kinds = {"pixels": "raw", "jpeg": "jpeg"}
    found = {kind for record in records for array, kind in kinds.items() if array in record.arrays}
    return " and ".join(sorted(found))


def _summary(moments: Moments) -> dict[str, float]:
    std_D = sorted(moments.std().tolist())
    return {
        "count": moments.count,
        "mean_rms": float((moments.mean**2).mean() ** 0.5),
        "std_min": std_D[0],
        "std_median": std_D[len(std_D) // 2],
        "std_max": std_D[-1],
    }


def info_json(info: CacheInfo) -> dict[str, Any]:
    """The same as plain numbers, strings and lists."""
    parts = [{**asdict(part), "complete": part.complete} for part in info.parts]
    return {**asdict(info), "parts": parts, "complete": info.complete}
