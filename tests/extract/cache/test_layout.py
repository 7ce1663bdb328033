"""`cache_layout.md` and the schema say the same."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from extract.cache import schema, views

TEXT = (Path(__file__).parents[3] / "cache_layout.md").read_text()


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ("cache.json", schema.CacheRecord),
        ("tars/*.json", schema.TarRecord),
        ("teacher.json", schema.EncoderRecord),
        ("codec.json", schema.CodecRecord),
        ("manifests", schema.UnitRecord),
    ],
)
def test_fields_of_json_files(row: str, record: type[schema.Record]) -> None:
    line = next(line for line in TEXT.splitlines() if line.startswith(("| `" + row, "| " + row)))
    documented = re.findall(r"`([^`]*)`", line.split("|")[2])[0].split()
    assert documented == [field.name for field in fields(record)]


def test_every_array_is_documented_with_its_dtype() -> None:
    tokens = {"cls": (8,), "patches": (4, 8)}
    parts = [schema.view_specs({}, 16, pixels="raw"), schema.jpeg_specs(2, 9)]
    parts += [schema.feature_specs(tokens, codec) for codec in schema.CODECS]
    parts.append(schema.subset_specs(4))
    for name, spec in (item for part in parts for item in part.items()):
        line = next((line for line in TEXT.splitlines() if f"| `{name}`" in line), None)
        assert line is not None, name
        assert spec.dtype in line, (name, spec.dtype)


def test_every_codec_is_documented() -> None:
    for codec in schema.CODECS:
        assert f"`{codec}`" in TEXT, codec


@pytest.mark.parametrize("label", ["unic@224", "center@224"])
def test_every_parameter_is_documented(label: str) -> None:
    for name in views.parse_recipe(label).columns:
        assert re.search(rf"\b{name}\b", TEXT), name


def test_version_is_documented() -> None:
    assert f"Format version {schema.FORMAT_VERSION}." in TEXT
