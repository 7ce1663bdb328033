"""The cache format: which files there are, what each holds, and how arrays are cut.

`cache_layout.md` tells the same in words; a test holds the two together. Nothing here opens an
array or knows a model: paths, frozen records of the JSON files, and array specifications.

N = rows of one tar, D = channels, P = patch tokens, S = view size in pixels, K = kept patches.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from extract.cache.errors import CacheError
from extract.cache.sealed import SEAL, content_sha256, publish, read_sealed, sealed_bytes

FORMAT_VERSION = 0
CHUNK_BYTES = 256 * 1024
CHUNK_ROWS = 32
SHARD_BYTES = 64 * 1024**2
VIEWS, SUBSETS = "views", "patches@"
RESERVED = {VIEWS, "tars", "images", "eval"}
FP16 = "fp16"
CODECS = (FP16, "int8", "int8-zstd", "int4")
CALIBRATION_ROWS = 256
JPEG_CHUNK = 64 * 1024


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: `[N, *row_shape]`, its dtype, and the value that means "never written".

    `compression` is `zstd` or empty. Arrays that are not indexed by rows say how long they are
    (`extent`) and how they are cut (`chunk`).
    """

    dtype: str
    row_shape: tuple[int, ...] = ()
    sharded: bool = False
    compression: str = ""
    extent: int | None = None
    chunk: int | None = None

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
        if self.chunk is not None:
            return self.chunk
        rows = CHUNK_ROWS
        while rows > 1 and rows * self.row_bytes > CHUNK_BYTES:
            rows //= 2
        return rows

    def shard_rows(self, length: int) -> int:
        """Rows of a shard of an array of `length`, the unit of writing: a multiple of 32.

        Up to 64 MiB, and no more than the array has, because a shard's index has 16 bytes for each
        inner chunk that it could hold.
        """
        unit = self.chunk or CHUNK_ROWS
        most = max(unit, SHARD_BYTES // self.row_bytes // unit * unit)
        return min(most, max(1, -(-length // unit)) * unit)


def key_specs() -> dict[str, ArraySpec]:
    """What every group holds: one 64-bit digest of each row's key, by which rows are joined."""
    return {"key": ArraySpec("uint64")}


def view_specs(columns: dict[str, ArraySpec], size: int, pixels: str) -> dict[str, ArraySpec]:
    """Arrays of a views group: the recipe's `columns` [N], fingerprints, and pixels as asked.

    `image_index` names the image (its ordinal in the tar) that a row shows: rows and images are
    one to one for crops, several rows an image for recipes such as sliding windows. `pixels` is
    `raw` (uint8 `[N, 3, S, S]`), `jpeg` (see `jpeg_spec`) or empty; a group of JPEGs also has
    `jpeg_offset [N + 1]`, the bounds of each row's picture.
    """
    specs = {
        **key_specs(),
        "image_index": ArraySpec("int32"),
        "image_crc32c": ArraySpec("uint32"),
        "fingerprint_grid": ArraySpec("uint8", (16, 16, 3)),
        "fingerprint_hash": ArraySpec("uint64"),
        **columns,
    }
    if pixels == "raw":
        specs["pixels"] = ArraySpec("uint8", (3, size, size), sharded=True)
    return specs


def jpeg_specs(rows: int, total_bytes: int) -> dict[str, ArraySpec]:
    """The two arrays of views stored as JPEG, known when all have been made.

    `jpeg [total] uint8` holds the pictures one after another in chunks of 64 KiB, `jpeg_offset
    [N + 1] uint64` their bounds. Unlike every other array, these are not indexed by rows.
    """
    return {
        "jpeg": ArraySpec("uint8", sharded=True, extent=total_bytes, chunk=JPEG_CHUNK),
        "jpeg_offset": ArraySpec("uint64", extent=rows + 1),
    }


def subset_owner(grid: tuple[int, int]) -> str:
    """Name of the folder with the kept patches of every encoder of that grid."""
    return f"{SUBSETS}{grid[0]}x{grid[1]}"


def subset_specs(kept: int) -> dict[str, ArraySpec]:
    """Arrays of a group of kept patches: positions (row-major in the grid, ascending) `[N, K]`."""
    return {**key_specs(), "patch_index": ArraySpec("uint16", (kept,), sharded=True)}


def feature_specs(tokens: Mapping[str, Sequence[int]], codec: str = FP16) -> dict[str, ArraySpec]:
    """Arrays of a features group: `cls [N, D]`, `patches [N, P, D]`, and further named ones.

    `tokens` gives each array's row shape. Only `patches` are ever quantised: int8, or two channels
    in a uint8 with `int4`; beside them `scale_patches` `[N, P]` holds the factor of tokens beyond
    the codec's range, and 1 for all others. Everything else is float16.
    """
    specs = key_specs()
    for name, row_shape in tokens.items():
        shape = tuple(row_shape)
        if name != "patches" or codec == FP16:
            specs[name] = ArraySpec("float16", shape, sharded=True)
            continue
        packed = codec == "int4"
        stored = (*shape[:-1], shape[-1] // 2) if packed else shape
        compression = "zstd" if codec.endswith("-zstd") else ""
        specs[name] = ArraySpec("uint8" if packed else "int8", stored, True, compression)
        specs["scale_patches"] = ArraySpec("float16", shape[:-1], sharded=True)
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

    def publish_first(self, path: Path, aside: Path) -> bool:
        """As `write`, but only where there is nothing yet; returns whether this was the first."""
        return publish(path, asdict(self), aside, replace=False)

    def content(self) -> bytes:
        """The bytes of the file."""
        return sealed_bytes(asdict(self))

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
    """`tars/<stem>.json`: one image tar. The stem is its identity, sha256 pins its bytes.

    `rows` counts the images that have rows in units; `skipped` lists the others, which could not
    be decoded, as `[ordinal, key, reason]`.
    """

    kind: ClassVar[str] = "tar record"
    stem: str
    locations: list[str]
    bytes: int
    sha256: str
    rows: int
    keys_digest: str
    skipped: list[list[Any]] = field(default_factory=list)


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

    `arrays` gives the row shape of each array that is kept, before coding: all of the encoder's, or
    its CLS tokens alone, with `patches` patch tokens a row, or all where that is None. Quantising
    codecs have a `calibration` (`mean` and `std` of each channel of the patch tokens) and the
    `fidelity` that they reached on the rows that it is from.
    """

    kind: ClassVar[str] = "codec record"
    codec: str
    arrays: dict[str, list[int]]
    patches: int | None = None
    calibration: dict[str, list[float]] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)

    def specs(self) -> dict[str, ArraySpec]:
        """Arrays of every unit of these features."""
        return feature_specs(self.arrays, self.codec)


@dataclass(frozen=True)
class UnitRecord(Record):
    """The manifest of one unit (a tar, a view, an encoder or the views), written last.

    `group` is the name of the Zarr group beside it, and `objects` maps every file in there to
    `[bytes, sha256]`. For features, `views` is the seal of the views manifest they were computed
    from, `encoder` and `codec` those of `teacher.json` and `codec.json`, `subset` that of the
    manifest of the kept patches, `statistics` the moments of each token type before coding, and
    `rescaled` the number of tokens with a factor of their own.
    """

    kind: ClassVar[str] = "manifest"
    tar: str
    tar_sha256: str
    recipe: str
    view: int
    rows: int
    keys_digest: str
    group: str
    arrays: dict[str, list[Any]]
    objects: dict[str, list[Any]]
    views: str | None = None
    encoder: str | None = None
    codec: str | None = None
    subset: str | None = None
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

    def manifest(self, owner: str, recipe: str, view: int, stem: str) -> Path:
        """The manifest of a unit, beside the group that it names: only what has one exists.

        `owner` is an encoder's folder name, `views`, or a `subset_owner`.
        """
        return self.root / owner / recipe / str(view) / f"{stem}.json"

    def group(self, manifest: Path, name: str) -> Path:
        """The Zarr group that a manifest names."""
        return manifest.parent / name

    def encoders(self) -> list[str]:
        """Folder names of encoders, sorted: whoever has a `teacher.json`, or lost it."""
        found = {path.parent.name for path in self.root.glob("*/teacher.json")}
        found |= {path.parent.parent.name for path in self.root.glob("*/*/codec.json")}
        return sorted(found - RESERVED)


def check_name(name: str) -> str:
    """`name` if it can be an encoder's folder: word characters, dots, dashes and a `+tap`."""
    if name in RESERVED or not re.fullmatch(r"\w[\w.-]*(\+[\w.-]+)?", name):
        raise CacheError(
            f"{name!r} cannot name an encoder in a cache: use letters, digits, '_', '-', '.', "
            f"optionally '+' and a tap, and none of {sorted(RESERVED)}"
        )
    return name
