"""Tars are whole or refused; pictures decode by one rule or are refused; both by name."""

import io
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from extract.cache.errors import ImageError
from extract.cache.images import (
    decode,
    decode_mask,
    expand,
    image_extension,
    index_tar,
    is_image_folder,
    key_id,
    keys_digest,
    tar_sha256,
)


def encoded(mode="RGB", kind="PNG", size=(6, 4), **options) -> bytes:
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    out = io.BytesIO()
    pixels.convert(mode).save(out, kind, **options)
    return out.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def tar(tmp_path):
    members = []
    for index in range(6):
        members += [
            (f"n01/img{index}.JPG", bytes([index]) * (700 + index)),
            (f"n01/img{index}.cls", b"3"),
        ]
    return write_tar(tmp_path / "000003.tar", members)


def test_index(tar):
    index = index_tar(tar)
    assert (index.stem, len(index), index.size) == ("000003", 6, tar.stat().st_size)
    assert [s.key for s in index.samples] == [f"n01/img{i}" for i in range(6)]
    assert [s.ordinal for s in index.samples] == list(range(6))
    for i in (5, 0, 3):
        sample = index.samples[i]
        assert image_extension(sample) == "jpg"
        assert index.read(sample, "jpg") == bytes([i]) * (700 + i)
        assert index.read(sample, "cls") == b"3"
    with pytest.raises(ImageError, match=r"000003.*n01/img0.*\.png"):
        index.read(index.samples[0], "png")


def test_index_is_shared_by_threads_and_pickled(tar):
    index = index_tar(tar)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda s: index.read(s, "jpg"), index.samples * 20))
    assert found == [bytes([i]) * (700 + i) for i in range(6)] * 20
    other = pickle.loads(pickle.dumps(index))
    assert other == index and other._open == {}
    assert other.read(other.samples[4], "jpg") == found[4]


def test_a_tar_that_changed_is_refused(tar):
    index = index_tar(tar)
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(ImageError, match="when it was indexed"):
        index.read(index.samples[0], "jpg")


def test_every_cut_is_found(tar, tmp_path):
    data, cut = tar.read_bytes(), tmp_path / "cut.tar"
    end = index_tar(tar).samples[-1].members["cls"].offset + 512
    for length in [*range(0, end + 1024, 512), *range(100, end, 997), end + 1023]:
        cut.write_bytes(data[:length])
        with pytest.raises(ImageError, match=r"cut\.tar"):
            index_tar(cut)
    cut.write_bytes(data[: end + 1024])
    assert len(index_tar(cut)) == 6


def test_a_damaged_header_and_joined_tars_are_found(tar, tmp_path):
    data = bytearray(tar.read_bytes())
    data[index_tar(tar).samples[2].members["jpg"].offset - 512 + 3] ^= 1
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(ImageError, match="end-of-archive"):
        index_tar(tmp_path / "bad.tar")
    (tmp_path / "joined.tar").write_bytes(tar.read_bytes() * 2)
    with pytest.raises(ImageError, match="joined"):
        index_tar(tmp_path / "joined.tar")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.jpg", "a.cls"], "members of a are not adjacent"),
        (["a.jpg", "b.jpg", "a.jpg"], r"a\.jpg is there twice"),
        (["a.jpg", "a.JPG"], r"a\.jpg is there twice"),
        (["a.cls", "a.json"], "a has 0 images"),
        (["img.v1.jpg", "img.v2.jpg"], "rename files with dots"),
        (["a.jpg", "a.png"], "a has 2 images"),
        (["../a.jpg"], "climbing"),
        (["/abs/a.jpg"], "absolute"),
        (["bad\udcff.jpg"], "non-UTF-8"),
        (["README"], "no samples"),
        ([], "no samples"),
    ],
)
def test_bad_samples_are_refused(tmp_path, names, message):
    path = write_tar(tmp_path / "t.tar", [(name, b"x") for name in names])
    with pytest.raises(ImageError, match=message) as error:
        index_tar(path)
    assert "t.tar" in str(error.value)


