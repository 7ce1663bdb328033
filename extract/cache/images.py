"""Image tars by byte index: which samples a tar holds, and where their bytes lie.

A tar in the WebDataset layout is indexed once (`index_tar`): where each member lies, which members
make a sample, and that the archive is whole. After that a sample is one `pread`, in any order, from
any thread or process. Nothing in a tar is ever unpickled, executed or used as a path.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from webdataset.tariterators import base_plus_ext

from extract.cache.decoding import DECODER, IMAGE_EXTENSIONS, MAX_PIXELS, decode, decode_mask
from extract.cache.errors import ImageError
from extract.cache.patterns import expand, is_image_file, is_image_folder

__all__ = [
    "DECODER",
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "Member",
    "Sample",
    "TarIndex",
    "decode",
    "decode_mask",
    "expand",
    "image_extension",
    "index_tar",
    "is_image_file",
    "is_image_folder",
    "key_id",
    "keys_digest",
    "tar_sha256",
]

_METADATA = re.compile(r"__[^/]*__($|/)")  # WebDataset's own rule
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BLOCK = 512
# Besides its own errors, tarfile lets through whatever a damaged number or a chain of headers does.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError)


@dataclass(frozen=True, slots=True)
class Member:
    """Where one file lies in its tar, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Adjacent members that share a key.

    Attributes:
        ordinal: position among the tar's samples, from 0.
        key: the name up to the first dot of its last part.
        members: by extension, in lower case and without the leading dot.
    """

    ordinal: int
    key: str
    members: dict[str, Member]


class _Descriptor:
    """An open file that closes with its owner."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        number = getattr(self, "number", None)
        if number is not None:
            os.close(number)


@dataclass(frozen=True)
class TarIndex:
    """The samples of one whole image tar, readable in any order.

    Safe to share between threads and across a fork (reads carry their own offset), and to pickle
    (the open file stays behind).

    Attributes:
        path: where the tar is.
        stem: its name without `.tar`: its identity in a cache.
        size: its length in bytes.
        samples: in the order of the tar.
    """

    path: Path
    stem: str
    size: int
    samples: tuple[Sample, ...]
    _open: dict[str, _Descriptor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, sample: Sample, ext: str) -> bytes:
        """Return the bytes of one member.

        Raises:
            ImageError: there is no such member, or the tar has changed since it was indexed.
        """
        where = f"{self.path}: {sample.key}"
        member = sample.members.get(ext)
        if member is None:
            found = ", ".join(sorted(sample.members))
            raise ImageError(f"{where} has no member .{ext}; found {found}")
        parts, offset, left = [], member.offset, member.size
        while left:
            part = os.pread(self._descriptor().number, left, offset)
            if not part:
                raise ImageError(f"{where}.{ext} ends early: the tar was cut after it was indexed")
            parts.append(part)
            offset, left = offset + len(part), left - len(part)
        return b"".join(parts)

    def _descriptor(self) -> _Descriptor:
        descriptor = self._open.get("file")
        if descriptor is None:
            try:
                descriptor = _Descriptor(self.path)
            except OSError as error:
                raise ImageError(f"{self.path} cannot be opened: {error.strerror}") from None
            size = os.fstat(descriptor.number).st_size
            if size != self.size:
                raise ImageError(
                    f"{self.path} has {size} bytes, {self.size} when it was indexed; restore it"
                )
            # Of two threads that open at once, one wins; the other's file closes itself.
            descriptor = self._open.setdefault("file", descriptor)
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def index_tar(path: str | Path) -> TarIndex:
    """Index an uncompressed image tar and prove that it is whole.

    Keys follow WebDataset: the member's name up to the first dot of its last part; what follows is
    the extension, in lower case. Members without an extension, hidden files (.name) and
    `__metadata__` are no samples' and are passed over, as are folders.

    Raises:
        ImageError: not a tar, cut, or its samples are not what they should be: an image each,
            adjacent members, every key once, plain files with relative names.
    """
    path = Path(path)
    stem = path.name.removesuffix(".tar")
    if not stem or not _is_plain(stem):
        raise ImageError(
            f"{str(path)!r} cannot name a tar in a cache: rename it to letters and digits before "
            f".tar, in UTF-8"
        )
    try:
        size = path.stat().st_size
        # Names are bytes; without this they would be read in the encoding of the user's locale.
        with tarfile.open(path, "r:", encoding="utf-8") as archive:
            samples = _group(path, _members(path, archive))
            end = archive.offset
    except _DAMAGE as error:
        raise ImageError(
            f"{path} is not a whole, uncompressed tar ({error}); fetch or pack it again"
        ) from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from None
    _check_end(path, end)
    if not samples:
        raise ImageError(f"{path} holds no samples: expected members such as 000017.jpg")
    for sample in samples:
        _check_sample(path, sample)
    return TarIndex(path, stem, size, tuple(samples))


