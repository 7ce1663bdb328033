"""Checkpoint files of other projects, read without running them and loaded strictly.

read_checkpoint  file -> tensors          weights only; unwrapped, prefixes taken off
map_keys         -> the model's own names by timm's filter; projection heads dropped
load_strict      -> into the model        all of it or nothing
resize           position embeddings of another grid, by a named rule
"""

import argparse
import inspect
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from extract.encoders.encoder import EncoderError

WRAPPERS = ("state_dict", "model", "teacher", "student", "module")
PREFIXES = ("module.", "backbone.", "encoder.", "_orig_mod.")
# First parts of the names of what sits on top of an encoder: classifiers and projectors.
HEADS = {
    *("head", "heads", "head_dist", "fc", "classifier", "lp"),
    *("projector", "projection_head", "predictor", "prototypes", "dino_head", "ibot_head"),
}
# timm's own choice; that of projects that follow torch's interpolate without antialiasing; and what
# FlexiViT was trained with.
RESIZE_RULES: dict[str, dict[str, Any]] = {
    "timm-bicubic-antialias": {"interpolation": "bicubic", "antialias": True},
    "bicubic-noantialias": {"interpolation": "bicubic", "antialias": False},
    "bilinear-noantialias": {"interpolation": "bilinear", "antialias": False},
}
DEFAULT_RULE = "timm-bicubic-antialias"
NATIVE = "native"
SHOWN = 4


class CheckpointError(EncoderError):
    """A weights file that cannot be read safely, or that does not fit the model."""


def read_checkpoint(path: Path | str, *, unwrap: bool = True) -> dict[str, Tensor]:
    """Read a weights file: `.safetensors`, or a torch file with tensors and plain values alone.

    Nothing in the file is executed: torch files are read with `weights_only=True`, allowing
    `argparse.Namespace` besides, and there is no way around it.

    Args:
        path: the file.
        unwrap: go down `state_dict`, `model`, `teacher`, `student` or `module` (the first that is
            there, repeatedly) and take off the prefixes `module.`, `backbone.`, `encoder.` and
            `_orig_mod.`; for files that timm itself wrote this is not needed.

    Returns:
        tensors by name, on the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged, holds other objects or no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weights file at {path}")
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    inner = _unwrap(content) if unwrap else content
    state: dict[str, Tensor] = {}
    for key, value in inner.items() if isinstance(inner, Mapping) else ():
        if isinstance(value, Tensor):
            name = _strip(str(key)) if unwrap else str(key)
            if name in state:
                raise CheckpointError(
                    f"{path} holds {name!r} twice, under different prefixes: save the one encoder "
                    "that is meant to a file of its own"
                )
            state[name] = value
    if not state:
        found = f"keys {_some(list(content))}" if isinstance(content, Mapping) else type(content)
        raise CheckpointError(
            f"{path} holds no tensors by name: expected a state dict, alone or under one of "
            f"{', '.join(WRAPPERS)}; found {found}"
        )
    return state


def map_keys(state: Mapping[str, Tensor], model: nn.Module, architecture: str) -> dict[str, Tensor]:
    """Bring a checkpoint to timm's names for this architecture.

    Names are mapped by timm's own checkpoint filter of the architecture, where it has one (DeiT-III
    `gamma_1` to `ls1.gamma`, DINOv2, CLIP, …); blocks in chunks (`blocks.0.3.`) are flattened;
    heads that the model does not have are dropped.

    Args:
        state: tensors by name; a file that fits already is returned as it is.
        model: the timm model, at the grid of the checkpoint.
        architecture: timm's name for it.

    Returns:
        a new dict, neither checked nor resized: `load_strict` compares it with the model.

    Raises:
        CheckpointError: if timm's filter cannot make sense of the file.
    """
    own = model.state_dict()
    if state.keys() == own.keys():
        return dict(state)
    if architecture.startswith("vit_") and any(name.startswith("radio_model.") for name in state):
        raise CheckpointError(
            f"this is RADIO's own file, whose position embedding {architecture} would have to "
            f"resample: use timm:naflex{architecture}, which keeps it"
        )
    chunks = re.compile(r"^blocks\.\d+\.(\d+\.)")
    flat = {chunks.sub(r"blocks.\1", name): tensor for name, tensor in state.items()}
    kept = {k: v for k, v in flat.items() if k in own or k.split(".")[0] not in HEADS}
    if kept.keys() == own.keys():
        return kept
    try:
        mapped = _filter(kept, model, architecture, {})
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"timm cannot map these weights to {architecture} ({error!r}); they have "
            f"{len(kept)} tensors: {_some(list(kept))}"
        ) from error
    # The filter would also resample the kernel of another patch size: that is another model.
    for name, tensor in kept.items():
        if name in mapped and name.endswith("patch_embed.proj.weight") and tensor.ndim == 4:
            mapped[name] = tensor
    return {k: v for k, v in mapped.items() if k in own or k.split(".")[0] not in HEADS}


def load_strict(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy all tensors into the model, or none.

    Args:
        model: with the names and shapes that are expected.
        state: what there is.
        where: what to call it in errors.

    Raises:
        CheckpointError: naming what is missing, unexpected or of another shape; the model is as it
            was.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    faults = [f"  {len(found)} {kind}: {_some(found)}" for kind, found in lists.items() if found]
    if faults:
        raise CheckpointError(
            f"{where} does not fit {type(model).__name__}, which has {len(own)} tensors; nothing "
            "was loaded:\n" + "\n".join(faults) + "\nIs it the file of another architecture?"
        )
    model.load_state_dict(dict(state), strict=True)


def resize(
    state: Mapping[str, Tensor], model: nn.Module, architecture: str, rule: str
) -> dict[str, Tensor]:
    """Bring position embeddings (and relative position tables) to the model's grid.

    Args:
        state: a complete state dict of the architecture at another input size.
        model: the timm model at the size that is wanted.
        architecture: timm's name for it.
        rule: one of `RESIZE_RULES`.

    Returns:
        a new state dict.

    Raises:
        EncoderError: if the rule is unknown, or the architecture knows only timm's own.
    """
    if rule not in RESIZE_RULES:
        raise EncoderError(
            f"unknown rule {rule!r} for position embeddings, expected one of "
            f"{', '.join(RESIZE_RULES)}"
        )
    return _filter(state, model, architecture, RESIZE_RULES[rule])


def own_rule(architecture: str) -> str | None:
    """The rule by which this architecture's position embeddings are meant to be resized.

    None: no rule for a fixed grid gives what its authors' code gives at other sizes.
    """
    if "radio" in architecture:
        return None
    return "bilinear-noantialias" if "flexivit" in architecture else DEFAULT_RULE


def pos_embed_tokens(state: Mapping[str, Tensor]) -> int | None:
    """The number of tokens that a checkpoint's absolute position embedding is for."""
    tensor = state.get("pos_embed")
    return int(tensor.shape[1]) if tensor is not None and tensor.ndim == 3 else None


