"""A folder of images becomes the same tars every time, and loses nothing on the way."""

import errno
import os

import pytest
from PIL import Image

from extract.cache.errors import CacheError, ImageError
from extract.cache.images import image_extension, index_tar, is_image_folder
from extract.cache.staging import naming_full_disk
from extract.packing import pack_image_folder


def fill(folder, names):
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if name.lower().endswith("png") else "JPEG"
        Image.new("RGB", (4 + index, 4), (index, 2, 3)).save(path, kind)
    return folder


NAMES = [
    "cat/a.v1.jpg", "cat/a.v2.jpg", "cat/a_v1.JPEG", "cat/a_v1.png", "cat/sub/x y.jpg",
    "dog/a.v1.jpg", "dög/é.jpg", "dög/ü.jpg", "zebra/" + "n" * 200 + ".jpg",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "images", NAMES)


def contents(tars):
    return [
        (sample.key, index.read(sample, image_extension(sample)), sample, index)
        for index in map(index_tar, tars)
        for sample in index.samples
    ]


def test_nothing_is_lost_and_bytes_are_kept(folder, tmp_path):
    seen = []
    tars = pack_image_folder(folder, tmp_path / "out", 0, 4, lambda *a: seen.append(a))
    assert [tar.name for tar in tars] == ["000000.tar", "000001.tar", "000002.tar"]
    assert seen == [(4, 9), (8, 9), (9, 9)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *(t.name for t in tars),
        "packed.json",
    ]
    found = contents(tars)
    assert len({key for key, *_ in found}) == len(NAMES)
    by_bytes = {(folder / name).read_bytes(): name for name in NAMES}
    classes = sorted({name.split("/")[0] for name in NAMES})
    assert sorted(by_bytes[data] for _, data, *_ in found) == sorted(NAMES)
    for _, data, sample, index in found:
        label = classes.index(by_bytes[data].split("/")[0])
        assert index.read(sample, "cls") == str(label).encode()


def test_order_is_shuffled_by_the_seed_and_bytes_repeat(folder, tmp_path):
    one, two, other = (
        pack_image_folder(folder, tmp_path / name, seed, 4)
        for name, seed in (("1", 0), ("2", 0), ("3", 1))
    )
    assert [tar.read_bytes() for tar in one] == [tar.read_bytes() for tar in two]
    assert (tmp_path / "1/packed.json").read_bytes() == (tmp_path / "2/packed.json").read_bytes()
    keys, others = [c[0] for c in contents(one)], [c[0] for c in contents(other)]
    assert sorted(keys) == sorted(others) and keys != others and keys != sorted(keys)


def test_complete_tars_are_kept(folder, tmp_path):
    out = tmp_path / "out"
    tars = pack_image_folder(folder, out, 0, 4)
    before = [tar.stat().st_ino for tar in tars]
    assert pack_image_folder(folder, out, 0, 4) == tars
    # As after a crash: no record yet, one tar missing, a draft left over.
    data = tars[1].read_bytes()
    tars[1].unlink()
    record = (out / "packed.json").read_bytes()
    (out / "packed.json").unlink()
    (out / ".partial").mkdir()
    (out / ".partial" / "000001.tar").write_bytes(data[:1000])
    pack_image_folder(folder, out, 0, 4)
    assert [tars[0].stat().st_ino, tars[2].stat().st_ino] == [before[0], before[2]]
    assert tars[1].read_bytes() == data
    assert (out / "packed.json").read_bytes() == record
    assert not (out / ".partial").exists()


