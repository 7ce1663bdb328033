"""Checkpoints: tensors in safetensors, everything else in a JSON file that is written last.

    checkpoints/00000400.safetensors    student, projectors, statistics, optimiser, generators
    checkpoints/00000400.json           step and sha256 of the other; without it the other is void

Nothing is pickled. The newest pair that is whole is loaded; one older pair is kept beside it.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the number of finished steps, and its tensors by name."""

    step: int
    tensors: dict[str, Tensor]


def save(
    folder: Path, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Write a checkpoint after `step` finished steps; older ones but one are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    tensors |= _optimizer_tensors(optimizer) | _generator_tensors()
    data, record = folder / f"{step:08d}.safetensors", folder / f"{step:08d}.json"
    _replace(data, lambda aside: save_file(tensors, aside))
    content = {"step": step, "sha256": _sha256(data)}
    _replace(record, lambda aside: aside.write_text(json.dumps(content) + "\n"))
    _sweep(folder, record)


def _sweep(folder: Path, newest: Path) -> None:
    # Later ones are damaged, or this step would not have been made again.
    kept = sorted(path.stem for path in folder.glob("*.json") if path.stem <= newest.stem)[-KEPT:]
    # In this order a record goes before its tensors.
    for path in sorted(folder.iterdir()):
        if path.stem not in kept and path.suffix in (".json", ".safetensors", ".partial"):
            path.unlink()


def load(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None; damaged ones are passed over."""
    for record in sorted(folder.glob("*.json"), reverse=True):
        data = record.with_suffix(".safetensors")
        try:
            content = json.loads(record.read_text())
            if _sha256(data) == content["sha256"]:
                return Checkpoint(int(content["step"]), load_file(data))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
    return None


def restore(
    checkpoint: Checkpoint, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Put a checkpoint's tensors back; raises `RuntimeError` when they belong to another model."""
    for part, module in modules.items():
        module.load_state_dict(_below(checkpoint.tensors, part))
    stored = _below(checkpoint.tensors, "optimizer")
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        number, field = name.split(".")
        state.setdefault(int(number), {})[field] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(checkpoint.tensors["generator.cpu"])
    if "generator.cuda" in checkpoint.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(checkpoint.tensors["generator.cuda"])


def _below(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = part + "."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, fields in state.items()
        for name, value in fields.items()
    }


def _generator_tensors() -> dict[str, Tensor]:
    # Draws of drop path and teacher dropping are functions of the step and have no state; these
    # are for students with dropout layers of their own.
    states = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["generator.cuda"] = torch.cuda.get_rng_state()
    return states


def _replace(path: Path, write: Any) -> None:
    aside = path.with_name(f".{path.name}.partial")
    write(aside)
    handle = os.open(aside, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    aside.rename(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
