"""What a run writes down before its first unit, or finds there and must agree with.

    cache.json                      format, seed
    tars/<stem>.json                one image tar, when its turn comes
    <encoder>/teacher.json          the encoder
    <encoder>/<recipe>/codec.json   how its features are stored; quantising codecs are calibrated

Each is made once: of several processes, the first one's counts and the others read it.
"""

import glob
import itertools
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from extract.cache.codecs import calibrate, fidelity, to_float16
from extract.cache.errors import CacheError, ImageError
from extract.cache.images import DECODER, TarIndex, index_tar, keys_digest, tar_sha256
from extract.cache.mirror import Mirror
from extract.cache.reader import Cache
from extract.cache.schema import (
    CALIBRATION_ROWS,
    FORMAT_VERSION,
    FP16,
    VIEWS,
    CacheRecord,
    CodecRecord,
    EncoderRecord,
    Layout,
    TarRecord,
)
from extract.cache.staging import Staging
from extract.cache.subsets import kept_patches
from extract.config import ExtractConfig
from extract.encoders.encoder import Encoder
from extract.job import Job
from extract.rendering import Rendering
from extract.sources import TarFile
from extract.units import padded, take

LIBRARIES = ("torch", "torchvision", "timm", "pillow", "zarr", "numpy")


def open_or_create(config: ExtractConfig, mirror: Mirror | None, staging: Staging) -> Cache:
    """The cache, made if there is none; raises `CacheError` where that cannot be."""
    layout = Layout(staging.root)
    if not layout.cache.exists():
        _check_empty(config, layout, mirror)
        record = CacheRecord(FORMAT_VERSION, config.seed, DECODER)
        if mirror is not None:
            mirror.publish(layout.cache, record.content(), first=True)
        else:
            record.publish_first(layout.cache, staging.folder)
    cache = Cache(mirror or staging.root)
    if cache.record.seed != config.seed:
        raise CacheError(
            f"{config.cache} was made with seed {cache.record.seed}, now --seed {config.seed} was "
            f"given: views of two seeds do not mix; use --seed {cache.record.seed} or another cache"
        )
    return cache


def _check_empty(config: ExtractConfig, layout: Layout, mirror: Mirror | None) -> None:
    if mirror is None:
        foreign = [path.name for path in layout.root.iterdir() if not path.name.startswith(".")]
    else:
        foreign = list(itertools.islice(mirror.bucket.names(), 3))
    # Another process may have made the cache a moment ago.
    if foreign and not layout.cache.exists() and "cache.json" not in foreign:
        raise CacheError(
            f"{config.cache} is not empty and is no feature cache (it holds "
            f"{', '.join(sorted(foreign)[:3])}…): choose a new or empty folder with --cache"
        )


def record_encoder(
    cache: Cache, folder: str, encoder: Encoder, staging: Staging, replace: bool
) -> EncoderRecord:
    """Write `teacher.json`, or raise `CacheError` where it says otherwise."""
    record = describe(folder, encoder)
    path = cache.layout.encoder(folder)
    stored = EncoderRecord.read(path) if path.exists() else None
    if stored is not None and stored.identity() != record.identity():
        # A run that failed before its first unit may have left a record that nothing relies on.
        if not replace and any((cache.root / folder).glob("*/*/*.json")):
            raise CacheError(_other_encoder(cache.root / folder, stored, record))
        # Out of sight in one step, then deleted with the staging folder.
        os.rename(cache.root / folder, staging.folder / f"replaced-{folder}")
    cache.publish(record, path, staging.folder)
    stored = EncoderRecord.read(path)
    if stored.identity() != record.identity():
        raise CacheError(_other_encoder(cache.root / folder, stored, record))
    return stored


def _other_encoder(folder: Path, stored: EncoderRecord, found: EncoderRecord) -> str:
    changes = "; ".join(
        f"{name}: {stored.identity()[name]!r} in the cache, {value!r} now"
        for name, value in found.identity().items()
        if stored.identity()[name] != value
    )
    return (
        f"{folder} was made by another encoder ({changes}): use the same weights, or give this "
        f"one a name of its own with --teacher NEWNAME=…"
    )


