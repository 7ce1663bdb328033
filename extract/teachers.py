"""Every encoder by name.

    dino, deit3        teachers of the method, from the hub or from --weights FILE
    timm:TAG           any model that timm knows, such as timm:vit_small_patch14_dinov2.lvd142m
    FOLDER             a timm folder (config.json, model.safetensors), or a run that has student/
    random:NAME        the same model untrained; NAME is a teacher, a timm architecture or a folder
    pixels[:PATCH]     the pixels themselves
    OTHER=NAME         any of these under a name of its own in the cache

A timm folder's `config.json` may say, beside timm's own keys, `"position_embedding"` (a rule of
`extract.checkpoints.RESIZE_RULES`) and `"global_token"` (`cls` or `pool`).
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from extract.baselines import RANDOM_SEED, fixed_seed, pixel_encoder
from extract.checkpoints import (
    DEFAULT_RULE,
    NATIVE,
    RESIZE_RULES,
    CheckpointError,
    load_strict,
    map_keys,
    pos_embed_tokens,
    read_checkpoint,
    resize,
)
from extract.encoder import Encoder, EncoderError, EncoderSpec, TimmTokens, weights_sha256

FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class TeacherCard:
    """A teacher that the commands know by a short name."""

    name: str
    tag: str
    global_token: str
    licence: str
    paper: str
    note: str


TEACHERS = {
    card.name: card
    for card in (
        TeacherCard(
            name="dino",
            tag="vit_base_patch16_224.dino",
            global_token="cls",
            licence="apache-2.0",
            paper="DINO ViT-B/16 (Caron et al., 2021)",
            note="self-supervised on ImageNet-1K; CLS and patches after the final norm",
        ),
        TeacherCard(
            name="deit3",
            tag="deit3_base_patch16_224.fb_in1k",
            global_token="cls",
            licence="apache-2.0",
            paper="DeiT-III ViT-B/16 (Touvron et al., 2022)",
            note="supervised on ImageNet-1K; CLS and patches after the final norm",
        ),
    )
}


@dataclass(frozen=True)
class Request:
    """What a name stands for: a timm model to make, and where its weights come from.

    `model` is what `timm.create_model` takes (`architecture[.tag]` or `local-dir:FOLDER`), `file`
    the weights if they are not the hub's, `native` whether they have timm's own names, and `sized`
    whether the architecture is built for one input size.
    """

    model: str
    architecture: str
    args: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None
    native: bool = False
    random: bool = False
    sized: bool = False
    global_token: str | None = None
    licence: str | None = None
    rule: str = DEFAULT_RULE

    @property
    def source(self) -> str:
        """Where the weights come from, without paths of one machine."""
        if self.random:
            return f"random:{RANDOM_SEED}"
        if self.file is None:
            return f"timm:{self.model}"
        return f"folder:{_folder_name(self.file)}" if self.native else f"file:{self.file.name}"


def available_teachers() -> list[TeacherCard]:
    """The teachers that have a short name."""
    return list(TEACHERS.values())


def encoder_folder(name: str) -> str:
    """The folder of the cache that an encoder called `name` gets, unless `OTHER=NAME` names it.

    Raises `EncoderError` for an unknown name.
    """
    alias, target = _split(name)
    if alias is not None:
        return alias
    if target in TEACHERS or target == "pixels":
        return target
    kind, _, rest = target.partition(":")
    if kind == "timm":
        return _safe(rest, r"\W+")
    if kind == "pixels":
        return f"pixels-{_safe(rest)}"
    if kind == "random":
        return "random-" + (_safe(rest, r"\W+") if timm.is_model(rest) else encoder_folder(rest))
    return _safe(_folder_name(_find_folder(target) / FOLDER_WEIGHTS[0]))


def load_encoder(
    name: str,
    *,
    size: int = 224,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    model_name: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    position_embedding: str | None = None,
    global_token: str | None = None,
) -> Encoder:
    """Make the encoder that `name` stands for, see the top of this file.

    Args:
        name: of a teacher, timm model, folder or baseline.
        size: side of the square views, in pixels; position embeddings of another size are resized.
        weights: a checkpoint file, loaded strictly in place of the model's own weights.
        device: where it runs; on CUDA under bfloat16 autocast.
        model_name: timm model that `weights` are for, where `name` is only what to call it. Its tag
            decides the normalisation: `vit_base_patch16_224.dino` has ImageNet's mean and std.
        model_args: further arguments of `timm.create_model`, such as `embed_dim`.
        position_embedding: how to resize, one of `extract.checkpoints.RESIZE_RULES`; None takes
            what the folder says, else timm's rule.
        global_token: `cls` or `pool`; None takes what the teacher or folder says, else the class
            token where there is one.

    Returns:
        the encoder, frozen.

    Raises:
        EncoderError: if the name is unknown, the weights cannot be had or do not fit, or the model
            cannot take views of this size.
    """
    alias, target = _split(name)
    if target.partition(":")[0] == "pixels":
        if weights is not None:
            raise EncoderError(f"{name} has no weights: leave out --weights {weights}")
        return _pixels(alias or target, target, size, device)
    request = _resolve(f"timm:{model_name}" if model_name else target)
    if request.random and weights is not None:
        raise EncoderError(f"{name} is the untrained model: leave out --weights {weights}")
    if model_name and weights is None:
        raise EncoderError(f"{name}: a model name goes with a weights file, which is missing")
    request = replace(
        request,
        args={**request.args, **(model_args or {})},
        rule=position_embedding or request.rule,
        global_token=global_token or request.global_token,
    )
    if weights is not None:
        licence = request.licence if target in TEACHERS else "unknown"
        request = replace(request, file=Path(weights), native=False, licence=licence)
    if request.rule not in RESIZE_RULES:
        raise EncoderError(
            f"unknown rule {request.rule!r} for position embeddings, expected one of "
            f"{', '.join(RESIZE_RULES)}"
        )
    model, sha256, rule = _build(request, size)
    called = name if model_name else encoder_folder(name)
    return _encoder(called, request, model.to(device).eval(), size, sha256, rule)


def _pixels(name: str, target: str, size: int, device: torch.device | str) -> Encoder:
    patch = target.partition(":")[2] or "16"
    if not patch.isdecimal():
        raise EncoderError(f"{name}: expected a patch size in pixels, as in pixels:16")
    return pixel_encoder(name, size=size, patch_size=int(patch), device=device)


def _split(name: str) -> tuple[str | None, str]:
    """`OTHER=NAME` into its parts."""
    alias, equals, target = name.partition("=")
    if equals and target and re.fullmatch(r"[\w.+-]+", alias) and not Path(name).exists():
        return alias, target
    return None, name


def _resolve(target: str) -> Request:
    """What a name (without alias) stands for."""
    if target in TEACHERS:
        card = TEACHERS[target]
        request = _timm_request(card.tag)
        return replace(request, global_token=card.global_token, licence=card.licence)
    kind, _, rest = target.partition(":")
    if kind == "timm":
        return _timm_request(rest)
    if kind == "random":
        inner = _timm_request(rest) if timm.is_model(rest) else _resolve(rest)
        return replace(inner, random=True, licence="none")
    return _folder_request(_find_folder(target))


def _timm_request(tag: str) -> Request:
    architecture, _, pretrained_tag = tag.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise EncoderError(f"timm {timm.__version__} has no model {architecture!r}{hint}")
    cfg = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    if pretrained_tag:
        tags = [t.partition(".")[2] for t in timm.list_pretrained(f"{architecture}.*")]
        if pretrained_tag not in tags:
            raise EncoderError(
                f"timm has no weights {pretrained_tag!r} of {architecture}; it has: "
                f"{', '.join(tags) or 'none'}"
            )
        cfg = timm.get_pretrained_cfg(tag)
    elif cfg is not None and cfg.tag:
        tag = f"{architecture}.{cfg.tag}"
    sized = bool(cfg is not None and cfg.fixed_input_size)
    return Request(model=tag, architecture=architecture, sized=sized)


def _find_folder(target: str) -> Path:
    """The timm folder at a path, or in `student/` under it."""
    path = Path(target).expanduser()
    for folder in (path, path / "student"):
        if (folder / "config.json").is_file():
            return folder
    if path.is_dir():
        raise EncoderError(
            f"{target} is no timm folder: expected config.json and {FOLDER_WEIGHTS[0]} in it or "
            f"in {path / 'student'}"
        )
    if re.search(r"[/\\]|^[.~]", target):
        raise EncoderError(f"no folder at {target}")
    choices = [*TEACHERS, "pixels"]
    close = difflib.get_close_matches(target, choices, n=1)
    if timm.is_model(target.partition(".")[0]):
        close = [f"timm:{target}"]
    hint = f"did you mean {close[0]}? " if close else ""
    raise EncoderError(
        f"unknown encoder {target!r}: {hint}expected {', '.join(choices)}, timm:TAG, random:NAME, "
        "pixels:PATCH, or the path of a timm folder"
    )


def _folder_request(folder: Path) -> Request:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise EncoderError(f"{folder / 'config.json'} is no JSON: {error}") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise EncoderError(
            f"{folder / 'config.json'} names the architecture {architecture!r}, which timm "
            f"{timm.__version__} does not have"
        )
    args, cfg = config.get("model_args") or {}, config.get("pretrained_cfg") or config
    file = next((folder / f for f in FOLDER_WEIGHTS if (folder / f).is_file()), None)
    flexible = {"img_size", "dynamic_img_size", "strict_img_size"}
    return Request(
        model=f"local-dir:{folder}",
        architecture=architecture,
        file=file or folder / FOLDER_WEIGHTS[0],
        native=True,
        sized=bool(cfg.get("fixed_input_size") or flexible & args.keys()),
        global_token=config.get("global_token"),
        licence=cfg.get("license"),
        rule=config.get("position_embedding") or DEFAULT_RULE,
    )


def _folder_name(file: Path) -> str:
    """What to call the folder of a weights file: a run's student is called like the run."""
    # Not resolve(): in a hub's cache the file is a link to a blob, and a link's own name is meant.
    folder = Path(os.path.abspath(file.parent))
    return folder.parent.name if folder.name == "student" else folder.name


