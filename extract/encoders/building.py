"""From a request to the model with its weights, and from the model to an encoder.

    request -> timm's model at the grid of its weights -> sha256 -> at the size of the views
            -> TimmTokens -> one blank view -> EncoderSpec -> Encoder

Weights come from the hub, from a file, or from their authors' URL by way of a file; whichever it
is, all of them are loaded or none.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from extract.encoders.baselines import fixed_seed
from extract.encoders.checkpoints import (
    NATIVE,
    RESIZE_RULES,
    CheckpointError,
    load_strict,
    map_keys,
    own_rule,
    pos_embed_tokens,
    read_checkpoint,
    resize,
)
from extract.encoders.downloads import fetch_weights
from extract.encoders.encoder import Encoder, EncoderError, EncoderSpec, weights_sha256
from extract.encoders.names import Request
from extract.encoders.tokens import TimmTokens

# The model resamples its own position embedding at every forward.
BY_MODEL = "model"


def build_model(request: Request, size: int) -> tuple[nn.Module, str, str]:
    """Make the model of a request for views of `size` px.

    Returns:
        the model; the sha256 of its weights at their own grid; the rule that position embeddings
        were resized by, `native` if they were not.

    Raises:
        EncoderError: if the weights cannot be had or do not fit, or the model cannot be made for
            this size.
    """
    if request.random:
        with fixed_seed():
            model = _create(request, size)
        return model, weights_sha256(model), NATIVE
    model = _with_weights(request)
    sha256 = weights_sha256(model)
    if not request.sized or _input_size(model) == (size, size):
        return model, sha256, NATIVE
    rule = request.rule or own_rule(request.architecture)
    if rule is None:
        raise EncoderError(
            f"{request.model} is right at {_input_size(model)[0]} px only, not at {size} px: use "
            f"timm:naflex{request.architecture}, which is right at every size, or choose one of "
            f"{', '.join(RESIZE_RULES)} for its position embedding all the same"
        )
    target, state = _create(request, size), model.state_dict()
    resized = resize(state, target, request.architecture, rule)
    load_strict(target, resized, f"{request.model} resized to {size} px")
    changed = any(resized[name].shape != state[name].shape for name in resized)
    return target, sha256, rule if changed else NATIVE


def make_encoder(
    name: str, request: Request, model: Any, size: int, sha256: str, rule: str
) -> Encoder:
    """Put the model behind the common interface, with shapes from one blank view.

    Raises `EncoderError` if the model cannot take views of `size` px, or gives no patch tokens.
    """
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
    cfg, card = model.pretrained_cfg, request.card
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
        mean=tuple(card.mean if card else cfg["mean"]),
        std=tuple(card.std if card else cfg["std"]),
        interpolation=cfg["interpolation"],
        position_embedding=BY_MODEL if _resamples_itself(model, grid) else rule,
        precision="bf16-autocast" if device.type == "cuda" else "fp32",
        licence=request.licence or cfg.get("license") or "unknown",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    return Encoder(tokens, spec).to(device)


def _with_weights(request: Request) -> nn.Module:
    """The model at the grid of its weights."""
    if request.url is not None:
        assert request.card is not None
        file = fetch_weights(request.card.name, request.url, request.card.sha256)
        try:
            return _create_from_file(replace(request, file=file))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. It was downloaded from {request.url}: delete {file} to try again"
            ) from error
    return _create_from_hub(request) if request.file is None else _create_from_file(request)


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
    embedding = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    patch = getattr(embedding, "patch_size", None)
    side = patch[0] if isinstance(patch, tuple | list) else patch
    if side and size % side:
        raise EncoderError(
            f"patches of {side} px do not tile views of {size} px: choose a multiple, such as "
            f"{max(1, round(size / side)) * side}"
        )
    return int(side) if side else None


def _resamples_itself(model: Any, grid: tuple[int, int]) -> bool:
    """Whether a position table laid out as a grid [1, H, W, D] is of another grid than this."""
    table = getattr(getattr(model, "embeds", model), "pos_embed", None)
    return isinstance(table, Tensor) and table.ndim == 4 and tuple(table.shape[1:3]) != grid
