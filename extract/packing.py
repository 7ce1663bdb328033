"""Pack a folder of images into image tars, so that everything after works on one kind of input.

    folder/class/picture.jpg  ->  out/000000.tar: class/picture.jpg, class/picture.cls, ...

The original bytes are kept. The order is shuffled by the seed: training reads whole chunks of
neighbours, and neighbours of one class would make one-sided batches. The same folder and seed give
the same tars to the byte; `packed.json`, written last, says what was packed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import find_classes, make_dataset
from webdataset.writer import TarWriter

from extract.cache.errors import ImageError
from extract.cache.images import TarIndex, index_tar, is_image_file, tar_sha256
from extract.cache.randomness import permutation
from extract.cache.sealed import publish, read_sealed, sync_folder
from extract.cache.staging import naming_full_disk

RECORD = "packed.json"

# A tar header holds 100 bytes of the name's last part, of which the extension takes a few.
_MAX_NAME = 80


@dataclass(frozen=True)
class Picture:
    """One image file to be packed.

    Attributes:
        path: where it is.
        name: its path within the folder, with `/`.
        key: its key in the tar.
        size: its length in bytes.
        label: index of its class; None in a folder without classes.
    """

    path: Path
    name: str
    key: str
    size: int
    label: int | None

    @property
    def extension(self) -> str:
        """The extension in lower case, without the dot."""
        return self.name.rpartition(".")[2].lower()

    @property
    def members(self) -> dict[str, int]:
        """Sizes in bytes of its members in the tar, by extension."""
        return {name: len(data) for name, data in self._label_member().items()} | {
            self.extension: self.size
        }

    def sample(self) -> dict[str, Any]:
        """Read the file; return what `TarWriter` writes."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise ImageError(f"{self.path} cannot be read: {error.strerror}; remove it") from None
        if len(data) != self.size:
            raise ImageError(f"{self.path} changed while it was packed; run the command again")
        return {"__key__": self.key, self.extension: data} | self._label_member()

    def _label_member(self) -> dict[str, bytes]:
        return {} if self.label is None else {"cls": str(self.label).encode("ascii")}


def pack_image_folder(
    folder: str | Path,
    out: str | Path,
    seed: int,
    samples_per_tar: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Pack a folder of images into `out/000000.tar` and so on, or find them packed already.

    The folder is laid out as for torchvision's `ImageFolder` (a folder a class, classes numbered in
    sorted order, the number stored as `.cls`), or holds images alone. Complete tars of an
    interrupted run are kept. A file is known by its name and size: one that was edited without
    changing either is not noticed.

    Args:
        folder: the images.
        out: folder for the tars; it is made.
        seed: seed of the shuffle.
        samples_per_tar: images in each tar but the last.
        progress: called with (images packed, images in all) after every tar.

    Returns:
        The tars in their order.

    Raises:
        ImageError: no images, one that is empty or cannot be read, or `out` holds tars of other
            images, another seed or another size.
        CacheError: the disk is full.
    """
    if samples_per_tar < 1:
        raise ImageError(f"samples_per_tar is {samples_per_tar}; expected at least 1")
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    classes, pictures = list_pictures(folder)
    plan = {
        "kind": "packed images",
        "seed": seed,
        "samples_per_tar": samples_per_tar,
        "classes": classes,
        "images": len(pictures),
        "sources_sha256": _listing_sha256(pictures),
    }
    order = permutation(seed, "packing", n=len(pictures)).tolist()
    shuffled = [pictures[index] for index in order]
    parts = [
        shuffled[start : start + samples_per_tar]
        for start in range(0, len(shuffled), samples_per_tar)
    ]
    tars = [out / f"{number:06d}.tar" for number in range(len(parts))]
    with naming_full_disk(out), _locked(out) as aside:
        if (out / RECORD).exists():
            _check_record(out, plan, tars)
        else:
            _write_tars(out, tars, parts, aside, progress)
            record = [
                {"name": tar.name, "size": tar.stat().st_size, "sha256": tar_sha256(tar)}
                for tar in tars
            ]
            publish(out / RECORD, plan | {"tars": record}, aside)
    return tars


def list_pictures(folder: Path) -> tuple[list[str], list[Picture]]:
    """List a folder of images: the sorted names of its classes, and the images in sorted order.

    Returns:
        No classes, and images without labels, where the images lie in `folder` itself.

    Raises:
        ImageError: no folder, no images, a class without images, images beside class folders, or
            an image that is empty or cannot be read.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder; expected one of images or of class folders")
    beside = sorted(str(item) for item in folder.iterdir() if is_image_file(item.name))
    classes = _classes(folder)
    found: list[tuple[str, int]] = []
    if classes:
        _check_loops(folder)
        indices = {name: index for index, name in enumerate(classes)}
        found = make_dataset(folder, indices, is_valid_file=is_image_file, allow_empty=True)
    if found and beside:
        raise ImageError(
            f"{folder} holds both class folders and {len(beside)} images beside them, such as "
            f"{Path(beside[0]).name}; move those into a class folder"
        )
    if not found and not beside:
        raise ImageError(
            f"{folder} holds no images (.jpg, .png, .webp, ...), neither directly nor in class "
            f"folders"
        )
    if not found:
        return [], _name_pictures(folder, [(path, None) for path in beside])
    empty = [classes[index] for index in sorted(set(range(len(classes))) - {c for _, c in found})]
    if empty:
        raise ImageError(
            f"{folder}: no images in the class folders {', '.join(empty[:5])}; remove or fill them"
        )
    return classes, _name_pictures(folder, found)


