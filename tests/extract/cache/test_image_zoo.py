"""Every kind of picture that tars hold becomes the RGB that is written here by hand, or is refused.

Pictures without loss are compared exactly, JPEGs of one colour within the rounding of their colour
transform. What each rule is, the names of the pictures say.
"""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image, ImageFile
from test_images import encoded as noise

import extract.run
from extract.cache import Cache, CachedViews, select
from extract.cache.decoding import MAX_PIXELS, decode, decode_mask
from extract.cache.errors import ImageError
from extract.cache.schema import VIEWS
from extract.cache.views import fingerprint
from extract.config import ExtractConfig

RED, GREEN, GREY = (255, 0, 0), (0, 255, 0), (128, 128, 128)
# One row of two pixels unless it says otherwise.
Pixels = list[list[tuple[int, int, int]]]
ROUNDING = 2


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.save(out, kind, **options)
    return out.getvalue()


def picture(mode: str, *values: Any, size: tuple[int, int] = (2, 1)) -> Image.Image:
    image = Image.new(mode, size)
    image.putdata(list(values))
    return image


def flat(colour: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (16, 8), colour)


def palette(*colours: tuple[int, int, int]) -> Image.Image:
    image = picture("P", *range(len(colours)), size=(len(colours), 1))
    image.putpalette([level for colour in colours for level in colour])
    return image


def png(width: int, depth: int, colour: int, row: bytes, *chunks: bytes) -> bytes:
    """A PNG of one row, of any bit depth, which Pillow itself does not write."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [b"IHDR" + header, *chunks, b"IDAT" + zlib.compress(b"\0" + row), b"IEND"]
    framed = (struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def turned(orientation: int) -> bytes:
    """A JPEG, left half red and right half green, with an EXIF orientation."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(GREEN, (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "JPEG", quality=100, subsampling=0, exif=exif)


FRAMES = [flat(RED), flat(GREEN)]
ANIMATED = {"save_all": True, "append_images": FRAMES[1:]}
HALVES = [[RED] * 16 + [GREEN] * 16] * 16

