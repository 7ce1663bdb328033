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
from typing import Self

import torch
from torch import Tensor, nn

from extract.cache.errors import UserError


class EncoderError(UserError):
    """An encoder that is unknown, cannot be loaded, or cannot be read at this size."""


@dataclass(frozen=True)
class EncoderSpec:
    """What is recorded about an encoder: all that decides its features, and whose it is.

    Attributes:
        name: what it is called, as its folder in a cache.
        source: where the weights came from: `timm:<tag>`, `url:<url>`, `folder:<name>`,
            `file:<name>`, `file:<name>:<function>` (one's own code), `random:<seed>` or `none`.
        architecture: timm's name, or the class of one's own encoder.
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
            had it, `model` if the model itself brings them there at every forward.
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
