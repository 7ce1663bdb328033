"""Which files a user means: patterns of image tars, and folders of images."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from webdataset.shardlists import expand_urls

from extract.cache.decoding import IMAGE_EXTENSIONS
from extract.cache.errors import ImageError


def expand(patterns: Iterable[str]) -> list[Path]:
    """Return the tars that patterns name, in the order given.

    A pattern is a tar, a folder of tars, or a name with `*`, `?`, `[...]` or braces as in
    `tars-{000000..000003}.tar`; every name that braces make must exist. Globs and folders are
    sorted by name.

    Raises:
        ImageError: a pattern matches nothing, or two tars have the same stem.
    """
    tars: dict[str, Path] = {}
    for pattern in patterns:
        for path in _expand_one(pattern):
            stem = path.name.removesuffix(".tar")
            if stem in tars:
                raise ImageError(
                    f"{tars[stem]} and {path} have the same name; a tar is known by its name, "
                    f"so every tar needs its own"
                )
            tars[stem] = path
    return list(tars.values())


def _expand_one(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if pattern.startswith("pipe:") or "://" in pattern:
        raise ImageError(f"{pattern!r} is not a local path; copy or mount the tars first")
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(item for item in path.glob("*.tar") if not item.name.startswith("."))
        if not found:
            raise ImageError(f"the folder {path} holds no .tar files")
        return found
    try:
        names = expand_urls(str(path)) if "{" in pattern else [str(path)]
    except ValueError as error:
        raise ImageError(f"{pattern!r} cannot be expanded: {error}") from None
    return [tar for name in names for tar in _glob(name, pattern)]


def _glob(name: str, pattern: str) -> list[Path]:
    found = [Path(item) for item in sorted(glob.glob(name)) if Path(item).is_file()]
    if not found:
        of = "" if name == pattern else f", from {pattern!r},"
        raise ImageError(f"{name!r}{of} matches no file; check the path given for the data")
    return found


def is_image_file(name: str) -> bool:
    """Tell by its name whether a file is an image that `decode` may read; hidden ones are not."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return bool(stem and dot) and stem[0] != "." and extension.lower() in IMAGE_EXTENSIONS


def is_image_folder(path: str | Path) -> bool:
    """Tell whether a path is a folder of images, with or without class folders, and not of tars."""
    path = Path(path)
    if not path.is_dir() or any(path.glob("*.tar")):
        return False
    return any(is_image_file(name) for names in _files(path) for name in names)


def _files(folder: Path) -> Iterator[list[str]]:
    """Names of the files of each folder below `folder`, through links, each folder once."""
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        yield files
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in seen]
        seen |= set(real.values())
