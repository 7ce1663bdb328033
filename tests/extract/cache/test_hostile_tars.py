"""Tars made to harm, or damaged at random: refused by name or read for what they are, no more."""

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, write_tar
from crc32c import crc32c

from extract.cache import Cache, CacheError
from extract.cache.errors import ImageError, UserError
from extract.cache.images import image_extension, index_tar, key_id, keys_digest, tar_sha256
from extract.cache.schema import CacheRecord, Layout, TarRecord
from extract.cache.sealed import publish, read_sealed
from extract.cache.staging import Staging
from extract.cache.tars import TarSource
from extract.cache.views import draw_view, parse_recipe

REPOSITORY = Path(__file__).parents[3]
DAMAGES = int(os.environ.get("TAR_DAMAGES", "800"))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A tar that is read for ever fails its test."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tar_of(path: Path, *names: str, **header: object) -> Path:
    with tarfile.open(path, "w", format=header.pop("format", tarfile.PAX_FORMAT)) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 100
            for field, value in header.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(bytes([len(name)]) * 100))
    return path


def patched(path: Path, *changes: tuple[int, int, bytes]) -> Path:
    """The tar with bytes of the header in block `n` at `offset` changed, and its sum corrected."""
    content = bytearray(path.read_bytes())
    for block, offset, data in changes:
        start = 512 * block
        content[start + offset : start + offset + len(data)] = data
        header = content[start : start + 512]
        header[148:156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(content)
    return path


def negative(value: int) -> bytes:
    """A number of 12 bytes in the base-256 notation of GNU tar."""
    return (256**12 + value).to_bytes(12, "big")


def test_a_member_of_negative_size_does_not_go_in_circles(tmp_path: Path) -> None:
    path = patched(tar_of(tmp_path / "t.tar", "a.jpg", "b.jpg"), (2, 124, negative(-1024)))
    with within(10), pytest.raises(ImageError, match=r"t\.tar: 'b.jpg' has -1024 bytes"):
        index_tar(path)


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S"])
@pytest.mark.parametrize("size", [2**40, 2**62, 2**90, -512, -(2**62)])
def test_senseless_sizes_are_refused(tmp_path: Path, kind: bytes, size: int) -> None:
    number = negative(size) if size < 0 else (128 * 256**11 + size).to_bytes(12, "big")
    path = tar_of(tmp_path / "t.tar", "a.jpg", "b.jpg", "c.jpg")
    patched(path, (2, 156, kind), (2, 124, number))
    with within(10), pytest.raises(ImageError, match=r"t\.tar"):
        index_tar(path)


def test_a_long_chain_of_extended_headers_is_refused(tmp_path: Path) -> None:
    body = b"13 comment=x\n".ljust(512, b"\0")
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XGLTYPE, 13
    chain = (info.tobuf(tarfile.USTAR_FORMAT) + body) * 3000
    path = tar_of(tmp_path / "t.tar", "a.jpg")
    path.write_bytes(chain + path.read_bytes())
    with within(20), pytest.raises(ImageError, match=r"t\.tar"):
        index_tar(path)


def test_damage_at_random_is_an_error_of_ours_or_harmless(tmp_path: Path) -> None:
    """Bytes of headers changed, most with corrected sums: nothing but `ImageError` comes out."""
    names = [f"{'d' * 60}/é{'k' * 60}{i}.{ext}" for i in range(3) for ext in ("jpg", "cls")]
    wholes = [
        tar_of(tmp_path / f"{kind}.tar", *names, format=kind).read_bytes()
        for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    ]
    chance, path, refused = random.Random(0), tmp_path / "t.tar", 0
    for _ in range(DAMAGES):
        path.write_bytes(chance.choice(wholes))
        for _ in range(chance.choice([1, 1, 2, 4])):
            block = chance.randrange(18)
            offset = chance.choice([chance.randrange(512), 124 + chance.randrange(12), 156])
            value = chance.choice([0, 128, 255, chance.randrange(256), *b"xgLS27"])
            if chance.random() < 0.8:
                patched(path, (block, offset, bytes([value])))
        with within(10):
            try:
                index = index_tar(path)
                for sample in index.samples:
                    index.read(sample, image_extension(sample))
            except ImageError:
                refused += 1
    assert 0 < refused < DAMAGES


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Q"],
    ids=["symlink", "hardlink", "character device", "block device", "pipe", "unknown"],
)
def test_what_is_no_plain_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    path = tar_of(tmp_path / "t.tar", "a.jpg", type=kind, linkname="/etc/passwd", size=0)
    with pytest.raises(ImageError, match=r"t\.tar: 'a.jpg' is a link, a device"):
        index_tar(path)


def test_a_folder_in_the_name_of_a_picture_is_none(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no samples"):
        index_tar(tar_of(tmp_path / "t.tar", "a.jpg", type=tarfile.DIRTYPE, size=0))


@pytest.mark.parametrize(
    "name",
    [
        "../a.jpg",
        "x/../../a.jpg",
        "/etc/a.jpg",
        "//a.jpg",
        "a\x1b[2Jb.jpg",
        "a\nb.jpg",
        "a\x9b.jpg",
    ],
)
def test_names_that_lead_outside_or_steer_a_terminal_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="absolute, climbing or non-UTF-8 name") as error:
        index_tar(tar_of(tmp_path / "t.tar", "ok.jpg", name))
    assert str(error.value).isprintable()


STRANGE = [
    "a b", "*?[x]", "$(touch hacked)", "`id`", "; rm -rf x", "-rf", "C:\\x", "~root/x",
    "con", "x" * 90, "/".join("d" * 40), "{000,003}", "%s%n", "😀", "İı", "‮txt", "a'b\"c", "..x/y",
    "A", "a", unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"), "\u00a0",
]  # fmt: skip


