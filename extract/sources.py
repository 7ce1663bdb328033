"""The image tars of a run: local files, or objects at URLs, fetched while they are needed."""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from webdataset.shardlists import expand_urls

from extract.cache.errors import ImageError
from extract.cache.images import expand, is_image_folder
from extract.cache.reader import Cache
from extract.cache.remote import Bucket, RemoteError, fetch_url, is_url
from extract.packing import pack_image_folder


@dataclass(frozen=True)
class TarFile:
    """One image tar; `location` is its path or URL."""

    location: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.location.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without `.tar`: the tar's identity in a cache."""
        return self.name.removesuffix(".tar")

    @property
    def remote(self) -> bool:
        """Whether it is at a URL."""
        return is_url(self.location)

    def size(self) -> int | None:
        """Length in bytes; None where the server does not say. Raises `RemoteError`."""
        if not self.remote:
            return Path(self.location).stat().st_size
        if self.location.startswith("hf://"):
            return None
        parent, _, name = self.location.rpartition("/")
        try:
            return Bucket(parent).size(name)
        except FileNotFoundError:
            raise RemoteError(
                f"there is nothing at {self.location}: check the address given for the data"
            ) from None

    @contextmanager
    def local(self, folder: Path) -> Iterator[Path]:
        """The tar as a file; what is remote is fetched into `folder`, and removed afterwards."""
        if not self.remote:
            yield Path(self.location)
            return
        target = folder / self.name
        fetch_url(self.location, target)
        try:
            yield target
        finally:
            target.unlink(missing_ok=True)

    def seen_from(self, cache: Cache) -> str:
        """The location to write into a cache: relative to it, unless one of both is at a URL."""
        if self.remote:
            return self.location
        if cache.mirror is not None:
            return os.path.abspath(self.location)
        return os.path.relpath(self.location, cache.root)


def find_tars(data: Sequence[str], cache: Cache, seed: int) -> list[TarFile]:
    """The image tars that `data` names; an ImageFolder is packed into `<cache>/images` first.

    Raises `UserError` when nothing is there, or two tars have the same name.
    """
    if len(data) == 1 and not is_url(data[0]) and is_image_folder(Path(data[0])):
        if cache.mirror is not None:
            raise ImageError(
                f"{data[0]} is a folder of images, and the cache is at {cache.location}: pack the "
                "images into tars first (any unic-extract into a local --cache does, see images/ "
                "there), put them where all readers reach them, and give those with --data"
            )
        paths = pack_image_folder(Path(data[0]), cache.root / "images", seed)
        return [TarFile(str(path)) for path in paths]
    tars = [TarFile(place) for pattern in data for place in _places(pattern)]
    known: dict[str, str] = {}
    for tar in tars:
        if known.setdefault(tar.stem, tar.location) != tar.location:
            raise ImageError(
                f"{known[tar.stem]} and {tar.location} have the same name; a tar is known by its "
                "name, so every tar needs its own"
            )
    return list(dict.fromkeys(tars))


def _places(pattern: str) -> list[str]:
    if not is_url(pattern):
        return [str(path) for path in expand([pattern])]
    try:
        urls = list(expand_urls(pattern)) if "{" in pattern else [pattern]
    except ValueError as error:
        raise ImageError(f"{pattern!r} cannot be expanded: {error}") from None
    return [url for each in urls for url in (_listed(each) if "*" in each else [each])]


def _listed(pattern: str) -> list[str]:
    """Objects of a bucket whose names match; raises `RemoteError` when there are none."""
    parent, _, name = pattern.rpartition("/")
    found = [n for n in Bucket(parent).names() if fnmatch.fnmatchcase(n, name)]
    if not found:
        raise RemoteError(f"{pattern} matches no object; check the address given for the data")
    return sorted(f"{parent}/{item}" for item in found)
