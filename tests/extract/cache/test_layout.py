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
    specs = schema.view_specs({}, 16, pixels=True) | schema.feature_specs(
        {"cls": (8,), "patches": (4, 8)}
    )
    specs[schema.patch_index_name((14, 14))] = schema.patch_index_spec(4)
    for name, spec in specs.items():
        line = next((line for line in TEXT.splitlines() if f"| `{name}`" in line), None)
        assert line is not None, name
        assert spec.dtype in line, (name, spec.dtype)


@pytest.mark.parametrize("label", ["unic@224", "center@224"])
def test_every_parameter_is_documented(label: str) -> None:
    for name in views.parse_recipe(label).columns:
        assert re.search(rf"\b{name}\b", TEXT), name


def test_version_is_documented() -> None:
    assert f"Format version {schema.FORMAT_VERSION}." in TEXT