def test_strange_names_are_keys_as_they_are_in_the_order_of_the_tar(tmp_path: Path) -> None:
    index = index_tar(tar_of(tmp_path / "t.tar", *(f"{name}.jpg" for name in STRANGE)))
    assert [sample.key for sample in index.samples] == STRANGE
    assert len({int(key_id(sample.key)) for sample in index.samples}) == len(STRANGE)
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"]
    recipe = parse_recipe("unic@32")
    drawn = {draw_view(recipe, 0, "t", 0, key, 0, 500, 500)["hue"].tobytes() for key in STRANGE}
    assert len(drawn) == len(STRANGE)


@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "tr_TR.UTF-8"}],
    ids=["ASCII", "Turkish, if it is installed"],
)
def test_keys_do_not_depend_on_the_locale(tmp_path: Path, locale: dict[str, str]) -> None:
    names = [f"{name}.JPG" for name in STRANGE]
    pax = tar_of(tmp_path / "p.tar", *names)
    gnu = tar_of(tmp_path / "g.tar", *names, format=tarfile.GNU_FORMAT)
    code = (
        "import sys; from extract.cache.images import *\n"
        "for index in map(index_tar, sys.argv[1:]):\n"
        "    extensions = {image_extension(sample) for sample in index.samples}\n"
        "    print(keys_digest(sample.key for sample in index.samples), extensions)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(pax), str(gnu)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **locale},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [f"{keys_digest(STRANGE)} {{'jpg'}}"] * 2, done.stderr


@pytest.mark.parametrize("name", ["a\n.tar", "\x1b[31m.tar", ".tar", os.fsdecode(b"\xff\xfe.tar")])
def test_tars_whose_own_name_cannot_be_an_identity_are_refused(tmp_path: Path, name: str) -> None:
    path = tar_of(tmp_path / "t.tar", "a.jpg").rename(tmp_path / name)
    with pytest.raises(ImageError, match="cannot name a tar") as error:
        index_tar(path)
    assert str(error.value).isprintable()


# --- a tar that was rewritten after extraction ---


@pytest.fixture
def source(tmp_path: Path) -> TarSource:
    """A cache that knows one tar of three pictures, beside which it lies."""
    path = write_tar(tmp_path / "t.tar", 3)
    index, layout = index_tar(path), Layout(tmp_path / "feats")
    record = {
        **{"stem": "t", "locations": ["../t.tar"], "bytes": index.size, "rows": 3},
        **{"sha256": tar_sha256(path), "keys_digest": keys_digest(s.key for s in index.samples)},
    }
    with Staging(layout.root) as staging:
        CacheRecord(0, 0, "pillow-rgb").write(layout.cache, staging.folder)
        TarRecord(**record).write(layout.tar("t"), staging.folder)
    return TarSource(Cache(layout.root), ["t"], {})


def test_every_flipped_bit_of_a_picture_is_found_by_its_checksum(
    source: TarSource, tmp_path: Path
) -> None:
    """A JPEG with a flipped bit decodes to other pixels, without an error as a rule."""
    path = tmp_path / "t.tar"
    index = source.index("t")
    sample = index.samples[1]
    checksum = crc32c(index.read(sample, "jpg"))
    key, member, whole = key_id(sample.key), sample.members["jpg"], path.read_bytes()
    intact = source.image("t", 1, key, checksum)
    assert intact.equal(source.image("t", 1, key))
    silent, chance = 0, random.Random(0)
    for _ in range(60):
        content = bytearray(whole)
        content[member.offset + chance.randrange(member.size)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CacheError, match=rf"t\.tar: the bytes of image 1 \({sample.key!r}\)"):
            source.image("t", 1, key, checksum)
        with suppress(UserError):
            silent += not source.image("t", 1, key).equal(intact)
    # Without the checksum, most would have been other pixels under the same name.
    assert silent > 20
    path.write_bytes(whole)
    source.image("t", 1, key, checksum)


def test_another_picture_of_the_same_size_is_found_by_its_checksum(
    source: TarSource, tmp_path: Path
) -> None:
    index = source.index("t")
    sample, content = index.samples[0], bytearray((tmp_path / "t.tar").read_bytes())
    checksum = crc32c(index.read(sample, "jpg"))
    member = sample.members["jpg"]
    other = encoded(np.zeros((20, 20, 3), np.uint8), "JPEG")
    content[member.offset : member.offset + member.size] = other.ljust(member.size, b"\0")
    (tmp_path / "t.tar").write_bytes(content)
    source.image("t", 0, key_id(sample.key))
    with pytest.raises(CacheError, match="are not those that the features were computed from"):
        source.image("t", 0, key_id(sample.key), checksum)


# --- JSON ---


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1e999}', b"{}"],
    ids=["empty", "zeros", "list", "null", "cut", "no text", "deep", "infinite", "no seal"],
)
def test_what_is_no_sealed_json_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"x\.json"):
        read_sealed(tmp_path / "x.json")


def test_a_sealed_file_that_is_torn_at_any_byte_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with Staging(tmp_path / "feats") as staging:
        publish(path, {"rows": 30, "tar": "é", "mean": [0.5, -1e-05]}, staging.folder)
    whole = path.read_bytes()
    # But for the newline at its end, which says nothing.
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheError, match=r"x\.json"):
            read_sealed(path)
        path.write_bytes(whole[:length] + bytes(len(whole) - length))
        with pytest.raises(CacheError, match=r"x\.json"):
            read_sealed(path)
