"""Stage 1, top to bottom: image tars in, a cache of every encoder's features out.

    tars = find (or pack an ImageFolder)  ->  cache.json  ->  encoders loaded, teacher.json
    codec.json of each encoder, calibrated on the first rows of the first tar where codecs need it
    for each tar that nobody else holds (extract.sharing.claims), one's own share first:
        decode once -> views -> every encoder -> units, manifests last      (extract.units)

A second run finds the units that have a manifest and makes only what is missing; so does a second
process at the same time, on this machine or another.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from console.device import torch_device
from console.progress import ProgressBar
from extract.cache.errors import CacheError, ImageError, UserError
from extract.cache.images import TarIndex, index_tar
from extract.cache.mirror import Mirror
from extract.cache.remote import is_url
from extract.cache.schema import TarRecord, check_name
from extract.cache.staging import Staging
from extract.cache.views import parse_recipe
from extract.config import ExtractConfig
from extract.encoders.encoder import Encoder
from extract.job import Job, Teacher
from extract.planning.plan import check_disk, job_bytes
from extract.records import (
    check_tar,
    open_or_create,
    record_codec,
    record_encoder,
    tar_record,
    without_bad,
)
from extract.rendering import Rendering
from extract.sharing.claim_store import ClaimFiles, ClaimObjects, ClaimStore
from extract.sharing.claims import Claims
from extract.sources import TarFile, find_tars
from extract.teachers import encoder_folder, load_encoder
from extract.units import TarExtraction

WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class Extracted:
    """What a run did for one encoder: rows in the cache now, and how many it computed itself."""

    encoder: str
    folder: Path
    images: int
    views: int
    computed: int
    arrays: dict[str, list[int]]
    skipped: int = 0


def extract(
    config: ExtractConfig, encoders: Mapping[str, Encoder] | None = None
) -> list[Extracted]:
    """Run the stage; one summary for each encoder.

    `encoders` may hold some that are loaded already, by the names of `config.teachers`. Raises
    `UserError` (images, encoders, an unsuitable cache); everything published before stays.
    """
    recipe = parse_recipe(config.recipe)
    names = _by_folder(config.teachers)
    mirror = Mirror(str(config.cache)) if is_url(config.cache) else None
    if mirror is not None:
        mirror.refresh()
    with Staging(mirror.folder if mirror else Path(config.cache)) as staging:
        cache = open_or_create(config, mirror, staging)
        tars = find_tars(config.data, cache, config.seed)
        loaded = {
            folder: (encoders or {}).get(name)
            or load_encoder(
                name,
                size=recipe.size,
                weights=config.weights,
                device=torch_device(config.device),
            )
            for folder, name in names.items()
        }
        job = Job(
            cache, recipe, config.views, {}, config.batch_size, config.workers, config.store_views
        )
        teachers = {}
        for name, encoder in loaded.items():
            record = record_encoder(cache, name, encoder, staging, config.replace)
            stored = record_codec(job, name, encoder, config, tars[0], staging)
            teachers[name] = Teacher(record, stored, encoder)
        job = replace(job, teachers=teachers)
        computed = _Extraction(job, config, tars, staging).run()
        records = [cache.tar(tar.stem) for tar in tars]
    images, skipped = sum(r.rows for r in records), sum(len(r.skipped) for r in records)
    return [
        Extracted(
            name,
            cache.root / name,
            images,
            config.views,
            computed[name],
            teacher.stored.arrays,
            skipped,
        )
        for name, teacher in job.teachers.items()
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


class _Extraction:
    """The tars of one run: one's own share first, then what others have left."""

    def __init__(
        self, job: Job, config: ExtractConfig, tars: list[TarFile], staging: Staging
    ) -> None:
        self.job, self.config, self.staging = job, config, staging
        mine, count = config.shard_index, config.num_shards
        self.queue = tars[mine::count]
        for distance in range(1, count):
            self.queue += tars[(mine + distance) % count :: count]
        self.rows = {tar: self._rows(tar) for tar in tars}
        self.computed = dict.fromkeys(job.teachers, 0)
        self.failed: dict[TarFile, UserError] = {}

    def _rows(self, tar: TarFile) -> int:
        """Rows of a tar as far as can be told now; 0 for one that is remote or cannot be read."""
        if self.job.cache.layout.tar(tar.stem).exists():
            return self.job.cache.tar(tar.stem).rows
        try:
            return 0 if tar.remote else len(index_tar(tar.location))
        except ImageError:
            return 0

    def run(self) -> dict[str, int]:
        """Rows computed by encoder.

        Raises before the first tar when the disk is too small, and what went wrong with any tar
        after all others.
        """
        if self.job.cache.mirror is None:
            rows = {tar.stem: count for tar, count in self.rows.items()}
            check_disk(job_bytes(self.job, rows), self.job.cache.root)
        label = self.job.recipe.label
        purpose = f"{label} {sorted(self.job.teachers)}"
        total = sum(self.rows.values()) * self.job.views * len(self.job.teachers)
        left = sum(self._missing(tar) for tar in self.rows)
        with (
            Claims(self._claim_store(), purpose) as claims,
            ProgressBar("extract", total, "views", start=total - left) as progress,
        ):
            waiting = self.queue
            while waiting := [tar for tar in waiting if not self._done(tar, claims, progress)]:
                progress.advance(0, f"{len(waiting)} tars are with other processes")
                time.sleep(WAIT_SECONDS)
        if self.failed:
            raise self._failure()
        return self.computed

    def _claim_store(self) -> ClaimStore:
        cache = self.job.cache
        return ClaimFiles(cache.root) if cache.mirror is None else ClaimObjects(cache.mirror.bucket)

    def _missing(self, tar: TarFile) -> int:
        missing = self.job.missing(tar.stem)
        return self.rows[tar] * sum(len(missing[name]) for name in self.job.teachers)

    def _done(self, tar: TarFile, claims: Claims, progress: ProgressBar) -> bool:
        """Extract a tar unless it is complete, or another process has it (False)."""
        try:
            known = check_tar(self.job, tar)
            if not any(self.job.missing(tar.stem).values()):
                return True
            if not claims.take(tar.stem):
                return False
            try:
                if self._catch_up(tar.stem):
                    return True
                with tar.local(self.staging.folder) as path:
                    self._extract(tar, index_tar(path), progress, known)
            finally:
                claims.release(tar.stem)
        except ImageError as error:
            # One bad tar costs that tar; the others are made, and the run fails at its end.
            self.failed[tar] = error
            print(f"{tar.name} was left out: {error}", file=sys.stderr, flush=True)
        return True

    def _catch_up(self, stem: str) -> bool:
        """Learn what others published meanwhile in a bucket; whether the tar is complete by now."""
        cache, label = self.job.cache, self.job.recipe.label
        if cache.mirror is not None:
            cache.mirror.pull(cache.layout.tar(stem))
            for owner, views in self.job.missing(stem).items():
                for view in views:
                    cache.mirror.pull(cache.layout.manifest(owner, label, view, stem))
        return not any(self.job.missing(stem).values())

    def _extract(self, tar: TarFile, index: TarIndex, progress: ProgressBar, known: bool) -> None:
        cache = self.job.cache
        record = tar_record(cache, index, tar.seen_from(cache))
        missing = self.job.missing(record.stem)
        more = record.rows - self.rows[tar]
        progress.expect(more * self.job.views * len(self.job.teachers))
        self.rows[tar] = record.rows
        if not known:
            self._write(record)
        try:
            while not TarExtraction(self.job, index, record, self.staging).run(progress):
                pass
        except ImageError:
            if known or not self.config.skip_bad:
                raise
            record = self._without_bad(Rendering(self.job, index, record, [0]), record)
            while not TarExtraction(self.job, index, record, self.staging).run(progress):
                pass
        for name in self.job.teachers:
            self.computed[name] += record.rows * len(missing[name])

    def _without_bad(self, rendering: Rendering, record: TarRecord) -> TarRecord:
        """The tar's record without the images that cannot be decoded; raises above the limit."""
        record = without_bad(rendering, record)
        self._check_limit(record)
        self._write(record)
        for _, key, reason in record.skipped:
            print(f"skipped {key}: {reason}", file=sys.stderr, flush=True)
        return record

    def _write(self, record: TarRecord) -> None:
        cache = self.job.cache
        cache.publish(record, cache.layout.tar(record.stem), self.staging.folder, first=False)

    def _check_limit(self, record: TarRecord) -> None:
        layout, total = self.job.cache.layout, sum(self.rows.values())
        stems = {tar.stem for tar in self.rows} - {record.stem}
        others = [self.job.cache.tar(stem) for stem in sorted(stems) if layout.tar(stem).exists()]
        skipped = len(record.skipped) + sum(len(other.skipped) for other in others)
        if skipped > self.config.max_bad * total or not record.rows:
            ordinal, key, reason = record.skipped[0]
            raise CacheError(
                f"{skipped} of {total} images cannot be decoded, which is more than the share "
                f"{self.config.max_bad:g} that --skip-bad leaves out; the last tar was "
                f"{record.stem}, there for example image {ordinal}, {key} ({reason}). Mend the "
                "images, or raise --max-bad"
            )

    def _failure(self) -> UserError:
        if len(self.failed) == 1:
            return next(iter(self.failed.values()))
        reasons = "\n".join(f"  {tar.name}: {error}" for tar, error in self.failed.items())
        return ImageError(
            f"{len(self.failed)} of {len(self.rows)} tars could not be extracted, all others are "
            f"in the cache:\n{reasons}"
        )