def _safe(text: str, foreign: str = r"[^\w.-]+") -> str:
    return re.sub(foreign, "-", text).strip("-.") or "encoder"


def _build(request: Request, size: int) -> tuple[nn.Module, str, str]:
    """The model at this size, the sha256 of its weights before resizing, and the rule applied."""
    if request.random:
        with fixed_seed():
            model = _create(request, size)
        return model, weights_sha256(model), NATIVE
    model = _create_from_hub(request) if request.file is None else _create_from_file(request)
    sha256 = weights_sha256(model)
    if not request.sized or _input_size(model) == (size, size):
        return model, sha256, NATIVE
    target, state = _create(request, size), model.state_dict()
    resized = resize(state, target, request.architecture, request.rule)
    load_strict(target, resized, f"{request.model} resized to {size} px")
    changed = any(resized[name].shape != state[name].shape for name in resized)
    return target, sha256, request.rule if changed else NATIVE


def _create(request: Request, size: int | None = None, *, pretrained: bool = False) -> nn.Module:
    """Make the timm model, for `size` if it is built for one, with random or the hub's weights."""
    img_size = {"img_size": size} if size is not None and request.sized else {}
    args = {**request.args, "num_classes": 0, **img_size}
    try:
        model: nn.Module = timm.create_model(request.model, pretrained=pretrained, **args)
    except (AssertionError, TypeError, ValueError) as error:
        at = f" for views of {size} px" if size is not None else ""
        raise EncoderError(f"timm cannot make {request.model}{at}: {error}") from error
    return model


