"""From one codec to another without the teacher: `unic-extract convert`.

A second cache is made beside the first, unit by unit, so that a conversion that stops half-way
harms nothing and goes on when it is started again:

    tars, views, kept patches, teacher.json    taken over as they are (hard links where possible)
    codec.json                                 calibrated on the first rows of the first tar, as
                                               extraction does
    each unit of features                      decoded, encoded, published; statistics are kept,
                                               because they are of the features before any coding
"""

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from console.progress import ProgressBar
from extract.cache.codecs import Codec, calibrate, fidelity
from extract.cache.errors import CacheError, UserError
from extract.cache.reader import Cache, Unit
from extract.cache.schema import (
    CALIBRATION_ROWS,
    CODECS,
    FP16,
    CodecRecord,
    EncoderRecord,
    Layout,
    UnitRecord,
)
from extract.cache.staging import Staging
from extract.cache.writer import UnitWriter, commit, group_name

ROWS = 64


@dataclass(frozen=True)
class ConvertConfig:
    """What `unic-extract convert` is asked to do; no `teachers` means all of them."""

    cache: Path | str
    to: Path
    codec: str
    teachers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise UserError(
                f"--codec {self.codec!r} is unknown: expected one of {', '.join(CODECS)}"
            )
        if self.to.resolve() == Path(self.cache).resolve():
            raise UserError(
                f"--to {self.to} is the cache itself: the converted features go into a second "
                "cache; delete the first one when you have looked at the second"
            )


@dataclass(frozen=True)
class Converted:
    """One encoder's features of one recipe: codecs, bytes of features, and fidelity."""

    encoder: str
    recipe: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    fidelity: dict[str, float]


def convert(config: ConvertConfig) -> list[Converted]:
    """Make the cache `config.to`; raises `UserError` for damage, and for a `to` of something else.

    Run again, it makes only what is missing.
    """
    source = Cache(config.cache)
    names = config.teachers or tuple(source.encoders())
    for name in names:
        source.encoder(name)
    with Staging(config.to) as staging:
        _take_over(source, config.to, staging)
        target = Cache(config.to)
        parts = [(name, label) for name in names for label in source.recipes(name)]
        total = sum(len(source.units(*part)) for part in parts)
        with ProgressBar("convert", total, "units") as progress:
            return [
                _convert(source, target, name, label, config.codec, staging, progress)
                for name, label in parts
            ]


def _take_over(source: Cache, root: Path, staging: Staging) -> None:
    """Everything but features: cache.json, tars, packed images, views, kept patches."""
    layout = Layout(root)
    if layout.cache.exists() and layout.cache.read_bytes() != source.layout.cache.read_bytes():
        raise CacheError(f"{root} is another cache: choose a new or empty folder with --to")
    strangers = [path.name for path in root.iterdir() if not path.name.startswith(".")]
    if strangers and not layout.cache.exists():
        raise CacheError(
            f"{root} is not empty and is no feature cache (it holds {strangers[0]}): choose a new "
            "or empty folder with --to"
        )
    for stem in source.tars():
        record = source.tar(stem)
        places = [os.path.relpath(source.root / place, root) for place in record.locations]
        if not layout.tar(stem).exists():
            replace(record, locations=places).publish_first(layout.tar(stem), staging.folder)
    for owner in source.view_owners():
        for manifest in sorted((source.root / owner).glob("*/*/*.json")):
            _link_unit(source.root, manifest, root, staging)
    _link(source.layout.cache, layout.cache)


