"""Stage 1, top to bottom: image tars in, a cache of every encoder's features out.

    tars = find (or pack an ImageFolder)  ->  cache.json  ->  encoders loaded, teacher.json
    for each tar:  decode once -> views -> every encoder -> units, manifests last (extract.units)
    statistics of every encoder, exact, from the manifests

A second run finds the units that have a manifest and makes only what is missing.
"""

import glob
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from console.device import torch_device
from console.progress import ProgressBar
from extract.cache.errors import CacheError
from extract.cache.images import (
    DECODER,
    expand,
    index_tar,
    is_image_folder,
    keys_digest,
    tar_sha256,
)
from extract.cache.reader import Cache
from extract.cache.schema import (
    FORMAT_VERSION,
    VIEWS,
    CacheRecord,
    CodecRecord,
    EncoderRecord,
    Layout,
    TarRecord,
    check_name,
)
from extract.cache.staging import Staging
from extract.cache.views import parse_recipe
from extract.config import ExtractConfig
from extract.encoder import Encoder
from extract.packing import pack_image_folder
from extract.teachers import encoder_folder, load_encoder
from extract.units import Job, TarExtraction

LIBRARIES = ("torch", "torchvision", "timm", "pillow", "zarr", "numpy")


@dataclass(frozen=True)
class Extracted:
    """What a run did for one encoder: rows in the cache now, and how many it computed itself."""

    encoder: str
    folder: Path
    images: int
    views: int
    computed: int
    arrays: dict[str, list[int]]


def extract(config: ExtractConfig) -> list[Extracted]:
    """Run the stage; one summary for each encoder.

    Raises `UserError` (images, encoders, an unsuitable cache); everything published before stays.
    """
    recipe = parse_recipe(config.recipe)
    encoders = _by_folder(config.teachers)
    with Staging(config.cache) as staging:
        cache = _open_or_create(config, staging)
        tars = find_tars(config.data, cache, config.seed)
        loaded = {
            folder: load_encoder(
                name,
                size=recipe.size,
                weights=config.weights,
                device=torch_device(config.device),
            )
            for folder, name in encoders.items()
        }
        job = Job(
            cache=cache,
            recipe=recipe,
            views=config.views,
            encoders={
                name: (
                    _record_encoder(cache, name, recipe.label, encoder, staging, config.replace),
                    encoder,
                )
                for name, encoder in loaded.items()
            },
            batch_size=config.batch_size,
            workers=config.workers,
            store_views=config.store_views,
        )
        computed, images = _extract_tars(job, tars, staging)
    return [
        Extracted(name, cache.root / name, images, config.views, computed[name], record.arrays)
        for name, (record, _) in job.encoders.items()
    ]


def _by_folder(teachers: tuple[str, ...]) -> dict[str, str]:
    encoders: dict[str, str] = {}
    for name in teachers:
        folder = check_name(encoder_folder(name))
        if folder in encoders:
            raise CacheError(
                f"{encoders[folder]} and {name} would both be stored as {folder!r}: name each "
                "encoder once, or give one a name of its own with --teacher NEWNAME=…"
            )
        encoders[folder] = name
    return encoders


def find_tars(data: tuple[str, ...], cache: Cache, seed: int) -> list[Path]:
    """The image tars that `data` names; an ImageFolder is packed into `<cache>/images` first.

    Raises `UserError` when nothing is there.
    """
    if len(data) == 1 and is_image_folder(Path(data[0])):
        return pack_image_folder(Path(data[0]), cache.root / "images", seed)
    return expand(list(data))


