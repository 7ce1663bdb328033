"""The import table of the design: who may import whom, proven able to fail."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"console", "extract", "distill", "evaluate", "demo"}
PURE = {
    f"distill.{name}"
    for name in (
        *("student", "droppath", "projectors", "losses", "balancing", "standardization"),
        *("optim", "recipes", "export", "step"),
    )
}
PROBES = {
    f"evaluate.{name}" for name in ("knn", "classification", "segmentation", "table", "pictures")
}


def allowed(importer: str, imported: str) -> bool:
    """May module `importer` import module `imported`, both of ours?"""
    stage, target = importer.split(".")[0], imported.split(".")[0]
    if importer.startswith("extract.cache"):
        return imported.startswith("extract.cache")
    if importer in PURE:
        return imported in PURE
    if importer in PROBES:
        return imported in PROBES
    if stage == "console":
        return target == "console" or imported == "extract.cache.errors"
    if stage == target or target == "console":
        return True
    if stage == "distill":
        return importer == "distill.batches" and imported.startswith("extract.cache")
    if stage == "evaluate":
        return importer == "evaluate.encoder" and target in {"extract", "distill"}
    return stage == "demo"


def imports(source: str) -> set[str]:
    """Modules of ours that `source` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {m for m in submodules if is_module(m)} or {node.module}
    return {name for name in found if name.split(".")[0] in OURS}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def modules() -> list[tuple[str, Path]]:
    paths = [path for top in OURS for path in (ROOT / top).rglob("*.py")]
    return sorted((module_name(path), path) for path in paths)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: str(value))
def test_imports_follow_the_design(name: str, path: Path) -> None:
    wrong = {target for target in imports(path.read_text()) if not allowed(name, target)}
    assert not wrong, f"{name} must not import {sorted(wrong)}"


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("extract.cache.reader", "from extract.units import Job"),
        ("extract.run", "import distill.run"),
        ("distill.losses", "from distill.config import DistillConfig"),
        ("distill.run", "from extract.cache.reader import Cache"),
        ("distill.batches", "from extract.teachers import load_encoder"),
        ("evaluate.knn", "from extract.cache import Cache"),
        ("evaluate.cli", "def f():\n    from extract.run import extract"),
        ("console.progress", "from extract.cache.reader import Cache"),
    ],
)
def test_the_table_can_refuse(importer: str, source: str) -> None:
    assert any(not allowed(importer, target) for target in imports(source))
