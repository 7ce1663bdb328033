"""Bytes of what an extraction stores, from the format alone.

Sizes of arrays are exact, to the byte; those of compressed arrays, of JPEGs and of JSON are
estimates.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from extract.cache.schema import (
    VIEWS,
    ArraySpec,
    CodecRecord,
    jpeg_specs,
    subset_specs,
    view_specs,
)
from extract.cache.views import Recipe

# Measured on patch tokens of a ViT-S in steps of 1/8 standard deviation: 0.58 bytes a value.
ZSTD_RATIO = 0.58
# JPEGs of quality 95 against raw pixels, where no view was measured.
JPEG_RATIO = 0.3
CRC, INDEX_ENTRY = 4, 16
# As text: a manifest; a zarr.json and its entry there, of a plain and of a sharded array; two
# floats of statistics a channel.
JSON_UNIT, JSON_PLAIN, JSON_SHARDED, JSON_CHANNEL = 900, 700, 1_300, 50

Specs = Mapping[str, ArraySpec]
Missing = Mapping[str, Mapping[str, Sequence[int]]]


def array_bytes(spec: ArraySpec, rows: int) -> int:
    """Bytes of one stored array of `rows` rows: its chunks, their checksums, the shards' indices.

    To the byte, but for compressed arrays.
    """
    length = rows if spec.extent is None else spec.extent
    if not spec.sharded:
        return length * spec.row_bytes + CRC
    chunks, shard_rows = math.ceil(length / spec.chunk_rows), spec.shard_rows(length)
    index = math.ceil(length / shard_rows) * (shard_rows // spec.chunk_rows * INDEX_ENTRY + CRC)
    ratio = ZSTD_RATIO if spec.compression else 1
    return int(chunks * (spec.chunk_rows * spec.row_bytes * ratio + CRC)) + index


def unit_bytes(specs: Specs, rows: int) -> int:
    """Bytes of one unit: its arrays, and an estimate of its JSON."""
    arrays = sum(array_bytes(spec, rows) for spec in specs.values())
    channels = sum(
        spec.row_shape[-1] * (2 if spec.dtype == "uint8" else 1)
        for name, spec in specs.items()
        if name in ("cls", "patches", "registers")
    )
    text = sum(JSON_SHARDED if spec.sharded else JSON_PLAIN for spec in specs.values())
    return arrays + JSON_UNIT + text + channels * JSON_CHANNEL


def owner_specs(
    recipe: Recipe, pixels: str, kept: Mapping[str, int], stored: Mapping[str, CodecRecord]
) -> dict[str, Specs]:
    """Arrays of every owner's units: `views`, folders of `kept` patches, encoders as `stored`."""
    columns = {name: ArraySpec(c.dtype, c.shape) for name, c in recipe.columns.items()}
    return {
        VIEWS: view_specs(columns, recipe.size, pixels),
        **{owner: subset_specs(count) for owner, count in kept.items()},
        **{name: record.specs() for name, record in stored.items()},
    }


def missing_bytes(
    missing: Missing, rows: Mapping[str, int], specs: Mapping[str, Specs], jpeg: float = 0
) -> dict[str, int]:
    """Bytes still to be written, by owner (an encoder's folder, `views`, or kept patches).

    Args:
        missing: by tar, then by owner: the view numbers that are not in the cache yet.
        rows: of each tar.
        specs: the arrays of each owner's units.
        jpeg: expected bytes of each view where views are stored as JPEG, else 0.
    """
    needed = dict.fromkeys(specs, 0)
    for tar, owners in missing.items():
        for owner, views in owners.items():
            whole = dict(specs[owner])
            if owner == VIEWS and jpeg:
                whole |= jpeg_specs(rows[tar], int(jpeg * rows[tar]))
            needed[owner] += len(views) * unit_bytes(whole, rows[tar])
    return needed


def expected_jpeg(size: int) -> float:
    """Bytes of a view of `size` px as JPEG, a cautious guess where nothing was measured."""
    return JPEG_RATIO * 3 * size * size


def free_bytes(folder: Path) -> int:
    """Bytes free for this user on the disk that `folder` lies on, or will lie on."""
    return shutil.disk_usage(existing(folder)).free


def gigabytes(count: float) -> str:
    """`1.23 GB`, in the unit that suits; powers of ten."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def existing(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())