def test_other_sources_are_refused(folder, tmp_path):
    out = tmp_path / "out"
    tars = pack_image_folder(folder, out, 0, 4)
    with pytest.raises(ImageError, match="seed is 0, now 1"):
        pack_image_folder(folder, out, 1, 4)
    tars[0].write_bytes(tars[0].read_bytes()[:-512])
    with pytest.raises(ImageError, match=r"000000\.tar is missing or damaged"):
        pack_image_folder(folder, out, 0, 4)
    fill(folder, ["cat/new.jpg"])
    with pytest.raises(ImageError, match="packed from something else"):
        pack_image_folder(folder, out, 0, 4)
    text = (out / "packed.json").read_text()
    (out / "packed.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(CacheError, match="does not match"):
        pack_image_folder(folder, out, 1, 4)


def test_foreign_tars_are_not_overwritten(folder, tmp_path):
    out = tmp_path / "out"
    tars = pack_image_folder(folder, out, 0, 4)
    (out / "packed.json").unlink()
    data = tars[0].read_bytes()
    with pytest.raises(ImageError, match="other images or with another seed"):
        pack_image_folder(folder, out, 1, 4)
    with pytest.raises(ImageError, match="holds other tars"):
        pack_image_folder(folder, out, 0, 9)
    assert tars[0].read_bytes() == data


def test_flat_folders_have_no_classes(tmp_path):
    folder = fill(tmp_path / "flat", ["a.jpg", "b.x.png", ".hidden.jpg"])
    (folder / "notes").mkdir()
    found = contents(pack_image_folder(folder, tmp_path / "out", 0))
    assert sorted((key, sorted(s.members)) for key, _, s, _ in found) == [
        ("a", ["jpg"]),
        ("b_x", ["png"]),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is not a folder"),
        (["cat/.x.jpg"], "holds no images"),
        (["cat/x.jpg", "y.jpg"], "beside them"),
        (["cat/x.jpg", "dog/.y.jpg"], "class folders dog"),
    ],
)
def test_folders_that_cannot_be_packed(tmp_path, names, message):
    with pytest.raises(ImageError, match=message):
        pack_image_folder(fill(tmp_path / "images", names), tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["empty", "link to nothing"])
def test_files_that_would_stop_the_extraction_later_are_named(folder, tmp_path, fault):
    bad = folder / "dog" / "bad.jpg"
    if fault == "empty":
        bad.touch()
    else:
        bad.symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match=r"dog/bad\.jpg (is an empty file|cannot be read)"):
        pack_image_folder(folder, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()
    bad.unlink()
    pack_image_folder(folder, tmp_path / "out", 0)


def test_a_file_that_goes_or_changes_while_it_is_packed_is_named(folder, tmp_path):
    def meddle(done, total):
        for name in NAMES[:-1]:
            if change == "goes":
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(b"another length")

    for change in ("changes", "goes"):
        with pytest.raises(
            ImageError, match=r"changed while it was packed|cannot be read: No such"
        ):
            pack_image_folder(folder, tmp_path / change, 0, 4, meddle)
        assert [path.name for path in (tmp_path / change).iterdir()] == ["000000.tar"]
        fill(folder, NAMES)


def test_links_to_folders_are_followed_but_not_in_circles(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(folder / name)
    assert is_image_folder(linked)
    assert len(contents(pack_image_folder(linked, tmp_path / "out", 0))) == 6
    (folder / "cat" / "sub" / "back").symlink_to(folder / "dog")
    (folder / "dog" / "forth").symlink_to(folder / "cat")
    assert is_image_folder(folder)
    with pytest.raises(ImageError, match="is a link to a folder that it lies in"):
        pack_image_folder(folder, tmp_path / "circle", 0)
    for number in range(30):
        (tmp_path / "none").mkdir(exist_ok=True)
        (tmp_path / "none" / str(number)).symlink_to(tmp_path / "none")
    assert not is_image_folder(tmp_path / "none")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named_and_what_is_there_is_kept(folder, tmp_path, monkeypatch, number):
    calls, fsync = [], os.fsync

    def full(handle):
        calls.append(handle)
        # A tar and its folder are flushed, then the second tar cannot be.
        if len(calls) == 3:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheError, match=r"/out \(.* bytes are free there\).*make room"):
            pack_image_folder(folder, tmp_path / "out", 0, 4)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000000.tar"]
    assert len(contents(pack_image_folder(folder, tmp_path / "out", 0, 4))) == len(NAMES)


def test_a_disk_too_full_for_the_folder_itself_is_named(tmp_path):
    with (
        pytest.raises(CacheError, match=r"No space left .*/a/b \([\d,]+ bytes are free there\)"),
        naming_full_disk(tmp_path / "a" / "b"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="denied"), naming_full_disk(tmp_path):
        raise OSError(errno.EACCES, "denied")