EXACT: dict[str, tuple[bytes, Pixels]] = {
    "RGB": (saved(picture("RGB", (1, 2, 3), (250, 0, 9)), "PNG"), [[(1, 2, 3), (250, 0, 9)]]),
    "grey is repeated": (saved(picture("L", 7, 200), "PNG"), [[(7, 7, 7), (200, 200, 200)]]),
    "one bit is black and white": (
        saved(picture("1", 0, 255), "PNG"),
        [[(0, 0, 0), (255, 255, 255)]],
    ),
    "two bits of grey are scaled by 85": (
        png(4, 2, 0, bytes([0b00011011])),
        [[(0, 0, 0), (85, 85, 85), (170, 170, 170), (255, 255, 255)]],
    ),
    "a palette is looked up": (
        saved(palette((9, 8, 7), (0, 255, 3)), "PNG"),
        [[(9, 8, 7), (0, 255, 3)]],
    ),
    "a transparent entry of a palette keeps its colour": (
        saved(palette((9, 8, 7), (0, 255, 3)), "PNG", transparency=0),
        [[(9, 8, 7), (0, 255, 3)]],
    ),
    "alpha is dropped, not blended": (
        saved(picture("RGBA", (200, 10, 20, 0), (1, 2, 3, 128)), "PNG"),
        [[(200, 10, 20), (1, 2, 3)]],
    ),
    "grey with alpha likewise": (
        saved(picture("LA", (60, 0), (61, 255)), "PNG"),
        [[(60, 60, 60), (61, 61, 61)]],
    ),
    # 0x00ff is 255 of 65535, nearly black; Pillow's own conversion makes it, and 0x0100, white.
    "16 bits of grey keep the high byte": (
        png(5, 16, 0, bytes.fromhex("0000 00ff 0100 80ff ffff")),
        [[(0, 0, 0), (0, 0, 0), (1, 1, 1), GREY, (255, 255, 255)]],
    ),
    "16 bits of RGB keep the high byte": (
        png(2, 16, 2, bytes.fromhex("0000 00ff 0100 80ff ffff 7fff")),
        [[(0, 0, 1), (128, 255, 127)]],
    ),
    "16 bits of grey with alpha keep the high byte": (
        png(2, 16, 4, bytes.fromhex("0100 0000 ffff ffff")),
        [[(1, 1, 1), (255, 255, 255)]],
    ),
    "interlaced as any": (saved(flat((3, 77, 9)), "PNG", interlace=1), [[(3, 77, 9)] * 16] * 8),
    "one pixel": (saved(picture("RGB", (4, 5, 6), size=(1, 1)), "PNG"), [[(4, 5, 6)]]),
    # R = (255 - C)(255 - K) / 255.
    "CMYK is subtracted from white": (
        saved(picture("CMYK", (0, 255, 255, 0), (0, 0, 0, 127)), "TIFF"),
        [[RED, GREY]],
    ),
    "BMP": (saved(picture("RGB", (1, 2, 3), (4, 5, 6)), "BMP"), [[(1, 2, 3), (4, 5, 6)]]),
    "TIFF": (saved(picture("RGB", (1, 2, 3), (4, 5, 6)), "TIFF"), [[(1, 2, 3), (4, 5, 6)]]),
    "PPM": (b"P6 2 1 255\n\x01\x02\x03\x04\x05\x06", [[(1, 2, 3), (4, 5, 6)]]),
    "WebP without loss": (saved(flat((1, 2, 3)), "WEBP", lossless=True), [[(1, 2, 3)] * 16] * 8),
    "the first frame of a GIF": (saved(FRAMES[0], "GIF", **ANIMATED), [[RED] * 16] * 8),
    "the first frame of an animated PNG": (saved(FRAMES[0], "PNG", **ANIMATED), [[RED] * 16] * 8),
    "the first frame of an animated WebP": (
        saved(FRAMES[0], "WEBP", lossless=True, **ANIMATED),
        [[RED] * 16] * 8,
    ),
    "the first page of a TIFF": (saved(FRAMES[0], "TIFF", **ANIMATED), [[RED] * 16] * 8),
}
JPEGS: dict[str, tuple[bytes, Pixels]] = {
    "baseline": (saved(flat((200, 30, 40)), "JPEG", quality=100), [[(200, 30, 40)] * 16] * 8),
    "progressive": (
        saved(flat((200, 30, 40)), "JPEG", quality=100, progressive=True),
        [[(200, 30, 40)] * 16] * 8,
    ),
    "grey": (saved(flat((77,), "L"), "JPEG", quality=100), [[(77, 77, 77)] * 16] * 8),
    "CMYK": (
        saved(flat((0, 255, 255, 0), "CMYK"), "JPEG", quality=100),
        [[RED] * 16] * 8,
    ),
    "the first of several pictures": (
        saved(FRAMES[0], "MPO", quality=100, **ANIMATED),
        [[RED] * 16] * 8,
    ),
    **{f"orientation {o} is not applied": (turned(o), HALVES) for o in (1, 3, 6, 8)},
}
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be decoded"),
    "text": (b"<html>404 Not Found</html>", "cannot be decoded"),
    "a cut JPEG": (noise("RGB", "JPEG", size=(64, 48))[:-300], "truncated"),
    "a cut progressive JPEG": (
        noise("RGB", "JPEG", size=(64, 48), progressive=True)[:-300],
        "truncated",
    ),
    "a PNG with a wrong checksum": (
        saved(flat(RED), "PNG").replace(b"IDAT", b"IDAT\1", 1),
        "cannot be decoded",
    ),
    "a PPM of senseless numbers": (b"P6\n32 24\n" + b"2" * 30, "cannot be decoded"),
    "floats": (saved(Image.new("F", (4, 4)), "TIFF"), "mode F"),
    "32 bits": (saved(Image.new("I", (4, 4)), "TIFF"), "mode I"),
    "16 bits that nobody knows the range of": (saved(Image.new("I;16", (4, 4)), "TIFF"), "I;16"),
    "16-bit PGM": (b"P5 2 1 65535\n\0\0\0\0", "mode I"),
    "other colour spaces": (saved(Image.new("LAB", (4, 4)), "TIFF"), "mode LAB"),
    "PostScript, which a program would run": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot be decoded"),
    "other formats": (saved(flat(RED), "ICO"), "cannot be decoded"),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_pixels(name: str) -> None:
    data, expected = EXACT[name]
    assert decode(data, name).permute(1, 2, 0).tolist() == [[[*p] for p in row] for row in expected]


@pytest.mark.parametrize("name", JPEGS)
def test_pixels_of_jpegs(name: str) -> None:
    data, expected = JPEGS[name]
    found = decode(data, name).permute(1, 2, 0).numpy().astype(int)
    assert found.shape == np.array(expected).shape
    assert np.abs(found - np.array(expected)).max() <= ROUNDING


