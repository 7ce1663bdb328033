"""The tokens of any timm model, by one set of rules.

Shapes: B views, H rows and W columns of pixels, P patch tokens, R register tokens, D width.

    ViT, Eva, NaFlex   [B, 1 + R + P, D], also without class token or registers
    ConvNeXt, SAM      [B, D, rows, columns]
    Swin, Hiera        [B, rows, columns, D], or [B, P, D]
"""

from typing import Any

from torch import Tensor, nn

from extract.encoders.encoder import EncoderError


class TimmTokens(nn.Module):
    """The tokens of any timm model, by one set of rules.

    Patch tokens are what follows the prefix of `forward_features`, so never registers; a feature
    map, channels first or last, is flattened row by row. The global token is the class token, or
    what the model's head pools (`forward_head(pre_logits=True)`).

    Args:
        model: from `timm.create_model`, without a classifier.
        global_token: `cls`, `pool`, or None: `cls` if the model has a class token and does not pool
            by weights of its own (attention, or a norm after the mean).

    Raises:
        EncoderError: if `cls` is asked of a model without a class token.
    """

    def __init__(self, model: nn.Module, global_token: str | None = None) -> None:
        super().__init__()
        # A timm model: its attributes are known at run time only.
        self.model: Any = model
        has_cls = _part(model, "cls_token") is not None
        default = "cls" if has_cls and not _pools_by_weights(model) else "pool"
        self.global_token = global_token or default
        if self.global_token not in ("cls", "pool"):
            raise EncoderError(f"global token {global_token!r}: expected 'cls' or 'pool'")
        if self.global_token == "cls" and not has_cls:
            raise EncoderError(
                f"{type(model).__name__} has no class token: its global token can only be 'pool'"
            )
        registers = _part(model, "reg_token")
        self.prefix = int(getattr(model, "num_prefix_tokens", 1 if has_cls else 0))
        self.registers = registers.shape[1] if isinstance(registers, Tensor) else 0

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
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            found = list(features.shape) if isinstance(features, Tensor) else type(features)
            raise EncoderError(
                f"{type(self.model).__name__} gives features of shape {found}, expected tokens "
                "[B, P, D] or a feature map: it has no patch tokens to cache"
            )
        if features.ndim == 4:
            rows, columns = features.shape[1:3] if self._last(features) else features.shape[2:4]
            return int(rows), int(columns)
        count = features.shape[1] - self.prefix
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if grid is None or grid[0] * grid[1] != count:
            grid = (round(count**0.5),) * 2
        if count < 1 or grid[0] * grid[1] != count:
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


def _part(model: nn.Module, name: str) -> Any:
    """A part of the model; NaFlex models keep theirs in an embedding module."""
    return getattr(getattr(model, "embeds", model), name, None)


def _pools_by_weights(model: nn.Module) -> bool:
    """Whether the head pools by trained weights, so that the class token is a by-product."""
    norm = getattr(model, "fc_norm", None)
    return getattr(model, "attn_pool", None) is not None or (
        norm is not None and not isinstance(norm, nn.Identity)
    )
