"""A look at the images before anything is made of them: how many, in which tars, and a sample."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from extract.cache.images import (
    Sample,
    TarIndex,
    expand,
    image_extension,
    index_tar,
    is_image_folder,
)
from extract.cache.reader import Cache
from extract.checking.inventory import counted
from extract.config import ExtractConfig
from extract.packing import RECORD, list_pictures
from extract.planning.rehearsal import Source

PACKED_TAR = 1000
SAMPLED_TARS = 4


@dataclass(frozen=True)
class DataFacts:
    """The images: rows by tar, a sample of them, and the bytes that are still to be packed."""

    rows: dict[str, int]
    sample: list[Source]
    packing_bytes: int = 0

    @property
    def images(self) -> int:
        """Number of images in all tars."""
        return sum(self.rows.values())


def look_at_data(config: ExtractConfig, cache: Cache | None, images: int) -> DataFacts:
    """Rows of every tar (from the cache where it knows the tar) and a sample of `images`."""
    paths = list(config.data)
    if len(paths) == 1 and is_image_folder(Path(paths[0])):
        packed = Path(config.cache) / "images"
        if not (packed / RECORD).exists():
            return _unpacked(Path(paths[0]), images)
        paths = [str(packed)]
    tars = expand(paths)
    spread = set(tars[:: math.ceil(len(tars) / SAMPLED_TARS)])
    rows, indices = {}, []
    for path in counted(tars, "look at tars"):
        stem = path.name.removesuffix(".tar")
        known = cache.tar(stem) if cache and cache.layout.tar(stem).exists() else None
        if known and known.bytes == path.stat().st_size and path not in spread:
            rows[stem] = known.rows
        else:
            index = index_tar(path)
            rows[stem] = known.rows if known else len(index.samples)
            indices += [index] if path in spread else []
    return DataFacts(rows, _sample(indices, images))


def _sample(indices: Iterable[TarIndex], images: int) -> list[Source]:
    """About `images` images, evenly spread over the tars."""
    indices = list(indices)
    each = math.ceil(images / len(indices))
    return [
        Source(index.stem, sample.ordinal, sample.key, partial(_bytes, index, sample))
        for index in indices
        for sample in index.samples[:: max(1, len(index.samples) // each)][:each]
    ]


def _bytes(index: TarIndex, sample: Sample) -> bytes:
    return index.read(sample, image_extension(sample))


def _unpacked(folder: Path, images: int) -> DataFacts:
    """An ImageFolder that the run would pack first, in tars of 1,000."""
    _, pictures = list_pictures(folder)
    count = len(pictures)
    rows = {
        f"{number:06d}": min(PACKED_TAR, count - number * PACKED_TAR)
        for number in range(math.ceil(count / PACKED_TAR))
    }
    chosen = pictures[:: max(1, count // images)][:images]
    return DataFacts(
        rows,
        [Source("000000", i, p.key, p.path.read_bytes) for i, p in enumerate(chosen)],
        # Every member has a header of 512 bytes and is padded to a multiple of that.
        sum(512 + -(-size // 512) * 512 for p in pictures for size in p.members.values()),
    )