@pytest.mark.parametrize("name", REFUSED)
def test_refused_pictures(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(ImageError, match=reason) as error:
        decode(data, "t.tar: a/b")
    assert str(error.value).startswith("t.tar: a/b: ")


def test_16_bit_masks_keep_all_bits() -> None:
    data = png(3, 16, 0, bytes.fromhex("0000 0100 ffff"))
    assert decode_mask(data, "mask").tolist() == [[0, 256, 65535]]


def test_nothing_of_ours_lets_cut_pictures_pass() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_damage_at_random_is_an_error_of_ours_or_a_picture() -> None:
    chance = np.random.default_rng(0)
    wholes = [noise("RGB", kind, size=(32, 24)) for kind in ("JPEG", "PNG", "WEBP", "BMP")]
    wholes += [saved(palette(*[(i, 0, 0) for i in range(9)]), "GIF"), saved(flat(RED), "TIFF")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(600):
            data = bytearray(wholes[number % len(wholes)])
            for _ in range(chance.choice([1, 2, 8])):
                reach = min(len(data), chance.choice([64, 300, len(data)]))
                data[chance.integers(reach)] = chance.integers(256)
            for read in (decode, decode_mask):
                try:
                    read(bytes(data), "here")
                except ImageError as error:
                    assert str(error).startswith("here: ")


BOMBS = """
import resource, sys, time, warnings
from extract.cache.decoding import decode
from extract.cache.errors import ImageError
warnings.simplefilter("ignore")
names = sys.argv[1:]
bombs = [open(name, "rb").read() for name in names]
try:
    decode(b"", "warm")
except ImageError:
    pass
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
for name, data in zip(names, bombs):
    try:
        decode(data, name)
    except ImageError as error:
        assert "pixels" in str(error), error
    else:
        sys.exit(name + " was decoded")
seconds = time.perf_counter() - start
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, seconds)
"""


def test_bombs_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    """Small files of 100 Mpx and more, in a process of their own whose memory is measured."""
    raw = zlib.compress(bytes(1 << 20))
    for name, side, colour in (("grey", 10_000, 0), ("rgb", 10_000, 2), ("huge", 2**30, 2)):
        header = struct.pack(">IIBBBBB", side, side, 8, colour, 0, 0, 0)
        parts = [b"IHDR" + header, b"IDAT" + raw, b"IEND"]
        framed = (
            struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts
        )
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.new("1", (10_000, 10_000)).save(tmp_path / "bits.png")
    (tmp_path / "huge.ppm").write_bytes(b"P6 65000 65000 255\n" + bytes(1000))
    jpeg = bytearray(noise("RGB", "JPEG"))
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = struct.pack(">HH", 60_000, 60_000)
    (tmp_path / "huge.jpg").write_bytes(jpeg)
    files = sorted(map(str, tmp_path.iterdir()))
    assert len(files) == 6 and all(os.path.getsize(name) < 20_000 for name in files)
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, *files],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    megabytes, seconds = map(float, done.stdout.split())
    assert megabytes < 50 and seconds < 0.1 * len(files)


@pytest.mark.parametrize("store_views", ["", "raw"])
def test_both_stages_see_the_same_pixels(
    tmp_path: Path, encoders: dict[str, Path], store_views: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of each view that an encoder saw is that of the view that training is given."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    zoo = EXACT | JPEGS
    tar = tmp_path / "zoo.tar"
    with wds.TarWriter(str(tar), mtime=0) as out:
        for number, (data, _) in enumerate(zoo.values()):
            out.write({"__key__": f"{number:03d}", "png": data})
    extract.run.extract(
        ExtractConfig(
            data=(str(tar),),
            cache=tmp_path / "feats",
            teachers=(f"alpha={encoders['alpha']}",),
            recipe="unic@48",
            views=2,
            workers=1,
            store_views=store_views,
            device="cpu",
        )
    )
    cache = Cache(tmp_path / "feats")
    dataset = CachedViews(select(cache))
    assert len(dataset) == 2 * len(zoo)
    batch = dataset.__getitems__(range(len(dataset)))
    for view in (0, 1):
        stored = cache.unit(VIEWS, "unic@48", view, "zoo").column("fingerprint_hash")
        made = [fingerprint(pixels)[1] for pixels in batch["views"][view::2]]
        assert stored.tolist() == [int(value) for value in made]