def _members(path: Path, archive: tarfile.TarFile) -> Iterator[tuple[str, str, Member]]:
    """Yield (key, extension, member) of every file that belongs to a sample."""
    for info in archive:
        name = info.name
        if info.size < 0:
            # tarfile would go back by so much, for ever.
            raise ImageError(f"{path}: {name!r} has {info.size} bytes; the tar is damaged there")
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise ImageError(
                f"{path}: {name!r} is a link, a device or a sparse file; pack plain files only"
            )
        if name.startswith("/") or ".." in PurePosixPath(name).parts or not _is_plain(name):
            raise ImageError(
                f"{path}: member {name!r} has an absolute, climbing or non-UTF-8 name, or one with "
                f"control characters; rename it"
            )
        # Without the first, "a/._x.jpg", which macOS leaves behind, would be a sample of key "a/".
        if name.rpartition("/")[2].startswith(".") or _METADATA.match(name):
            continue
        key, extension = base_plus_ext(name)
        if key is not None:
            yield key, extension.lower(), Member(info.offset_data, info.size)


def _group(path: Path, members: Iterable[tuple[str, str, Member]]) -> list[Sample]:
    by_key: dict[str, Sample] = {}
    last = None
    for key, extension, member in members:
        sample = by_key.get(key)
        if sample is None:
            sample = by_key[key] = Sample(len(by_key), key, {})
        elif extension in sample.members:
            raise ImageError(
                f"{path}: {key}.{extension} is there twice; every key must be unique in its tar"
            )
        elif key != last:
            raise ImageError(
                f"{path}: the members of {key} are not adjacent (.{extension} comes later); "
                f"pack the tar again, sorted by name"
            )
        sample.members[extension] = member
        last = key
    return list(by_key.values())


def _check_end(path: Path, end: int) -> None:
    """Require the end-of-archive marker: tarfile takes a cut between members for the end."""
    with open(path, "rb") as file:
        file.seek(end)
        marker = file.read(2 * _BLOCK)
        if len(marker) < 2 * _BLOCK or any(marker):
            raise ImageError(
                f"{path} has no end-of-archive marker at byte {end}: it is cut off or damaged "
                f"there; fetch or pack it again"
            )
        while rest := file.read(1 << 20):
            if any(rest):
                raise ImageError(
                    f"{path} has data after its end-of-archive marker, as two tars joined by cat "
                    f"have; pack it again as one tar"
                )


def _check_sample(path: Path, sample: Sample) -> None:
    images = [extension for extension in sample.members if extension in IMAGE_EXTENSIONS]
    if len(images) == 1:
        return
    found = ", ".join(f".{extension}" for extension in sample.members)
    remedy = (
        "a key ends at the first dot, so rename files with dots in their names"
        if any("." in extension for extension in sample.members)
        else "every sample needs one; remove it or pack the tar again"
        if not images
        else "keep one; masks are named .seg.png"
    )
    raise ImageError(
        f"{path}: {sample.key} has {len(images)} images, expected 1 (found {found}): {remedy}"
    )


def _is_plain(name: str) -> bool:
    """Tell whether a name is UTF-8 without control characters, which could steer a terminal."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return not _CONTROL.search(name)


def image_extension(sample: Sample) -> str:
    """Return the extension of the sample's image, such as `jpg`."""
    return next(extension for extension in sample.members if extension in IMAGE_EXTENSIONS)


def tar_sha256(path: str | Path) -> str:
    """Return the SHA-256 of the file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_id(key: str) -> np.uint64:
    """Return the first 8 bytes (little-endian) of the SHA-256 of the key's UTF-8."""
    return np.uint64(int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "little"))


def keys_digest(keys: Iterable[str]) -> str:
    """Return the SHA-256, in hexadecimal, of the keys in their order."""
    digest = hashlib.sha256()
    for key in keys:
        text = key.encode("utf-8")
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