def _filter(
    state: Mapping[str, Tensor], model: nn.Module, architecture: str, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Apply timm's checkpoint filter for this architecture, where its module has one."""
    module = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    function = getattr(module, "checkpoint_filter_fn", None)
    if function is None:
        return dict(state)
    known = inspect.signature(function).parameters
    if options and options != RESIZE_RULES[DEFAULT_RULE] and not options.keys() <= known.keys():
        raise EncoderError(
            f"timm resizes {architecture} in one way only: use the rule {DEFAULT_RULE!r}"
        )
    accepted = {name: value for name, value in options.items() if name in known}
    if "adapt_layer_scale" in known:
        accepted["adapt_layer_scale"] = any(".gamma_" in name for name in state)
    # Some filters take out keys in place.
    return dict(function(dict(state), model, **accepted))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    # Training scripts of the field store their arguments as a Namespace: plain data, so allowed.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # About pickle protocols beside 2: such a file is either read or refused.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was not loaded: besides tensors it holds objects whose loading could run "
            f"code{_foreign(path)}, or it is no torch file. If you trust it, save its state dict "
            "alone as .safetensors in an environment that you can afford to lose"
        ) from error
    except Exception as error:  # damaged bytes fail in the parser in any way at all
        raise CheckpointError(f"{path} is no whole torch file: {error}") from error


def _foreign(path: Path) -> str:
    """Names of the globals that torch refuses, found without running anything."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # files before torch 1.6, or no torch file: then there is no list
        return ""
    others = sorted(set(found) - {"argparse.Namespace"})
    return f" ({_some(others)})" if others else ""


def _unwrap(content: Any) -> Any:
    while isinstance(content, Mapping):
        inner = next((content[k] for k in WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    return content


def _strip(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def _some(names: list[Any]) -> str:
    more = f", … ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return ", ".join(str(name) for name in names[:SHOWN]) + more
