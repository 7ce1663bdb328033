"""The one way in for every encoder: uint8 views to a global token and patch tokens.

Teachers, students and baselines are the same thing here. `extract.teachers.load_encoder` makes one
by name.

Shapes: B views, H rows and W columns of pixels, P patch tokens, R register tokens, D width.

    views uint8 [B, 3, H, W]
      -> (x / 255 - mean) / std               this encoder's own constants
      -> the model's last tokens              bfloat16 autocast on CUDA, float32 on the CPU
      -> cls [B, D], patches [B, P, D]        float32; registers [B, R, D] where there are any
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from extract.cache.errors import UserError

GlobalToken = Literal["cls", "pool"]


class EncoderError(UserError):
    """An encoder that is unknown, cannot be loaded, or cannot be read at this size."""


@dataclass(frozen=True)
class EncoderSpec:
    """What is recorded about an encoder: all that decides its features, and whose it is.

    Attributes:
        name: what it is called, as its folder in a cache.
        source: where the weights came from: `timm:<tag>`, `folder:<name>`, `file:<name>`,
            `random:<seed>` or `none`.
        architecture: timm's name.
        sha256: of the weights at their own grid, see `weights_sha256`.
        global_token: `cls` (the class token) or `pool` (the model's own pooling).
        tap: `norm` (tokens after the final norm) or `features` (the model ends without one).
        size: side of the square views, in pixels.
        grid: patch rows and columns.
        patch_size: side of a cell of the grid, in pixels, where the model embeds such patches.
        cls_width: D of the global token.
        patch_width: D of the patch tokens.
        mean: of the normalisation, for pixels in [0, 1].
        std: the same.
        interpolation: that the model's preprocessing resizes images with.
        position_embedding: rule by which position embeddings came to this grid, `native` if they
            had it.
        precision: `bf16-autocast` or `fp32`.
        licence: of the weights.
        parameters: their number, without a classifier.
    """

    name: str
    source: str
    architecture: str
    sha256: str
    global_token: str
    tap: str
    size: int
    grid: tuple[int, int]
    patch_size: int | None
    cls_width: int
    patch_width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    position_embedding: str
    precision: str
    licence: str
    parameters: int


class Encoder(nn.Module):
    """A frozen encoder: always in eval mode, without gradients.

    Args:
        tokens: maps normalised pixels `[B, 3, H, W]` to a dict with `cls` and `patches`.
        spec: what it is.
    """

    mean_C11: Tensor  # noqa: N815
    std_C11: Tensor  # noqa: N815

    def __init__(self, tokens: nn.Module, spec: EncoderSpec) -> None:
        super().__init__()
        self.tokens, self.spec = tokens, spec
        for name, values in (("mean_C11", spec.mean), ("std_C11", spec.std)):
            constant_C11 = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, constant_C11, persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the module around it does: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, views_B3HW: Tensor) -> dict[str, Tensor]:
        """Run the encoder.

        Args:
            views_B3HW: pixels, uint8 `[B, 3, size, size]`, on any device.

        Returns:
            `cls` `[B, D]`, `patches` `[B, P, D]` in row-major order of the grid, and further named
            tokens where the model has them (`registers` `[B, R, D]`); float32, on the encoder's
            device.

        Raises:
            ValueError: if the views have another dtype or shape.
        """
        size = self.spec.size
        if views_B3HW.dtype != torch.uint8 or views_B3HW.shape[1:] != (3, size, size):
            raise ValueError(
                f"{self.spec.name} takes uint8 views [B, 3, {size}, {size}], "
                f"got {views_B3HW.dtype} {list(views_B3HW.shape)}"
            )
        device = self.mean_C11.device
        pixels_B3HW = views_B3HW.to(device, non_blocking=True).float().div_(255)
        pixels_B3HW.sub_(self.mean_C11).div_(self.std_C11)
        reduced = self.spec.precision == "bf16-autocast"
        with torch.autocast(device.type, torch.bfloat16, enabled=reduced):
            tokens = self.tokens(pixels_B3HW)
        return {name: token.float() for name, token in tokens.items()}


class TimmTokens(nn.Module):
    """The tokens of any timm model, by one set of rules.

    Patch tokens are what follows the prefix of `forward_features`, so never registers; a feature
    map, channels first or last, is flattened row by row. The global token is the class token, or
    what the model's head pools (`forward_head(pre_logits=True)`).

    Args:
        model: from `timm.create_model`, without a classifier.
        global_token: `cls`, `pool`, or None: `cls` if the model has a class token.

    Raises:
        EncoderError: if `cls` is asked of a model without a class token.
    """

    def __init__(self, model: nn.Module, global_token: str | None = None) -> None:
        super().__init__()
        # A timm model: its attributes are known at run time only.
        self.model: Any = model
        has_cls = getattr(model, "cls_token", None) is not None
        self.global_token = cast(GlobalToken, global_token or ("cls" if has_cls else "pool"))
        if self.global_token not in ("cls", "pool"):
            raise EncoderError(f"global token {global_token!r}: expected 'cls' or 'pool'")
        if self.global_token == "cls" and not has_cls:
            raise EncoderError(
                f"{type(model).__name__} has no class token: its global token can only be 'pool'"
            )
        self.prefix = int(getattr(model, "num_prefix_tokens", 1 if has_cls else 0))
        self.registers = int(getattr(model, "num_reg_tokens", 0))

    def forward(self, pixels_B3HW: Tensor) -> dict[str, Tensor]:
        """Tokens of normalised pixels `[B, 3, H, W]`, see `Encoder.forward`."""
        features = self.model.forward_features(pixels_B3HW)
        if self.global_token == "pool":
            cls_BD = self.model.forward_head(features, pre_logits=True).flatten(1)
        else:
            cls_BD = features[:, 0]
        tokens = {"cls": cls_BD, "patches": self._patches(features)}
        if self.registers:
            tokens["registers"] = features[:, self.prefix - self.registers : self.prefix]
        return tokens

    def grid(self, features: Tensor) -> tuple[int, int]:
        """Patch rows and columns of what `forward_features` gave.

        Raises:
            EncoderError: if they are no patch tokens in a grid.
        """
        if features.ndim == 4:
            rows, columns = features.shape[1:3] if self._last(features) else features.shape[2:4]
            return int(rows), int(columns)
        if features.ndim != 3:
            raise EncoderError(
                f"{type(self.model).__name__} gives features of shape {list(features.shape)}, "
                "expected tokens [B, P, D] or a feature map: it has no patch tokens to cache"
            )
        count = features.shape[1] - self.prefix
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if grid is None or grid[0] * grid[1] != count:
            grid = (round(count**0.5),) * 2
        if grid[0] * grid[1] != count:
            raise EncoderError(f"{type(self.model).__name__} gives {count} tokens, not a grid")
        return int(grid[0]), int(grid[1])

    def _patches(self, features: Tensor) -> Tensor:
        if features.ndim == 4:
            return features.flatten(1, 2) if self._last(features) else features.flatten(2).mT
        return features[:, self.prefix :]

    def _last(self, features: Tensor) -> bool:
        """Whether a feature map has its channels last."""
        width = self.model.num_features
        if features.shape[1] == features.shape[-1] == width:
            return getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return features.shape[-1] == width


def weights_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """The sha256 that identifies weights: names, dtypes, shapes and bytes, sorted by name.

    Args:
        weights: a module, of which parameters and persistent buffers count, or its state dict.

    Returns:
        64 hexadecimal digits.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