def test_what_is_no_sample_is_passed_over(tmp_path):
    names = [
        "__meta__/x.jpg",
        "README",
        "a/._x.jpg",
        ".hidden.jpg",
        "__x.jpg",
        "./k3.jpg",
        "d.v1/y.jpg",
    ]
    index = index_tar(write_tar(tmp_path / "t.tar", [(name, b"x") for name in names]))
    assert [sample.key for sample in index.samples] == ["__x", "./k3", "d.v1/y"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "b.jpg"
        tar.addfile(info)
    with pytest.raises(ImageError, match="link"):
        index_tar(tmp_path / "t.tar")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "t.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ImageError, match="uncompressed tar"):
        index_tar(tmp_path / "t.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz"):
        pass
    with pytest.raises(ImageError, match="uncompressed tar"):
        index_tar(tmp_path / "z.tar")
    with pytest.raises(ImageError, match="cannot be read"):
        index_tar(tmp_path / "none.tar")


def test_digests(tar):
    import hashlib

    assert tar_sha256(tar) == hashlib.sha256(tar.read_bytes()).hexdigest()
    assert key_id("n01/ä").tobytes() == hashlib.sha256("n01/ä".encode()).digest()[:8]
    assert keys_digest(["a", "b"]) != keys_digest(["b", "a"]) != keys_digest(["ba"])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_modes_become_rgb(mode):
    data = encoded(mode)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    view = decode(data, "here")
    assert view.shape == (3, 4, 6)
    assert np.array_equal(view.permute(1, 2, 0).numpy(), expected)


def test_alpha_is_dropped_and_transparency_ignored_without_a_warning():
    pixels = np.full((2, 2, 4), (200, 10, 20, 0), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    assert decode(out.getvalue(), "here")[:, 0, 0].tolist() == [200, 10, 20]
    data = encoded("P", transparency=bytes([0, 128, 255]))
    assert decode(data, "here").shape == (3, 4, 6)


def test_cmyk_and_orientation():
    assert decode(encoded("CMYK", "JPEG"), "here").shape == (3, 4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded("RGB", "JPEG", exif=exif), "here").shape == (3, 4, 6)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    out = io.BytesIO()
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:])
    assert decode(out.getvalue(), "here")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_is_refused(mode):
    out = io.BytesIO()
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.zeros((4, 4), dtype)).save(out, "TIFF")
    with pytest.raises(ImageError, match=f"here: TIFF pixels of mode {mode}"):
        decode(out.getvalue(), "here")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_cut_pictures_are_refused(kind):
    data = encoded("RGB", kind, size=(64, 48))
    assert decode(data, "here").shape == (3, 48, 64)
    for length in (0, 3, 20, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(ImageError, match="here"):
            decode(data[:length], "here")


def test_truncated_loading_stays_off(monkeypatch):
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encoded(), "here")


@pytest.mark.parametrize("side", [9_500, 14_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_decoding(side, monkeypatch):
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(ImageError, match=r"here: .*pixels"):
        decode(out.getvalue(), "here")


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65_535)])
def test_masks_keep_their_indices(dtype, top):
    indices = np.array([[0, 1, 150], [top, 7, 2]], dtype)
    out = io.BytesIO()
    Image.fromarray(indices).save(out, "PNG")
    assert decode_mask(out.getvalue(), "here").tolist() == indices.tolist()


def test_palette_masks_and_refused_masks():
    image = Image.fromarray(np.array([[0, 3], [2, 1]], np.uint8), mode="P")
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6])
    out = io.BytesIO()
    image.save(out, "PNG")
    assert decode_mask(out.getvalue(), "here").tolist() == [[0, 3], [2, 1]]
    with pytest.raises(ImageError, match="mode RGB"):
        decode_mask(encoded("RGB"), "here")
    with pytest.raises(ImageError, match="1 bits"):
        decode_mask(encoded("1"), "here")


def test_expand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("t-000.tar", "t-001.tar", "t-002.tar", "a/t-001.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*patterns):
        return [str(path) for path in expand(patterns)]

    assert names("t-{000..001}.tar") == ["t-000.tar", "t-001.tar"]
    assert names("t-{002,000}.tar") == ["t-002.tar", "t-000.tar"]
    assert names("t-*.tar") == names(".") == ["t-000.tar", "t-001.tar", "t-002.tar"]
    assert names("a", "t-002.tar") == ["a/t-001.tar", "t-002.tar"]
    for pattern in ("t-{001..003}.tar", "x*.tar", "none", "pipe:cat t-000.tar", "s3://b/t.tar"):
        with pytest.raises(ImageError) as error:
            expand([pattern])
        assert pattern in str(error.value)
    with pytest.raises(ImageError, match=r"a/t-001\.tar .*same name|same name"):
        expand(["t-001.tar", "a"])


def test_is_image_folder(tmp_path):
    assert not is_image_folder(tmp_path / "none")
    assert not is_image_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / ".x.jpg").touch()
    assert not is_image_folder(tmp_path)
    (tmp_path / "cat" / "x.JPEG").touch()
    assert is_image_folder(tmp_path)
    (tmp_path / "0.tar").touch()
    assert not is_image_folder(tmp_path)
