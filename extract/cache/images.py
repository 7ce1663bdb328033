"""Image tars by byte index, and the one way in which pictures become pixels.

A tar in the WebDataset layout is indexed once (`index_tar`): where each member lies, which members
make a sample, and that the archive is whole. After that a sample is one `pread`, in any order, from
any thread or process. Nothing in a tar is ever unpickled, executed or used as a path.

Both stages decode by Pillow (`DECODER`): other decoders differ by a few levels. The rules are those
of torchvision's `ImageFolder`: `convert("RGB")` drops alpha, EXIF orientation is not applied,
an animation gives its first frame. What cannot be shown in 8 bits is refused.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from extract.cache.errors import ImageError

DECODER = "pillow-rgb"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")
# Above this Pillow only warns; 12 kB of PNG can ask for 300 MB.
MAX_PIXELS = 89_478_485

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
_RGB_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_MASK_MODES = frozenset({"L", "P", "I", "I;16", "I;16B"})
_METADATA = re.compile(r"__[^/]*__($|/)")  # WebDataset's own rule
_BLOCK = 512


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
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            samples = _group(path, _members(path, archive))
            end = archive.offset
    except tarfile.TarError as error:
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
    return TarIndex(path, path.name.removesuffix(".tar"), size, tuple(samples))


def _members(path: Path, archive: tarfile.TarFile) -> Iterator[tuple[str, str, Member]]:
    """Yield (key, extension, member) of every file that belongs to a sample."""
    for info in archive:
        name = info.name
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            raise ImageError(
                f"{path}: {name} is a link, a device or a sparse file; pack plain files only"
            )
        if name.startswith("/") or ".." in PurePosixPath(name).parts or not _is_utf8(name):
            raise ImageError(
                f"{path}: member {name!r} has an absolute, climbing or non-UTF-8 name; rename it"
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


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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


def decode(data: bytes, where: str) -> Tensor:
    """Decode a picture to RGB.

    Args:
        data: the bytes of the file.
        where: what messages call it, such as `000000.tar: n01/img_7.jpg`.

    Returns:
        `[3, H, W]` uint8; its strides are those of interleaved pixels.

    Raises:
        ImageError: no picture, cut, damaged, more than `MAX_PIXELS`, or not 8 bits a channel.
    """
    pixels_HWC = _pixels(data, where, _RGB_MODES, "8-bit grey, palette, RGB or CMYK", rgb=True)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def decode_mask(data: bytes, where: str) -> Tensor:
    """Decode a label map: grey or palette indices, as stored.

    Args:
        data: the bytes of the file, a PNG as a rule.
        where: what messages call it.

    Returns:
        `[H, W]` int64.

    Raises:
        ImageError: as `decode`; also colours, and grey of fewer than 8 bits, which Pillow scales.
    """
    # Bit depth and colour type of a PNG: its header is at a fixed place.
    if data.startswith(b"\x89PNG") and len(data) > 25 and data[24] < 8 and data[25] == 0:
        raise ImageError(f"{where}: a grey mask of {data[24]} bits; store indices in 8 or 16 bits")
    expected = "indices in 8-bit grey, 16-bit grey or a palette"
    indices_HW = _pixels(data, where, _MASK_MODES, expected, rgb=False)
    return torch.from_numpy(indices_HW.astype(np.int64))


def _pixels(
    data: bytes, where: str, modes: frozenset[str], expected: str, rgb: bool
) -> np.ndarray[Any, np.dtype[Any]]:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            f"{where}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so damaged images would pass for "
            f"whole ones; turn it off"
        )
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_header(image, where, modes, expected)
            image.load()
            # A transparent colour plays no part in RGB, and Pillow would warn about it.
            image.info.pop("transparency", None)
            return np.array(image.convert("RGB") if rgb else image)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            f"{where}: more than {MAX_PIXELS} pixels; leave it out or scale it"
        ) from None
    # Damaged bytes make Pillow's parsers fail in nearly every way that Python knows.
    except Exception as error:
        raise ImageError(
            f"{where}: cannot be decoded ({error}); remove or replace the file"
        ) from error


def _check_header(image: Image.Image, where: str, modes: frozenset[str], expected: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{where}: {image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded; "
            f"leave it out or scale it"
        )
    if image.mode not in modes:
        raise ImageError(
            f"{where}: pixels of mode {image.mode}, expected {expected}; convert the file"
        )


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
    return any(is_image_file(name) for _, _, names in os.walk(path) for name in names)
