"""What an extraction will cost, before it is paid: bytes, disk, time; and a refusal in time.

Sizes are computed from the format (`extract.planning.sizes`), times are projections of a short
measured run (`extract.planning.rehearsal`) on a sample of the data (`extract.planning.survey`).
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from console.device import torch_device
from extract.cache.errors import UserError
from extract.cache.mirror import Mirror
from extract.cache.reader import Cache
from extract.cache.remote import is_url
from extract.cache.schema import (
    CODECS,
    CodecRecord,
    Layout,
    check_name,
    feature_specs,
    subset_owner,
)
from extract.cache.views import Recipe, parse_recipe
from extract.config import ExtractConfig
from extract.encoders.encoder import Encoder
from extract.job import Job
from extract.planning.projection import EncoderPlan, Plan
from extract.planning.rehearsal import Rehearsal, rehearse
from extract.planning.sizes import (
    expected_jpeg,
    free_bytes,
    gigabytes,
    missing_bytes,
    owner_specs,
    unit_bytes,
)
from extract.planning.survey import DataFacts, look_at_data
from extract.records import describe, planned_codec
from extract.teachers import TEACHERS, encoder_folder, load_encoder


def refuse_beyond(needed: int, free: int | None, folder: Path | str) -> None:
    """Raise `UserError` when `needed` bytes are more than `free` ones; says what would help.

    None is a place without a limit that could be asked for: a bucket.
    """
    if free is not None and needed > free:
        raise UserError(
            f"the disk of {folder} is too small: {gigabytes(needed)} are still to be written, "
            f"{gigabytes(free)} are free. Free or choose another disk (--cache), or store less: "
            "--codec int8 (half), --patches 49 (a quarter of 196), --tokens cls, or fewer --views; "
            "unic-extract plan shows what each takes"
        )


def job_bytes(job: Job, rows: Mapping[str, int]) -> int:
    """Bytes that a run still has to write, for tars with so many `rows` (by stem)."""
    kept = {owner: count for owner, (_, count) in job.subsets.items()}
    stored = {name: teacher.stored for name, teacher in job.teachers.items()}
    specs = owner_specs(job.recipe, job.pixels, kept, stored)
    missing = {stem: job.missing(stem) for stem in rows}
    jpeg = expected_jpeg(job.recipe.size) if job.pixels == "jpeg" else 0
    return sum(missing_bytes(missing, rows, specs, jpeg).values())


def check_disk(needed: int, folder: Path) -> None:
    """Raise `UserError` when the disk of `folder` has no room for `needed` bytes more."""
    refuse_beyond(needed, free_bytes(folder), folder)


def make_plan(config: ExtractConfig, images: int = 32) -> Plan:
    """Plan the run that `config` asks for; nothing is written, downloaded or packed.

    Encoders whose weights would come from the hub are measured with random weights of the same
    architecture, which take the same time and bytes. `images` of the data are measured.

    Raises `UserError` as the run itself would: for data, encoders, a foreign cache.
    """
    recipe, device = parse_recipe(config.recipe), torch_device(config.device)
    cache = _open(config.cache)
    if cache is not None and cache.record.seed != config.seed:
        raise UserError(
            f"{config.cache} was made with seed {cache.record.seed}, now --seed {config.seed} was "
            "given: views of two seeds do not mix"
        )
    data = look_at_data(config, cache, images)
    encoders: dict[str, Encoder] = {}
    loaded = set()
    for name in config.teachers:
        folder = check_name(encoder_folder(name))
        if folder in encoders:
            raise UserError(
                f"two encoders would both be stored as {folder!r}: see --teacher OTHER=…"
            )
        encoders[folder], whole = planned_encoder(name, recipe.size, config, device)
        loaded |= {folder} if whole else set()
    rehearsal = rehearse(
        *(data.sample, recipe, config.seed, config.views, encoders, config.batch_size, device),
        None if is_url(config.cache) else Path(config.cache),
    )
    return _plan(config, recipe, cache, data, encoders, loaded, rehearsal)


def _open(location: Path | str) -> Cache | None:
    """The cache, if there is one already."""
    if not is_url(location):
        return Cache(location) if Layout(Path(location)).cache.exists() else None
    mirror = Mirror(str(location))
    mirror.refresh()
    return Cache(mirror) if Layout(mirror.folder).cache.exists() else None


def _plan(
    config: ExtractConfig,
    recipe: Recipe,
    cache: Cache | None,
    data: DataFacts,
    encoders: Mapping[str, Encoder],
    loaded: set[str],
    rehearsal: Rehearsal,
) -> Plan:
    stored = {name: _stored(config, cache, name, encoder) for name, encoder in encoders.items()}
    kept = {
        subset_owner(encoders[name].spec.grid): record.patches
        for name, record in stored.items()
        if record.patches is not None
    }
    specs = owner_specs(recipe, config.store_views, kept, stored)
    there = {owner: cache.units(owner, recipe.label) if cache else set() for owner in specs}
    missing = {
        tar: {
            owner: [view for view in range(config.views) if (view, tar) not in units]
            for owner, units in there.items()
        }
        for tar in data.rows
    }
    jpeg = rehearsal.views.jpeg_bytes if config.store_views == "jpeg" else 0
    needed = missing_bytes(missing, data.rows, specs, jpeg)
    wanted = {tar: set().union(*owners.values()) for tar, owners in missing.items()}
    return Plan(
        cache=str(config.cache),
        recipe=recipe.label,
        size=recipe.size,
        views=config.views,
        workers=config.workers,
        store_views=config.store_views,
        images=data.images,
        tars=len(data.rows),
        encoders=[
            EncoderPlan(
                name=name,
                architecture=encoder.spec.architecture,
                parameters=encoder.spec.parameters,
                licence=TEACHERS[name].licence if name in TEACHERS else encoder.spec.licence,
                loaded=name in loaded,
                arrays=stored[name].arrays,
                codec=stored[name].codec,
                bytes_by_codec=_by_codec(stored[name], data, config.views),
                missing_bytes=needed[name],
                missing_rows=sum(data.rows[tar] * len(missing[tar][name]) for tar in data.rows),
            )
            for name, encoder in encoders.items()
        ],
        view_bytes=sum(size for owner, size in needed.items() if owner not in encoders),
        packing_bytes=data.packing_bytes,
        free_bytes=None if is_url(config.cache) else free_bytes(Path(config.cache)),
        images_to_decode=sum(data.rows[tar] for tar, views in wanted.items() if views),
        views_to_make=sum(data.rows[tar] * len(views) for tar, views in wanted.items()),
        rehearsal=rehearsal,
    )


def _by_codec(stored: CodecRecord, data: DataFacts, views: int) -> dict[str, int]:
    """Bytes of all rows in every codec."""
    return {
        codec: sum(
            views * unit_bytes(feature_specs(stored.arrays, codec), rows)
            for rows in data.rows.values()
        )
        for codec in CODECS
    }


def _stored(config: ExtractConfig, cache: Cache | None, name: str, encoder: Encoder) -> CodecRecord:
    """How the run would store the features: as the cache has them already, else as asked."""
    asked = planned_codec(config, describe(name, encoder))
    if cache is None or not cache.layout.codec(name, config.recipe).exists():
        return asked
    stored = cache.codec(name, config.recipe)
    changed = [
        flag
        for flag, given, differs in (
            ("--codec", config.codec is not None, stored.codec != asked.codec),
            ("--tokens", config.tokens == "cls", stored.arrays.keys() != asked.arrays.keys()),
            ("--patches", config.patches is not None, stored.patches != asked.patches),
        )
        if given and differs
    ]
    if changed:
        raise UserError(
            f"{name}/{config.recipe} is stored as {stored.codec} already, which "
            f"{' and '.join(changed)} would change: leave that out to go on with it, or plan for "
            "another --cache"
        )
    return stored


def planned_encoder(
    name: str, size: int, config: ExtractConfig, device: torch.device
) -> tuple[Encoder, bool]:
    """The encoder and True, or its untrained architecture and False if weights must be fetched."""
    folder = encoder_folder(name)
    target = name.removeprefix(f"{folder}=")
    if config.weights is None and (target in TEACHERS or target.startswith("timm:")):
        return load_encoder(f"{folder}=random:{target}", size=size, device=device), False
    return load_encoder(name, size=size, weights=config.weights, device=device), True