def describe(folder: str, encoder: Encoder) -> EncoderRecord:
    """The encoder's record, with the shapes of its arrays from one blank view."""
    spec = encoder.spec
    with torch.inference_mode():
        blank = encoder(torch.zeros((1, 3, spec.size, spec.size), dtype=torch.uint8))
    return EncoderRecord(
        name=folder,
        source=spec.source,
        architecture=spec.architecture,
        weights_sha256=spec.sha256,
        global_token=spec.global_token,
        tap=spec.tap,
        size=spec.size,
        grid=list(spec.grid),
        patch_size=spec.patch_size,
        arrays={name: list(tokens.shape[1:]) for name, tokens in blank.items()},
        mean=list(spec.mean),
        std=list(spec.std),
        interpolation=spec.interpolation,
        position_embedding=spec.position_embedding,
        precision=spec.precision,
        licence=spec.licence,
        parameters=spec.parameters,
        environment={
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
        },
    )


def planned_codec(config: ExtractConfig, encoder: EncoderRecord) -> CodecRecord:
    """How a new encoder's features would be stored, but for the calibration."""
    arrays = {name: list(shape) for name, shape in encoder.arrays.items()}
    if config.tokens == "cls":
        return CodecRecord(FP16, {"cls": arrays["cls"]})
    total = arrays["patches"][0]
    if config.patches is not None and config.patches > total:
        raise CacheError(
            f"--patches {config.patches}: {encoder.name} has {total} patch tokens a view "
            f"({encoder.grid[0]} x {encoder.grid[1]}); choose fewer, or leave it out to keep all"
        )
    kept = config.patches if config.patches != total else None
    arrays["patches"][0] = kept or total
    return CodecRecord(config.codec or FP16, arrays, kept)


def record_codec(
    job: Job, name: str, encoder: Encoder, config: ExtractConfig, first: TarFile, staging: Staging
) -> CodecRecord:
    """Write `codec.json`, calibrated on the first rows of the first tar, or compare with it.

    Raises `CacheError` when the cache stores these features in another way than asked for.
    """
    cache, label = job.cache, job.recipe.label
    path = cache.layout.codec(name, label)
    wanted = planned_codec(config, cache.encoder(name))
    wrong = _differences(cache.codec(name, label), wanted, config) if path.exists() else []
    # What a run that stopped before its first unit meant to do binds nobody.
    idle = not any(path.parent.glob("*/*.json"))
    if not path.exists() or (wrong and idle):
        if wanted.codec != FP16:
            with first.local(staging.folder) as tar:
                wanted = _calibrated(job, encoder, wanted, index_tar(tar), config.skip_bad)
        cache.publish(wanted, path, staging.folder, first=not wrong)
    stored = cache.codec(name, label)
    _refuse(path, stored, _differences(stored, wanted, config))
    _check_subset(cache, name, label)
    return stored


def _differences(stored: CodecRecord, wanted: CodecRecord, config: ExtractConfig) -> list[str]:
    """Flags that ask for another way of storing than the cache has."""
    cls_only = "patches" not in stored.arrays
    asked = {
        "--codec": config.codec is not None and not cls_only and stored.codec != config.codec,
        "--tokens": (config.tokens == "cls") > cls_only,
        "--patches": config.patches is not None and stored.patches != wanted.patches,
    }
    return [flag for flag, differs in asked.items() if differs]


def _refuse(path: Path, stored: CodecRecord, wrong: list[str]) -> None:
    if wrong:
        kept = f"{stored.patches} patch tokens" if stored.patches else "all patch tokens"
        kept = kept if "patches" in stored.arrays else "CLS tokens only"
        raise CacheError(
            f"{path.parent} is stored as {stored.codec} with {kept}, which {' and '.join(wrong)} "
            "would change: leave that out to go on with it, use another --cache, or see "
            "unic-extract convert"
        )


def _check_subset(cache: Cache, name: str, label: str) -> None:
    """Every encoder of a grid keeps the same patches, because their positions are stored once."""
    owner, kept = cache.subset(name, label), cache.codec(name, label).patches
    if owner is None:
        return
    for other in cache.encoders():
        path = cache.layout.codec(other, label)
        if path.exists() and cache.subset(other, label) == owner:
            theirs = cache.codec(other, label).patches
            if theirs != kept:
                raise CacheError(
                    f"{other} keeps {theirs} patch tokens of its {owner.partition('@')[2]} grid in "
                    f"this cache, {name} would keep {kept}: use --patches {theirs}, or another "
                    "--cache"
                )