def _check_loops(folder: Path) -> None:
    """Refuse links that lead back to where they are: every picture would be there 40 times."""
    for parent, folders, _ in os.walk(folder, followlinks=True):
        for path in (Path(parent, name) for name in folders):
            above = path.parents[: len(path.parents) - len(folder.parents)]
            if path.is_symlink() and path.resolve() in {item.resolve() for item in above}:
                raise ImageError(f"{path} is a link to a folder that it lies in; remove it")


def _classes(folder: Path) -> list[str]:
    try:
        return [name for name in find_classes(folder)[0] if not name.startswith(".")]
    except FileNotFoundError:
        return []


def _name_pictures(folder: Path, found: Sequence[tuple[str, int | None]]) -> list[Picture]:
    pictures: list[Picture] = []
    taken: dict[str, int] = {}
    for path, label in found:
        name = Path(path).relative_to(folder).as_posix()
        key = _unique(_sanitise(name, label is not None), taken)
        pictures.append(Picture(Path(path), name, key, _size(Path(path)), label))
    return pictures


def _size(path: Path) -> int:
    """Length in bytes; what is empty, or a link to nothing, would stop the extraction later."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}; remove it") from None
    if not size:
        raise ImageError(f"{path} is an empty file; remove or replace it")
    return size


def _sanitise(name: str, has_class: bool) -> str:
    """Make a key of a relative path: the class, then the rest in one part, in plain letters.

    A dot would end the key early, and two files would become one sample.
    """
    stem = name.rpartition(".")[0]
    parts = stem.split("/", 1) if has_class else [stem]
    return "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", part)[:_MAX_NAME] for part in parts)


def _unique(key: str, taken: dict[str, int]) -> str:
    """Return `key`, or `key-1`, `key-2`, ... if it is taken; `taken` counts each key's takers."""
    candidate = key
    while candidate in taken:
        candidate = f"{key}-{taken[key]}"
        taken[key] += 1
    taken[candidate] = 1
    return candidate


def _listing_sha256(pictures: Sequence[Picture]) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        # A NUL ends the name: no path can hold one.
        digest.update(os.fsencode(picture.name) + f"\0{picture.size}\n".encode("ascii"))
    return digest.hexdigest()


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """Hold `out` against other packers; yield a folder for drafts that is gone afterwards."""
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        aside = out / ".partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(handle)


def _check_record(out: Path, plan: dict[str, Any], tars: Sequence[Path]) -> None:
    """Require that what was packed into `out` is what is asked for, and that it is still there."""
    record = read_sealed(out / RECORD)
    for name, expected in plan.items():
        if record.get(name) != expected:
            raise ImageError(
                f"{out} was packed from something else: {name} is {record.get(name)!r}, now "
                f"{expected!r}. Choose another output folder, or delete this one to pack again"
            )
    sizes = {tar["name"]: tar["size"] for tar in record["tars"]}
    for tar in tars:
        size = tar.stat().st_size if tar.exists() else None
        if size != sizes.get(tar.name):
            raise ImageError(
                f"{tar} is missing or damaged: {sizes.get(tar.name)} bytes were packed, found "
                f"{size}. Delete {out / RECORD} and {tar.name} to pack it again"
            )


def _write_tars(
    out: Path,
    tars: Sequence[Path],
    parts: Sequence[Sequence[Picture]],
    aside: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    foreign = sorted(path.name for path in out.glob("*.tar") if path not in tars)
    if foreign:
        raise ImageError(f"{out} holds other tars ({foreign[0]}); choose an empty output folder")
    done, total = 0, sum(map(len, parts))
    for tar, pictures in zip(tars, parts, strict=True):
        if not tar.exists():
            _write_tar(tar, pictures, aside / tar.name)
        elif not _holds(index_tar(tar), pictures):
            raise ImageError(
                f"{tar} was packed from other images or with another seed; delete it, or choose "
                f"an empty output folder"
            )
        done += len(pictures)
        if progress is not None:
            progress(done, total)


def _write_tar(tar: Path, pictures: Sequence[Picture], draft: Path) -> None:
    with draft.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for picture in pictures:
                writer.write(picture.sample())
        file.flush()
        os.fsync(file.fileno())
    draft.rename(tar)
    sync_folder(tar.parent)


def _holds(index: TarIndex, pictures: Sequence[Picture]) -> bool:
    """Tell whether a tar holds exactly these pictures, by key, extension and size."""
    found = [
        (sample.key, {name: member.size for name, member in sample.members.items()})
        for sample in index.samples
    ]
    return found == [(picture.key, picture.members) for picture in pictures]