def _link_unit(source: Path, manifest: Path, root: Path, staging: Staging) -> None:
    """A unit as it is: its group first, the manifest last."""
    target = root / manifest.relative_to(source)
    if target.exists():
        return
    group = UnitRecord.read(manifest).group
    aside = staging.folder / group
    for path in sorted((manifest.parent / group).rglob("*")):
        if path.is_file():
            _link(path, aside / path.relative_to(manifest.parent / group))
    shutil.rmtree(target.parent / group, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(aside, target.parent / group)
    _link(manifest, target)


def _link(source: Path, target: Path) -> None:
    """A second name of the same file, or a copy on another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        draft = target.with_name(f".{target.name}.partial")
        shutil.copyfile(source, draft)
        os.rename(draft, target)


def _convert(
    source: Cache,
    target: Cache,
    name: str,
    label: str,
    codec: str,
    staging: Staging,
    progress: ProgressBar,
) -> Converted:
    """One encoder's features of one recipe."""
    stored = source.codec(name, label)
    teacher = target.layout.encoder(name)
    if not teacher.exists():
        EncoderRecord.read(source.layout.encoder(name)).publish_first(teacher, staging.folder)
    record = _codec_record(source, target, name, label, codec, stored, staging)
    before = after = 0
    for view, stem in sorted(source.units(name, label)):
        unit = source.unit(name, label, view, stem)
        manifest = target.layout.manifest(name, label, view, stem)
        if not manifest.exists():
            _convert_unit(unit, stored, record, target, name, staging)
        before += _bytes(unit.record)
        after += _bytes(UnitRecord.read(manifest))
        progress.advance(1, f"{name}, tar {stem}")
    return Converted(name, label, stored.codec, record.codec, before, after, record.fidelity)


def _bytes(record: UnitRecord) -> int:
    return sum(size for size, _ in record.objects.values())


def _codec_record(
    source: Cache,
    target: Cache,
    name: str,
    label: str,
    codec: str,
    stored: CodecRecord,
    staging: Staging,
) -> CodecRecord:
    """The new `codec.json`; raises `CacheError` where another conversion left another one."""
    path = target.layout.codec(name, label)
    if not path.exists():
        # CLS tokens are float16 whatever the codec.
        wanted = codec if "patches" in stored.arrays else FP16
        made, figures = Codec(wanted), {}
        if wanted != FP16:
            patches = _first_patches(source, name, label, stored)
            made = calibrate(wanted, patches)
            figures = fidelity(made, patches)
        replace(
            stored,
            codec=wanted,
            calibration=dict(made.calibration),
            fidelity=figures,
        ).publish_first(path, staging.folder)
    record = target.codec(name, label)
    if record.codec != codec and "patches" in record.arrays:
        raise CacheError(
            f"{path.parent} was begun with codec {record.codec}, now {codec} was asked for: choose "
            "another folder with --to"
        )
    return record


def _first_patches(source: Cache, name: str, label: str, stored: CodecRecord) -> Tensor:
    """Patch tokens `[N, P, D]` float16 of view 0 of the first tar's first 256 rows."""
    _, stem = min(source.units(name, label))
    unit = source.unit(name, label, 0, stem)
    return _decoded(unit, stored, "patches", np.arange(min(unit.record.rows, CALIBRATION_ROWS)))


def _blocks(rows: int) -> Iterator[np.ndarray]:
    for start in range(0, rows, ROWS):
        yield np.arange(start, min(start + ROWS, rows))


def _decoded(unit: Unit, stored: CodecRecord, array: str, rows: np.ndarray) -> Tensor:
    codec = Codec(stored.codec, stored.calibration)
    parts = {name: torch.from_numpy(unit.array(name).read(rows)) for name in codec.needs(array)}
    return codec.decode(parts, array)


def _convert_unit(
    unit: Unit, stored: CodecRecord, wanted: CodecRecord, target: Cache, name: str, staging: Staging
) -> None:
    """Decode, encode and publish one unit."""
    record, codec = unit.record, Codec(wanted.codec, wanted.calibration)
    aside = staging.folder / f"{name}-{record.view}-{record.tar}.zarr"
    writer, rescaled = UnitWriter(aside, record.rows, wanted.specs()), 0
    for rows in _blocks(record.rows):
        writer.append("key", unit.keys[rows])
        for array in wanted.arrays:
            tokens = _decoded(unit, stored, array, rows).float()
            where = f"{unit.folder}: row {{}} of {array}".format
            coded, beyond = codec.encode(array, tokens, where)
            rescaled += beyond
            for part, values in coded.items():
                writer.append(part, values.numpy())
    objects = writer.finish()
    converted = replace(
        record,
        group=group_name(record.tar, objects),
        arrays=writer.array_table(),
        objects=objects,
        codec=wanted.seal(),
        rescaled=rescaled,
    )
    commit(target.layout, name, writer, converted, staging.folder, target.mirror)