def _calibrated(
    job: Job, encoder: Encoder, wanted: CodecRecord, first: TarIndex, skip_bad: bool
) -> CodecRecord:
    record = tar_record(job.cache, first)
    try:
        patches = torch.cat(list(_first_patches(job, encoder, wanted, first, record)))
    except ImageError:
        if not skip_bad:
            raise
        record = without_bad(Rendering(job, first, record, [0]), record)
        if not record.rows:
            raise
        patches = torch.cat(list(_first_patches(job, encoder, wanted, first, record)))
    codec = calibrate(wanted.codec, patches)
    return CodecRecord(
        wanted.codec,
        wanted.arrays,
        wanted.patches,
        dict(codec.calibration),
        fidelity(codec, patches),
    )


def _first_patches(
    job: Job, encoder: Encoder, wanted: CodecRecord, first: TarIndex, record: TarRecord
) -> Iterator[Tensor]:
    """Kept patch tokens `[B, K, D]` float16 of view 0 of the first tar's first 256 rows."""
    rendering = Rendering(job, first, record, [0])
    size = min(job.batch_size, record.rows)
    grid = encoder.spec.grid
    for rows, views in rendering.batches(job.batch_size, job.workers, CALIBRATION_ROWS):
        tokens = padded(encoder, views[0].pixels, size)["patches"]
        if wanted.patches is not None:
            places = [
                (first.stem, rendering.samples[r].ordinal, rendering.samples[r].key) for r in rows
            ]
            seed = job.cache.record.seed
            tokens = take(
                tokens,
                np.stack([kept_patches(seed, *p, 0, grid, wanted.patches) for p in places]),
            )
        yield to_float16(tokens, lambda i: f"patches of row {i} of the calibration")


def tar_record(cache: Cache, index: TarIndex, location: str = "") -> TarRecord:
    """The record of a tar: the stored one, or what a new one would be.

    Raises `CacheError` when the file is not the tar that units of the cache rely on.
    """
    sha256 = tar_sha256(index.path)
    if cache.layout.tar(index.stem).exists() and has_units(cache, index.stem):
        stored = cache.tar(index.stem)
        if sha256 != stored.sha256:
            raise CacheError(_other_tar(index.path, stored, cache))
        return stored
    return TarRecord(
        stem=index.stem,
        locations=[location],
        bytes=index.size,
        sha256=sha256,
        rows=len(index.samples),
        keys_digest=keys_digest([sample.key for sample in index.samples]),
    )


def without_bad(rendering: Rendering, record: TarRecord) -> TarRecord:
    """The tar's record without the images that cannot be decoded or cut into views."""
    bad = rendering.bad()
    kept = [sample.key for sample in rendering.samples if sample.ordinal not in bad]
    skipped = [
        [sample.ordinal, sample.key, bad[sample.ordinal]]
        for sample in rendering.samples
        if sample.ordinal in bad
    ]
    return replace(record, rows=len(kept), keys_digest=keys_digest(kept), skipped=skipped)


def check_tar(job: Job, tar: TarFile) -> bool:
    """Whether the cache knows this tar already and units rely on what it knows.

    Raises `CacheError` when it has another length than the tar that the cache knows by its name.
    """
    cache = job.cache
    # Without a unit nothing relies on the record: a tar that stopped a run may have been mended.
    if not cache.layout.tar(tar.stem).exists() or not has_units(cache, tar.stem):
        return False
    stored = cache.tar(tar.stem)
    if tar.size() not in (stored.bytes, None):
        raise CacheError(_other_tar(tar.location, stored, cache))
    return True


def _other_tar(found: str | Path, stored: TarRecord, cache: Cache) -> str:
    return (
        f"{found} is not the tar that {cache.layout.tar(stored.stem)} describes ({stored.bytes} "
        f"bytes, sha256 {stored.sha256[:12]}…): tars of one cache need different names, and a "
        "changed tar needs a new cache"
    )


def has_units(cache: Cache, stem: str) -> bool:
    """Whether any unit of this tar is published."""
    return any(
        path
        for owner in (VIEWS, *cache.encoders())
        for path in (cache.root / owner).glob(f"*/*/{glob.escape(stem)}.json")
    )
