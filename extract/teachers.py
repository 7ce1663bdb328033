"""Every encoder by name.

    dino, deit3, ibot, dbot-ft, dinov2-g, metaclip-h
                       the teachers of the paper, from the hub, their authors, or --weights FILE
    timm:TAG           any model that timm knows, such as timm:vit_small_patch14_dinov2.lvd142m
    FOLDER             a timm folder (config.json, model.safetensors), or a run that has student/
    FILE.py:FUNCTION   one's own encoder, see `extract.encoders.custom`
    random:NAME        the same model untrained; NAME is a teacher, a timm architecture or a folder
    pixels[:PATCH]     the pixels themselves
    OTHER=NAME         any of these under a name of its own in the cache

A timm folder's `config.json` may say, beside timm's own keys, `"position_embedding"` (a rule of
`extract.encoders.checkpoints.RESIZE_RULES`) and `"global_token"` (`cls` or `pool`).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from extract.encoders.baselines import pixel_encoder
from extract.encoders.building import build_model, make_encoder
from extract.encoders.checkpoints import RESIZE_RULES
from extract.encoders.custom import custom_encoder
from extract.encoders.encoder import Encoder, EncoderError
from extract.encoders.names import OWN_CODE, Request, encoder_folder, resolve, split_alias
from extract.encoders.registry import TEACHERS, TeacherCard, available_teachers

__all__ = [
    "TEACHERS",
    "EncoderError",
    "TeacherCard",
    "available_teachers",
    "encoder_folder",
    "load_encoder",
]


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
        name: of a teacher, timm model, folder, file of one's own or baseline.
        size: side of the square views, in pixels; position embeddings of another size are resized.
        weights: a checkpoint file, loaded strictly in place of the model's own weights.
        device: where it runs; on CUDA under bfloat16 autocast.
        model_name: timm model that `weights` are for, where `name` is only what to call it. Its tag
            decides the normalisation: `vit_base_patch16_224.dino` has ImageNet's mean and std.
        model_args: further arguments of `timm.create_model`, such as `embed_dim`.
        position_embedding: how to resize, one of `RESIZE_RULES` in `extract.encoders.checkpoints`;
            None takes what the folder says, else the architecture's own rule.
        global_token: `cls` or `pool`; None takes what the teacher or folder says, else the class
            token where there is one, unless the model pools by trained weights.

    Returns:
        the encoder, frozen.

    Raises:
        EncoderError: if the name is unknown, the weights cannot be had or do not fit, or the model
            cannot take views of this size.
    """
    alias, target = split_alias(name)
    if target.partition(":")[0] == "pixels":
        if weights is not None:
            raise EncoderError(f"{name} has no weights: leave out --weights {weights}")
        return _pixels(alias or target, target, size, device)
    if OWN_CODE.fullmatch(target) and model_name is None:
        if weights is not None or model_args or position_embedding or global_token:
            raise EncoderError(
                f"{name} is code of your own, which loads its weights and makes its model itself: "
                "leave out --weights and other arguments"
            )
        return custom_encoder(encoder_folder(name), target, size=size, device=device)
    request = resolve(f"timm:{model_name}" if model_name else target)
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
        request = _from_file(request, Path(weights))
    if request.rule is not None and request.rule not in RESIZE_RULES:
        raise EncoderError(
            f"unknown rule {request.rule!r} for position embeddings, expected one of "
            f"{', '.join(RESIZE_RULES)}"
        )
    model, sha256, rule = build_model(request, size)
    called = name if model_name else encoder_folder(name)
    return make_encoder(called, request, model.to(device).eval(), size, sha256, rule)


def _from_file(request: Request, file: Path) -> Request:
    """The same model with weights of a file, whose licence is known for the teachers alone."""
    licence = request.licence if request.card is not None else "unknown"
    return replace(request, file=file, native=False, licence=licence)


def _pixels(name: str, target: str, size: int, device: torch.device | str) -> Encoder:
    patch = target.partition(":")[2] or "16"
    if not patch.isdecimal():
        raise EncoderError(f"{name}: expected a patch size in pixels, as in pixels:16")
    return pixel_encoder(name, size=size, patch_size=int(patch), device=device)
