"""The cache format: which files there are, what each holds, and how arrays are cut.

`cache_layout.md` tells the same in words; a test holds the two together. Nothing here opens an
array or knows a model: paths, frozen records of the JSON files, and array specifications.

N = rows of one tar, D = channels, P = patch tokens, S = view size in pixels, K = chosen patches.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from extract.cache.errors import CacheError
from extract.cache.sealed import SEAL, content_sha256, publish, read_sealed

FORMAT_VERSION = 0
CHUNK_BYTES = 256 * 1024
CHUNK_ROWS = 32
SHARD_BYTES = 64 * 1024**2
VIEWS = "views"
RESERVED = {VIEWS, "tars", "images", "eval"}


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: `[N, *row_shape]`, its dtype, and the value that means "never written"."""

    dtype: str
    row_shape: tuple[int, ...] = ()
    sharded: bool = False

    @property
    def fill_value(self) -> float | int:
        """NaN for floats and -128 for int8 (data stay within ±127): a hole cannot pass for data."""
        kind = np.dtype(self.dtype)
        return float("nan") if kind.kind == "f" else -128 if kind == np.int8 else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as stored, uncompressed."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.row_shape, dtype=np.int64))

    @property
    def chunk_rows(self) -> int:
        """Rows of an inner chunk: the largest power of two up to 32 that fits in 256 KiB.

        A row is the unit of random access and a chunk the unit of checking, so large rows stand
        alone (ViT-B patch tokens, 301 kB: 1) and small ones share a chunk (CLS tokens: 32).
        """
        rows = CHUNK_ROWS
        while rows > 1 and rows * self.row_bytes > CHUNK_BYTES:
            rows //= 2
        return rows

    @property
    def shard_rows(self) -> int:
        """Rows of a shard, the unit of writing: a multiple of 32, up to 64 MiB."""
        return max(CHUNK_ROWS, SHARD_BYTES // self.row_bytes // CHUNK_ROWS * CHUNK_ROWS)


def key_specs() -> dict[str, ArraySpec]:
    """What every group holds: one 64-bit digest of each row's key, by which rows are joined."""
    return {"key": ArraySpec("uint64")}


def view_specs(columns: dict[str, ArraySpec], size: int, pixels: bool) -> dict[str, ArraySpec]:
    """Arrays of a views group: the recipe's `columns` [N], fingerprints, optionally pixels.

    `image_index` names the image (its ordinal in the tar) that a row shows: rows and images are
    one to one for crops, several rows an image for recipes such as sliding windows.
    """
    specs = {
        **key_specs(),
        "image_index": ArraySpec("int32"),
        "image_crc32c": ArraySpec("uint32"),
        "fingerprint_grid": ArraySpec("uint8", (16, 16, 3)),
        "fingerprint_hash": ArraySpec("uint64"),
        **columns,
    }
    if pixels:
        specs["pixels"] = ArraySpec("uint8", (3, size, size), sharded=True)
    return specs


def patch_index_name(grid: tuple[int, int]) -> str:
    """Name of the array `[N, K] uint16` with the patches kept for every encoder of that grid."""
    return f"patch_index_{grid[0]}x{grid[1]}"


def patch_index_spec(kept: int) -> ArraySpec:
    """Positions (row-major in the grid, ascending) of the patch tokens that were kept."""
    return ArraySpec("uint16", (kept,))


def jpeg_specs(total_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Arrays of views stored as JPEG, the second form of stored pixels: all bytes, and offsets.

    `jpeg [total] uint8` holds the pictures one after another, `jpeg_offset [N + 1] uint64` their
    bounds. Unlike every other array, the first is not indexed by rows.
    """
    return {"jpeg": ("uint8", (total_bytes,)), "jpeg_offset": ("uint64", ())}


def feature_specs(tokens: dict[str, tuple[int, ...]], codec: str = "fp16") -> dict[str, ArraySpec]:
    """Arrays of a features group: `cls [N, D]`, `patches [N, P, D]`, and further named ones.

    `tokens` gives each array's row shape; registers, summary tokens and `mean_patch` are stored
    like CLS tokens, in float16. Only `patches` and `cls` are ever quantised: with an int8 codec
    they are int8 and a token beyond the range carries its own factor in `scale_<name>`.
    """
    specs = key_specs()
    for name, row_shape in tokens.items():
        quantised = codec.startswith("int8") and name in ("cls", "patches")
        specs[name] = ArraySpec("int8" if quantised else "float16", row_shape, sharded=True)
        if quantised:
            specs[f"scale_{name}"] = ArraySpec("float16", row_shape[:-1])
    return specs


@dataclass(frozen=True)
class Record:
    """Base of the JSON files: strict about unknown and missing fields, sealed on disk."""

    kind: ClassVar[str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse the file; raises `CacheError` for damage, unknown or missing fields."""
        content = read_sealed(path)
        content.pop(SEAL)
        found, known = set(content), {item.name for item in fields(cls)}
        if found != known:
            raise CacheError(
                f"{path} is no {cls.kind} of format {FORMAT_VERSION}: "
                f"missing fields {sorted(known - found)}, unknown fields {sorted(found - known)}"
            )
        return cls(**content)

    def write(self, path: Path, aside: Path) -> None:
        """Publish the record at `path`, whole or not at all, by way of the folder `aside`."""
        publish(path, asdict(self), aside)

    def seal(self) -> str:
        """The `content_sha256` under which the record is stored."""
        return content_sha256(asdict(self))


@dataclass(frozen=True)
class CacheRecord(Record):
    """`cache.json`: what all parts share, and nothing that grows."""

    kind: ClassVar[str] = "cache record"
    format_version: int
    seed: int
    decoder: str


@dataclass(frozen=True)
class TarRecord(Record):
    """`tars/<stem>.json`: one image tar. The stem is its identity, sha256 pins its bytes."""

    kind: ClassVar[str] = "tar record"
    stem: str
    locations: list[str]
    bytes: int
    sha256: str
    rows: int
    keys_digest: str


@dataclass(frozen=True)
class EncoderRecord(Record):
    """`<encoder>/teacher.json`: the fingerprint of a frozen encoder and of how it was run.

    `arrays` gives each stored array's row shape before any patch subset; `environment` the library
    versions, which are recorded but are not part of the identity.
    """

    kind: ClassVar[str] = "encoder record"
    name: str
    source: str
    architecture: str
    weights_sha256: str
    global_token: str
    tap: str
    size: int
    grid: list[int]
    patch_size: int | None
    arrays: dict[str, list[int]]
    mean: list[float]
    std: list[float]
    interpolation: str
    position_embedding: str
    precision: str
    licence: str
    parameters: int
    environment: dict[str, str]

    def identity(self) -> dict[str, Any]:
        """Every field that decides the features; two encoders are the same if these agree."""
        free = {"environment", "licence", "source"}
        return {key: value for key, value in asdict(self).items() if key not in free}


@dataclass(frozen=True)
class CodecRecord(Record):
    """`<encoder>/<recipe>/codec.json`: how this encoder's features of this recipe are stored.

    `patches` is the number of patch tokens kept for each row, or None for all; `calibration` holds
    the per-channel offset and step of quantising codecs.
    """

    kind: ClassVar[str] = "codec record"
    codec: str
    patches: int | None = None
    calibration: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UnitRecord(Record):
    """The manifest of one unit (a tar, a view, an encoder or the views), written last.

    `objects` maps every file of the Zarr group to `[bytes, crc32c]`. For features, `views` is the
    seal of the views manifest they were computed from, `encoder` the seal of `teacher.json`, and
    `statistics` the moments of each token type before coding.
    """

    kind: ClassVar[str] = "manifest"
    tar: str
    tar_sha256: str
    recipe: str
    view: int
    rows: int
    keys_digest: str
    arrays: dict[str, list[Any]]
    objects: dict[str, list[int]]
    views: str | None = None
    encoder: str | None = None
    codec: str | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    rescaled: int = 0


@dataclass(frozen=True)
class Layout:
    """Where everything lies below the root of a cache."""

    root: Path

    @property
    def cache(self) -> Path:
        """`cache.json`."""
        return self.root / "cache.json"

    def tar(self, stem: str) -> Path:
        """`tars/<stem>.json`."""
        return self.root / "tars" / f"{stem}.json"

    def encoder(self, encoder: str) -> Path:
        """`<encoder>/teacher.json`."""
        return self.root / encoder / "teacher.json"

    def codec(self, encoder: str, recipe: str) -> Path:
        """`<encoder>/<recipe>/codec.json`."""
        return self.root / encoder / recipe / "codec.json"

    def unit(self, owner: str, recipe: str, view: int, stem: str) -> Path:
        """The Zarr group of a unit; `owner` is an encoder's folder name, or `views`."""
        return self.root / owner / recipe / str(view) / f"{stem}.zarr"

    def manifest(self, owner: str, recipe: str, view: int, stem: str) -> Path:
        """The manifest beside that group: only what has one exists."""
        return self.root / owner / recipe / str(view) / f"{stem}.json"

    def encoders(self) -> list[str]:
        """Folder names that hold a `teacher.json`, sorted."""
        return sorted(path.parent.name for path in self.root.glob("*/teacher.json"))


def check_name(name: str) -> str:
    """`name` if it can be an encoder's folder: word characters, dots, dashes and a `+tap`."""
    if name in RESERVED or not re.fullmatch(r"\w[\w.-]*(\+[\w.-]+)?", name):
        raise CacheError(
            f"{name!r} cannot name an encoder in a cache: use letters, digits, '_', '-', '.', "
            f"optionally '+' and a tap, and none of {sorted(RESERVED)}"
        )
    return name
