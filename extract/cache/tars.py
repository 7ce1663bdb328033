"""Finding the image tars of a cache again, and the images in them, by (tar, ordinal, key)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from crc32c import crc32c
from torch import Tensor

from extract.cache.errors import CacheError
from extract.cache.images import TarIndex, decode, image_extension, index_tar, key_id
from extract.cache.mirror import default_folder
from extract.cache.reader import Cache
from extract.cache.remote import fetch_url, is_url


class TarSource:
    """The chosen tars of a cache, each found and indexed when its first image is wanted.

    `moved` maps tar stems to paths where they no longer lie where the cache saw them.
    """

    def __init__(self, cache: Cache, stems: Sequence[str], moved: Mapping[str, Path]) -> None:
        self.cache = cache
        self.stems = tuple(stems)
        self.moved = dict(moved)
        self._indices: dict[str, TarIndex] = {}

    def path(self, stem: str) -> Path:
        """Where the tar is now: as given in `moved`, else at a location that the cache knows.

        Raises `CacheError` when it is nowhere, or has another size than at extraction.
        """
        record = self.cache.tar(stem)
        places = [self._place(location) for location in record.locations]
        candidates = [self.moved[stem]] if stem in self.moved else places
        for candidate in candidates:
            if candidate.exists():
                if candidate.stat().st_size != record.bytes:
                    raise CacheError(
                        f"{candidate} has {candidate.stat().st_size} bytes, at extraction it had "
                        f"{record.bytes}: it is not the tar that the features were computed from"
                    )
                return candidate
        raise CacheError(
            f"the image tar {stem!r} is at none of {', '.join(map(str, candidates))}: "
            "say where the tars are with --data"
        )

    def _place(self, location: str) -> Path:
        """Where a recorded location is on this machine; what is at a URL is fetched, once."""
        if not is_url(location):
            return self.cache.root / location
        parent, _, name = location.rpartition("/")
        target = default_folder(parent) / name
        if not target.exists():
            fetch_url(location, target)
        return target

    def index(self, stem: str) -> TarIndex:
        """The tar's index, made once."""
        if stem not in self._indices:
            self._indices[stem] = index_tar(self.path(stem))
        return self._indices[stem]

    def image(self, stem: str, ordinal: int, key: np.uint64, checksum: int | None = None) -> Tensor:
        """The image uint8 [3, H, W].

        Raises `CacheError` when another key stands at that place, or when `checksum` is given (the
        crc32c of the encoded bytes, as the cache stores it) and the bytes there are others.
        """
        index = self.index(stem)
        sample = index.samples[ordinal] if ordinal < len(index.samples) else None
        if sample is None or key_id(sample.key) != key:
            found = "nothing" if sample is None else repr(sample.key)
            raise CacheError(
                f"{index.path}: image {ordinal} is {found}, not the one that the features were "
                "computed from: the tar was rewritten since; extract again"
            )
        data = index.read(sample, image_extension(sample))
        if checksum is not None and crc32c(data) != checksum:
            raise CacheError(
                f"{index.path}: the bytes of image {ordinal} ({sample.key!r}) are not those that "
                "the features were computed from: the tar was damaged or rewritten since; restore "
                "it, or extract it again under another name"
            )
        return decode(data, f"{index.path.name}:{sample.key}")
