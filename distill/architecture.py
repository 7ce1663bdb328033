"""Naming a student on the command line: a timm architecture, its arguments, or a timm folder."""

import ast
import json
from pathlib import Path
from typing import Any

NOT_ARCHITECTURE = {"img_size", "num_classes", "global_pool", "drop_path_rate"}


def parse_student(text: str) -> tuple[str, dict[str, Any]]:
    """The timm architecture that `text` names, and its arguments.

    `"vit_small_patch16_224"`, `"vit_tiny_patch16_224 patch_size=8 embed_dim=96 depth=5"`, or a
    timm folder, whose architecture is taken and whose weights are not. Raises `ValueError` for
    anything else.
    """
    if (Path(text) / "config.json").exists():
        content = json.loads((Path(text) / "config.json").read_text())
        arguments = content.get("model_args") or {}
        kept = {name: value for name, value in arguments.items() if name not in NOT_ARCHITECTURE}
        if "architecture" not in content:
            raise ValueError(f"{text}/config.json names no architecture: it is no timm folder")
        return content["architecture"], kept
    name, *words = text.split() or [""]
    arguments = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(
                f"student {text!r}: {word!r} is no key=value; write for example "
                "'vit_tiny_patch16_224 patch_size=8 depth=6'"
            )
        arguments[key] = _value(value)
    return name, arguments


def canonical(text: str) -> str:
    """The student written out in one way, however and from whichever folder it was named."""
    name, arguments = parse_student(text)
    return " ".join([name, *(f"{key}={arguments[key]!r}" for key in sorted(arguments))])


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