def _open_or_create(config: ExtractConfig, staging: Staging) -> Cache:
    layout = Layout(config.cache)
    if not layout.cache.exists():
        foreign = [
            path.name for path in config.cache.iterdir() if not path.name.startswith(".staging-")
        ]
        if foreign:
            raise CacheError(
                f"{config.cache} is not empty and is no feature cache (it holds "
                f"{', '.join(sorted(foreign)[:3])}…): choose a new or empty folder with --cache"
            )
        record = CacheRecord(FORMAT_VERSION, config.seed, DECODER)
        record.write(layout.cache, staging.folder)
    cache = Cache(config.cache)
    if cache.record.seed != config.seed:
        raise CacheError(
            f"{config.cache} was made with seed {cache.record.seed}, now --seed {config.seed} was "
            f"given: views of two seeds do not mix; use --seed {cache.record.seed} or another cache"
        )
    return cache


def _record_encoder(
    cache: Cache, folder: str, label: str, encoder: Encoder, staging: Staging, replace: bool
) -> EncoderRecord:
    """Write `teacher.json` and `codec.json`, or raise `CacheError` where they say otherwise."""
    record = describe(folder, encoder)
    path = cache.layout.encoder(folder)
    stored = EncoderRecord.read(path) if path.exists() else None
    if stored is not None and stored.identity() != record.identity():
        # A run that failed before its first unit may have left a record that nothing relies on.
        if not replace and any((cache.root / folder).glob("*/*/*.json")):
            raise CacheError(_other_encoder(cache.root / folder, stored, record))
        # Out of sight in one step, then deleted with the staging folder.
        os.rename(cache.root / folder, staging.folder / f"replaced-{folder}")
        stored = None
    if stored is None:
        record.write(path, staging.folder)
    codec = cache.layout.codec(folder, label)
    if not codec.exists():
        CodecRecord("fp16").write(codec, staging.folder)
    elif cache.codec(folder, label).patches is not None:
        raise CacheError(f"{codec.parent} holds a subset of patches; this version adds none")
    return stored or record


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


def _extract_tars(job: Job, tars: list[Path], staging: Staging) -> tuple[dict[str, int], int]:
    """Rows computed by encoder, and the number of images in all tars."""
    computed = dict.fromkeys(job.encoders, 0)
    records = [_tar_record(job, path, staging) for path in tars]
    images = sum(record.rows for record in records)
    total = images * job.views * len(job.encoders)
    missing = {record.stem: job.missing(record.stem) for record in records}
    left = sum(
        record.rows * sum(len(missing[record.stem][name]) for name in job.encoders)
        for record in records
    )
    with ProgressBar("extract", total, "views", start=total - left) as progress:
        for record, path in zip(records, tars, strict=True):
            if not any(missing[record.stem].values()):
                continue
            TarExtraction(job, index_tar(path), record, staging).run(progress)
            for name in job.encoders:
                computed[name] += record.rows * len(missing[record.stem][name])
    return computed, images


def _tar_record(job: Job, path: Path, staging: Staging) -> TarRecord:
    """Write, or compare with, the tar's record; raises `CacheError` when it is another tar."""
    cache, stem = job.cache, path.name.removesuffix(".tar")
    target = cache.layout.tar(stem)
    # Without a unit nothing relies on the record: a tar that stopped a run may have been mended.
    if target.exists() and _has_units(cache, stem):
        stored = cache.tar(stem)
        complete = not any(job.missing(stem).values())
        same = path.stat().st_size == stored.bytes
        if not same or (not complete and tar_sha256(path) != stored.sha256):
            raise CacheError(
                f"{path} is not the tar that {target} describes ({stored.bytes} bytes, sha256 "
                f"{stored.sha256[:12]}…): tars of one cache need different names, and a changed "
                "tar needs a new cache"
            )
        return stored
    index = index_tar(path)
    record = TarRecord(
        stem=stem,
        locations=[os.path.relpath(path, cache.root)],
        bytes=path.stat().st_size,
        sha256=tar_sha256(path),
        rows=len(index.samples),
        keys_digest=keys_digest([sample.key for sample in index.samples]),
    )
    record.write(target, staging.folder)
    return record


def _has_units(cache: Cache, stem: str) -> bool:
    return any(
        path
        for owner in (VIEWS, *cache.encoders())
        for path in (cache.root / owner).glob(f"*/*/{glob.escape(stem)}.json")
    )
