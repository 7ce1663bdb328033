"""A second reader of feature caches, written from cache_layout.md alone: json, zarr, Pillow, numpy.

It imports nothing of ours, so it sees what a reader in another language would see; the test beside
it holds the two together. It is plain where ours is fast: whole units, every file hashed.
N = rows of a tar, D = channels, P = patch tokens, K = kept ones, S = view size, H, W = an image's.
"""

import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from PIL import Image

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")
STEPS = {"int8": 16, "int8-zstd": 8}
# JSON text is a string, or white space, or neither; only the second goes.
SPACE = re.compile(r'("(?:[^"\\]|\\.)*")|\s+')
SEAL = re.compile(r'"content_sha256":"([0-9a-f]{64})",?')


class BrokenError(Exception):
    """The cache is not what cache_layout.md says it is."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise BrokenError(message)


def seal(text: str) -> tuple[str, str]:
    """The seal that a file states and the one that it has, without interpreting any number.

    Files are written with sorted keys, so canonical JSON is the text without white space and
    without the seal.
    """
    squeezed = SPACE.sub(lambda found: found[1] or "", text)
    stated = SEAL.search(squeezed)
    require(stated, "no content_sha256")
    assert stated is not None
    others = SEAL.sub("", squeezed, count=1).replace(",}", "}")
    return stated[1], hashlib.sha256(others.encode()).hexdigest()


def read_sealed(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="ascii")
    stated, found = seal(text)
    require(stated == found, f"{path} does not match its content_sha256")
    return dict(json.loads(text))


def key_number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, reflected, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


class ForeignCache:
    """A cache folder: units by (owner, recipe, view, tar), and what they hold, decoded."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.record = read_sealed(root / "cache.json")
        version = self.record["format_version"]
        require(version == 0, f"format_version {version}, this reader knows 0")
        require(self.record["decoder"] == "pillow-rgb", "another decoder of images")

    def tars(self) -> list[str]:
        return sorted(path.stem for path in self.root.glob("tars/*.json"))

    def tar(self, stem: str) -> dict[str, Any]:
        return read_sealed(self.root / "tars" / f"{stem}.json")

    def units(self, owner: str = "*", recipe: str = "*") -> list[tuple[str, str, int, str]]:
        """Every (owner, recipe, view, tar) with a manifest: only these exist."""
        found = (
            path.relative_to(self.root).parts
            for path in self.root.glob(f"{owner}/{recipe}/*/*.json")
        )
        return sorted((o, r, int(v), name.removesuffix(".json")) for o, r, v, name in found)

    def manifest(self, owner: str, recipe: str, view: int, tar: str) -> dict[str, Any]:
        """A manifest; every file of its group has the bytes and sha256 that it states."""
        path = self._path(owner, recipe, view, tar)
        content = read_sealed(path)
        folder = path.parent / content["group"]
        there = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
        require(there == set(content["objects"]), f"{folder} has other files than its manifest")
        for name, (size, sha256) in content["objects"].items():
            data = (folder / name).read_bytes()
            whole = len(data) == size and hashlib.sha256(data).hexdigest() == sha256
            require(whole, f"{folder / name} is not what its manifest says")
        table = json.dumps(content["objects"], sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(table.encode()).hexdigest()[:12]
        require(content["group"] == f"{tar}-{digest}.zarr", f"{folder} has another digest")
        return content

    def arrays(self, owner: str, recipe: str, view: int, tar: str) -> dict[str, np.ndarray]:
        """Every array of a unit as zarr-python gives it, of the stated dtypes and shapes."""
        content = self.manifest(owner, recipe, view, tar)
        folder = self._path(owner, recipe, view, tar).parent / content["group"]
        group = zarr.open_group(folder, mode="r")
        arrays = {name: np.asarray(group[name]) for name in content["arrays"]}
        for name, (dtype, row_shape) in content["arrays"].items():
            array = arrays[name]
            require(array.dtype == dtype, f"{name} is of {array.dtype}")
            require(list(array.shape[1:]) == row_shape, f"{name} has rows {array.shape[1:]}")
            if name not in ("jpeg", "jpeg_offset"):
                require(len(array) == content["rows"], f"{name} has {len(array)} rows")
        return arrays

    def features(self, encoder: str, recipe: str, view: int, tar: str) -> dict[str, np.ndarray]:
        """Tokens by name, float16 `[N, …]`, of the rows of the views unit."""
        stored = self.arrays(encoder, recipe, view, tar)
        self._check_origins(encoder, recipe, view, tar)
        self._check_keys(stored["key"], recipe, view, tar)
        codec = read_sealed(self.root / encoder / recipe / "codec.json")
        tokens = {name: stored[name] for name in codec["arrays"]}
        if "patches" in tokens:
            tokens["patches"] = decode(codec, stored)
        for name, row_shape in codec["arrays"].items():
            require(list(tokens[name].shape[1:]) == row_shape, f"{name}: other rows than stated")
        return tokens

    def positions(self, encoder: str, recipe: str, view: int, tar: str) -> np.ndarray | None:
        """Which patches are kept `[N, K]`, None where all are."""
        if read_sealed(self.root / encoder / recipe / "codec.json")["patches"] is None:
            return None
        stored = self.arrays(self._subset(encoder), recipe, view, tar)
        self._check_keys(stored["key"], recipe, view, tar)
        return stored["patch_index"]

    def images(self, recipe: str, view: int, tar: str) -> list[np.ndarray]:
        """The image `[H, W, 3]` of each row, found by (tar, ordinal, key)."""
        unit, record = self.arrays("views", recipe, view, tar), self.tar(tar)
        path = next(p for place in record["locations"] if (p := self.root / place).exists())
        whole = hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
        require(whole, f"{path} is another tar")
        samples = read_tar(path)
        skipped = {ordinal for ordinal, _, _ in record["skipped"]}
        keys = [key for i, (key, _) in enumerate(samples) if i not in skipped]
        require(keys_digest(keys) == record["keys_digest"], f"{path} has other keys")
        rows = zip(unit["image_index"], unit["key"], unit["image_crc32c"], strict=True)
        images = []
        for ordinal, number, checksum in rows:
            key, data = samples[ordinal]
            require(key_number(key) == number, f"{path}: image {ordinal} is {key}")
            require(crc32c(data) == checksum, f"{path}: image {ordinal} has other bytes")
            images.append(rgb(data))
        return images

    def views(self, recipe: str, view: int, tar: str) -> np.ndarray:
        """The views uint8 `[N, 3, S, S]`: stored ones, else made again from the images."""
        unit = self.arrays("views", recipe, view, tar)
        if "pixels" in unit:
            return unit["pixels"]
        if "jpeg" in unit:
            data, bounds = unit["jpeg"].tobytes(), unit["jpeg_offset"].tolist()
            pictures = (data[a:b] for a, b in itertools.pairwise(bounds))
            made = [rgb(picture) for picture in pictures]
        else:
            size = int(re.findall(r"@(\d+)", recipe)[0])
            apply = unic if recipe.startswith("unic@") else center
            made = [
                apply(image, {name: unit[name][row] for name in unit}, size)
                for row, image in enumerate(self.images(recipe, view, tar))
            ]
        return np.stack(made).transpose(0, 3, 1, 2)

    def statistics(
        self, encoder: str, recipe: str, views: Sequence[int], tars: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Exact count, mean and M2 of each token type: over views, and in each over tars."""
        parts = [
            read_sealed(self._path(encoder, recipe, view, tar))["statistics"]
            for view in sorted(views)
            for tar in sorted(tars)
        ]
        return {name: merged(part[name] for part in parts) for name in parts[0]}

    def _path(self, owner: str, recipe: str, view: int, tar: str) -> Path:
        return self.root / owner / recipe / str(view) / f"{tar}.json"

    def _subset(self, encoder: str) -> str:
        rows, columns = read_sealed(self.root / encoder / "teacher.json")["grid"]
        return f"patches@{rows}x{columns}"

    def _check_keys(self, keys: np.ndarray, recipe: str, view: int, tar: str) -> None:
        views = self.arrays("views", recipe, view, tar)
        require(np.array_equal(keys, views["key"]), f"{tar}: rows with other keys than the views")

    def _check_origins(self, encoder: str, recipe: str, view: int, tar: str) -> None:
        """Features were made of these views by this encoder, and stored by this codec."""
        content = self.manifest(encoder, recipe, view, tar)
        folder = self.root / encoder
        origins = {
            "encoder": folder / "teacher.json",
            "codec": folder / recipe / "codec.json",
            "views": self._path("views", recipe, view, tar),
        }
        if content["subset"] is not None:
            origins["subset"] = self._path(self._subset(encoder), recipe, view, tar)
        for name, path in origins.items():
            require(content[name] == read_sealed(path)["content_sha256"], f"another {name}: {path}")
        record = self.tar(tar)
        require(content["tar_sha256"] == record["sha256"], f"{tar}: features of another tar")
        require(content["keys_digest"] == record["keys_digest"], f"{tar}: features of other keys")


def decode(codec: dict[str, Any], stored: dict[str, np.ndarray]) -> np.ndarray:
    """Patch tokens `[N, P, D]` float16 from what a unit stores, by way of float32."""
    coded_NPD = stored["patches"]
    if codec["codec"] == "fp16":
        return coded_NPD
    mean_D, std_D = (np.array(codec["calibration"][name], np.float32) for name in ("mean", "std"))
    scale_NP1 = stored["scale_patches"].astype(np.float32)[..., None]
    if codec["codec"] == "int4":
        levels = np.stack([coded_NPD & 15, coded_NPD >> 4], axis=-1)
        levels_NPD = levels.reshape(*coded_NPD.shape[:2], -1).astype(np.float32)
        z_NPD = ((levels_NPD + np.float32(0.5)) / np.float32(8) - 1) * np.float32(2.75)
    else:
        z_NPD = coded_NPD.astype(np.float32) / np.float32(STEPS[codec["codec"]])
    return (z_NPD * std_D * scale_NP1 + mean_D).astype(np.float16)


def merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Count, mean `[D]` and M2 `[D]` of all parts, one after another, in float64."""
    first, *rest = parts
    count, mean, m2 = first["count"], np.array(first["mean"]), np.array(first["m2"])
    for part in rest:
        total, delta = count + part["count"], np.array(part["mean"]) - mean
        mean = mean + delta * (part["count"] / total)
        m2 = m2 + np.array(part["m2"]) + delta**2 * (count * part["count"] / total)
        count = total
    return {"count": count, "mean": mean, "m2": m2}


def read_tar(path: Path) -> list[tuple[str, bytes]]:
    """(key, bytes of the image) of every sample of a tar, in its order."""
    samples: dict[str, bytes] = {}
    with tarfile.open(path, "r:", encoding="utf-8") as archive:
        for member in archive:
            folder, slash, name = member.name.rpartition("/")
            base, dot, extension = name.partition(".")
            hidden = not base or re.match(r"__[^/]*__($|/)", member.name)
            if not member.isfile() or not dot or hidden:
                continue
            key = folder + slash + base
            samples.setdefault(key, b"")
            if extension.lower() in IMAGES:
                file = archive.extractfile(member)
                assert file is not None
                samples[key] = file.read()
    return list(samples.items())


def keys_digest(keys: Iterable[str]) -> str:
    """sha256 over every key in order: bytes of its UTF-8 as a little-endian uint64, then these."""
    coded = [key.encode() for key in keys]
    return hashlib.sha256(b"".join(len(c).to_bytes(8, "little") + c for c in coded)).hexdigest()


def rgb(data: bytes) -> np.ndarray:
    """Pixels `[H, W, 3]` uint8."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode == "I;16":
            return np.stack([(np.array(image) >> 8).astype(np.uint8)] * 3, axis=-1)
        return np.array(image.convert("RGB"))


def fingerprint(view_3SS: np.ndarray) -> tuple[np.ndarray, int]:
    """Pixels `[16, 16, 3]` at the centres of a grid, and the number made of the sha256 of all."""
    places = (2 * np.arange(16) + 1) * view_3SS.shape[1] // 32
    grid = view_3SS[:, places][:, :, places].transpose(1, 2, 0)
    digest = hashlib.sha256(np.ascontiguousarray(view_3SS).tobytes()).digest()
    return grid, int.from_bytes(digest[:8], "little")


def resized(image_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing in fixed point: along the width first, then along the height."""
    across = along_first_axis(image_HW3.swapaxes(0, 1), width).swapaxes(0, 1)
    return along_first_axis(across, height)


def along_first_axis(pixels: np.ndarray, length: int) -> np.ndarray:
    """`[n, …]` to `[length, …]`, uint8; the same pixels where `length` is n."""
    taps = [weights(len(pixels), length, i) for i in range(length)]
    largest = max(weight.max() for _, weight in taps)
    bits = 0
    while bits < 22 and int(largest * 2 ** (bits + 1) + 0.5) < 2**15:
        bits += 1
    out = []
    for first, weight in taps:
        # Rounded half away from zero, to 16 bits.
        whole = np.trunc(weight * 2**bits + np.copysign(0.5, weight)).astype(np.int64)
        window = pixels[first : first + len(weight)].astype(np.int64)
        out.append(np.tensordot(whole, window, 1) + (1 << bits - 1) >> bits)
    return np.stack(out).clip(0, 255).astype(np.uint8)


def weights(n: int, length: int, i: int) -> tuple[int, np.ndarray]:
    """The first of the pixels that make pixel `i`, and the weight of it and of those after it."""
    scale = n / length
    wide, middle = max(scale, 1.0), scale * (i + 0.5)
    first, end = max(int(middle - 2 * wide + 0.5), 0), min(int(middle + 2 * wide + 0.5), n)
    x = np.abs((np.arange(first, end) + 0.5 - middle) / wide)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return first, weight / weight.sum()


def center(image_HW3: np.ndarray, parameters: dict[str, np.ndarray], size: int) -> np.ndarray:
    """The view `[S, S, 3]` of `center@S` and `center@SrR`."""
    height, width, top, left = (
        int(parameters[name])
        for name in ("resized_height", "resized_width", "crop_top", "crop_left")
    )
    return resized(image_HW3, height, width)[top : top + size, left : left + size]


def unic(image_HW3: np.ndarray, parameters: dict[str, np.ndarray], size: int) -> np.ndarray:
    """The view `[S, S, 3]` of `unic@S`."""
    p = {name: value.item() for name, value in parameters.items() if value.ndim == 0}
    top, left = p["crop_top"], p["crop_left"]
    box = image_HW3[top : top + p["crop_height"], left : left + p["crop_width"]]
    view = resized(box, size, size)
    if p["flip"]:
        view = view[:, ::-1]
    if p["jitter"]:
        for operation in parameters["jitter_order"]:
            view = jitter(view, int(operation), p)
    if p["gray"]:
        view = np.repeat(grey(view)[..., None], 3, axis=-1).astype(np.uint8)
    if p["blur"]:
        view = blur(view, p["blur_sigma"])
    return np.where(view >= 128, 255 - view, view) if p["solarize"] else view


def jitter(view_SS3: np.ndarray, operation: int, p: dict[str, Any]) -> np.ndarray:
    """Operation 0 brightness, 1 contrast, 2 saturation, 3 hue; uint8 again after each."""
    if operation == 3:
        return shifted_hue(view_SS3, p["hue"])
    factor = p[("brightness", "contrast", "saturation")[operation]]
    floor_SS1 = np.floor(grey(view_SS3))[..., None]
    other = (np.float32(0), floor_SS1.mean(dtype=np.float32), floor_SS1)[operation]
    mixed = view_SS3 * np.float32(factor) + other * np.float32(1 - factor)
    return mixed.clip(0, 255).astype(np.uint8)


def grey(view_SS3: np.ndarray) -> np.ndarray:
    weights = np.array([0.2989, 0.587, 0.114], np.float32)
    r, g, b = np.moveaxis(view_SS3 * weights, -1, 0)
    return r + g + b


def shifted_hue(view_SS3: np.ndarray, shift: float) -> np.ndarray:
    """The hue moved by `shift` turns, saturation and value kept: `floor(255.999 x)` of 0 to 1."""
    x = view_SS3.astype(np.float32) / np.float32(255)
    value, low = x.max(-1), x.min(-1)
    spread = value - low
    safe = np.where(spread == 0, 1, spread)
    saturation = spread / np.where(value == 0, 1, value)
    r, g, b = np.moveaxis((value[..., None] - x) / safe[..., None], -1, 0)
    sector = np.where(x[..., 0] == value, b - g, np.where(x[..., 1] == value, 2 + r - b, 4 + g - r))
    hue = (sector / 6 + np.float32(shift)) % 1
    # Each channel is a trapezoid of the hue, a third of a turn after the one before.
    turns = (np.array([5, 3, 1], np.float32) + 6 * hue[..., None]) % 6
    ramp = np.minimum(turns, 4 - turns).clip(0, 1)
    rgb_SS3 = value[..., None] * (1 - saturation[..., None] * ramp)
    return (rgb_SS3 * np.float32(255.999)).astype(np.uint8)


def blur(view_SS3: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of 9 x 9 pixels, borders mirrored without repeating them, rounded half to even."""
    weights = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = np.pad(view_SS3.astype(np.float64), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    size = len(view_SS3)
    rows = sum(w * padded[i : i + size] for i, w in enumerate(weights))
    both = sum(w * rows[:, i : i + size] for i, w in enumerate(weights))
    return np.rint(both).astype(np.uint8)
