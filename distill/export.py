"""Write the results: the student as a plain timm folder, the projectors beside it.

student/             timm.create_model("local-dir:student", pretrained=True)
  config.json        architecture, its arguments, preprocessing, licence
  model.safetensors
heads.safetensors    projectors and standardization, for those who go on from there
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
from safetensors.torch import save_file

from distill.projectors import Ladder
from distill.standardization import Standardization
from distill.student import Student


def export_student(
    student: Student,
    folder: Path | str,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    licence: str,
    tag: str = "unic",
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    extra: Mapping[str, object] | None = None,
) -> Path:
    """Write the student as a folder that timm loads by itself.

    The folder is written aside and renamed, so that it is either whole or absent; one that is there
    already is replaced.

    Args:
        student: what was trained; its drop path is not part of the export.
        folder: where to.
        mean: of the pixel normalisation in training, per colour, for pixels in [0, 1].
        std: the same.
        licence: of the weights (a student may inherit its teachers').
        tag: name of these weights, timm's part after the dot.
        crop_pct: side of the centre crop over the resized shorter side (evaluation: 1).
        interpolation: of that resize.
        extra: further plain JSON facts (teachers, recipe), stored in `config.json` under "unic".

    Returns:
        the folder.

    Raises:
        ValueError: if mean or std do not have three values.
    """
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std need a value for each colour, got {mean} and {std}")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        whole = Path(aside, "new")
        timm.models.save_for_hf(
            student.encoder,
            str(whole),
            model_config={
                # timm would otherwise state the preprocessing of the architecture's default weights
                "pretrained_cfg": {
                    "tag": tag,
                    "license": licence,
                    "input_size": [3, *student.image_size],
                    "mean": list(mean),
                    "std": list(std),
                    "crop_pct": crop_pct,
                    "crop_mode": "center",
                    "interpolation": interpolation,
                },
                "unic": dict(extra or {}),
            },
            model_args=student.model_args,
            safe_serialization=True,
        )
        if folder.exists():
            folder.rename(Path(aside, "old"))
        whole.rename(folder)
    return folder


def export_heads(ladder: Ladder, standardization: Standardization, path: Path | str) -> Path:
    """Write the projectors and the standardization to one safetensors file.

    Tensors are named `ladder.…` and `standardization.…` as in the modules' state dicts; the file's
    metadata hold, as JSON, `ladder` (see `Ladder.config`) and `standardization` (its kind).

    Args:
        ladder: the projectors.
        standardization: what the targets went through.
        path: the file, written aside and renamed.

    Returns:
        the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"ladder": ladder, "standardization": standardization}
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    metadata = {
        "format": "pt",
        "ladder": json.dumps(ladder.config(), sort_keys=True),
        "standardization": json.dumps({"kind": standardization.kind}),
    }
    aside = path.with_name(f".{path.name}.partial")
    save_file(tensors, aside, metadata=metadata)
    aside.replace(path)
    return path