def _create_from_hub(request: Request) -> nn.Module:
    try:
        return _create(request, pretrained=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EncoderError(
            f"the weights of {request.model} could not be had from the Hugging Face hub "
            f"({reason}): connect (and unset HF_HUB_OFFLINE), or give a file that you have with "
            "--weights FILE"
        ) from error


def _create_from_file(request: Request) -> nn.Module:
    """The model at the grid of the file, with the file's weights."""
    assert request.file is not None
    state = read_checkpoint(request.file, unwrap=not request.native)
    model = _create(request)
    side = _side(state, model, request.file) if request.sized else None
    if side is not None:
        model = _create(request, side)
    if not request.native:
        state = map_keys(state, model, request.architecture)
    load_strict(model, state, str(request.file))
    return model


def _side(state: Mapping[str, Tensor], model: Any, where: Path) -> int | None:
    """The input size that a checkpoint was made at, where it is not the model's own."""
    tokens, own = pos_embed_tokens(state), getattr(model, "pos_embed", None)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if tokens is None or own is None or grid is None:
        return None
    # A class token may have a position in the file and none in timm (DINOv2 with registers).
    prefixes = (own.shape[1] - grid[0] * grid[1], 0, 1)
    sides = [round(max(0, tokens - prefix) ** 0.5) for prefix in prefixes]
    squares = [
        s for s, prefix in zip(sides, prefixes, strict=True) if s and s * s + prefix == tokens
    ]
    if not squares:
        raise CheckpointError(f"{where}: position embedding for {tokens} tokens is no square grid")
    if tuple(grid) == (squares[0], squares[0]):
        return None
    return int(squares[0] * model.patch_embed.patch_size[0])


def _input_size(model: Any) -> tuple[int, ...]:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return tuple(size or model.pretrained_cfg["input_size"][-2:])


def _patch_size(model: Any, size: int) -> int | None:
    """The side of a patch; raises `EncoderError` if patches do not tile the view."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple | list) else patch
    if side and size % side:
        raise EncoderError(
            f"patches of {side} px do not tile views of {size} px: choose a multiple, such as "
            f"{max(1, round(size / side)) * side}"
        )
    return int(side) if side else None


def _encoder(name: str, request: Request, model: Any, size: int, sha256: str, rule: str) -> Encoder:
    """Put the model behind the common interface, with shapes from one blank view."""
    patch_size = _patch_size(model, size)
    tokens = TimmTokens(model, request.global_token)
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            blank = torch.zeros(1, 3, size, size, device=device)
            grid = tokens.grid(model.forward_features(blank))
            widths = {key: token.shape[-1] for key, token in tokens(blank).items()}
    except (AssertionError, RuntimeError, ValueError) as error:
        raise EncoderError(f"{name} cannot take views of {size} px: {error}") from error
    norm = getattr(model, "norm", None)
    cfg = model.pretrained_cfg
    spec = EncoderSpec(
        name=name,
        source=request.source,
        architecture=request.architecture,
        sha256=sha256,
        global_token=tokens.global_token,
        tap="features" if norm is None or isinstance(norm, nn.Identity) else "norm",
        size=size,
        grid=grid,
        patch_size=patch_size if patch_size and patch_size * grid[0] == size else None,
        cls_width=widths["cls"],
        patch_width=widths["patches"],
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation=cfg["interpolation"],
        position_embedding=rule,
        precision="bf16-autocast" if device.type == "cuda" else "fp32",
        licence=request.licence or cfg.get("license") or "unknown",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    return Encoder(tokens, spec).to(device)
