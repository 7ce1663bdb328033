"""The student: a timm ViT read after every block.

Shapes: B images, P patch tokens, D width of the encoder, L blocks.

    images [B, 3, H, W]
      -> patch embedding + CLS token + position embedding
      -> block 1..L             each one's raw residual output feeds the projectors: forward()
      -> final norm             what the student's user gets: features()
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from distill.droppath import install

# What concerns the making of the model, not its shape: not needed to build it again.
_NOT_SHAPE = ("pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg_overlay")


class Student(nn.Module):
    """A timm ViT whose forward gives every block's output.

    The projectors read the residual stream before the final norm, as the reference does, so the
    norm would never get a gradient. It is therefore a frozen identity affine (weight 1, bias 0),
    a plain LayerNorm in effect, and the encoder works with plain DistributedDataParallel.

    Args:
        arch: timm architecture, such as `vit_base_patch16_224`.
        img_size: side of the square input in pixels; None keeps the architecture's.
        drop_path_rate: rate of the last block; linear from 0 over the depth (method: 0.1).
        train_norm: train the final norm; the last block's output is then read through it.
        **kwargs: further arguments of `timm.create_model` (`patch_size`, `embed_dim`, ...).

    Attributes:
        encoder: the timm model, without a head.
        width: D.
        depth: L.
        grid: patch rows and columns.
        patch_size: pixels, rows and columns.
        image_size: pixels, rows and columns.
        model_args: what `timm.create_model(arch, num_classes=0, ...)` needs to build it again.

    Raises:
        ValueError: if the architecture has no class token, no final LayerNorm or no block list.
    """

    # A timm ViT: its attributes are known at run time only.
    encoder: Any
    width: int
    depth: int
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    image_size: tuple[int, int]

    def __init__(
        self,
        arch: str,
        *,
        img_size: int | None = None,
        drop_path_rate: float = 0.1,
        train_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
        self.arch, self.train_norm = arch, train_norm
        self.model_args = {k: v for k, v in (kwargs | size).items() if k not in _NOT_SHAPE}
        self.encoder = timm.create_model(
            arch, num_classes=0, drop_path_rate=drop_path_rate, **kwargs, **size
        )
        _require_vit(self.encoder, arch)
        self.width = self.encoder.embed_dim
        self.depth = len(self.encoder.blocks)
        self.grid = tuple(self.encoder.patch_embed.grid_size)
        self.patch_size = tuple(self.encoder.patch_embed.patch_size)
        self.image_size = tuple(self.encoder.patch_embed.img_size)
        if not train_norm:
            _freeze_as_identity(self.encoder.norm)
        self._masks = install(self.encoder)

    def set_step(self, seed: int, step: int, offset: int, global_batch: int) -> None:
        """Draw the drop-path masks of one training step; needed before each when the rate > 0.

        Args:
            seed: seed of the run.
            step: optimisation step, the same in every process.
            offset: position of this process's first image in the global batch.
            global_batch: images of all processes together.
        """
        device = next(self.parameters()).device
        self._masks.set_step(seed, step, offset, global_batch, device)

    def forward(self, images_B3HW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Run the encoder and keep what each block gives (the z^l of Eq. 3).

        Args:
            images_B3HW: normalised pixels `[B, 3, H, W]`.

        Returns:
            L pairs (CLS token `[B, D]`, patch tokens `[B, P, D]`), blocks 1 to L, before the final
            norm (the last one after it with `train_norm`). Register tokens are left out.
        """
        outputs = self.encoder.forward_intermediates(
            images_B3HW,
            output_fmt="NLC",
            norm=False,
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        pairs = [(prefix[:, 0], patches_BPD) for patches_BPD, prefix in outputs]
        if self.train_norm:
            pairs[-1] = (self.encoder.norm(pairs[-1][0]), self.encoder.norm(pairs[-1][1]))
        return pairs

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Compute what the exported student's `forward_features` gives.

        Args:
            images_B3HW: normalised pixels `[B, 3, H, W]`.

        Returns:
            tokens `[B, prefix + P, D]` after the final norm; token 0 is the CLS token.
        """
        return self.encoder.forward_features(images_B3HW)


def _require_vit(encoder: Any, arch: str) -> None:
    """Refuse an architecture that the distillation cannot read."""
    if not hasattr(encoder, "blocks") or not hasattr(encoder, "forward_intermediates"):
        raise ValueError(
            f"student {arch!r} is a {type(encoder).__name__}; expected a ViT with a list of "
            "blocks, such as vit_small_patch16_224"
        )
    if getattr(encoder, "cls_token", None) is None:
        raise ValueError(
            f"student {arch!r} has no class token, and the teachers' CLS tokens need one to learn "
            "from; choose an architecture with one, such as vit_small_patch16_224"
        )
    if not isinstance(encoder.norm, nn.LayerNorm):
        raise ValueError(
            f"student {arch!r} ends in {type(encoder.norm).__name__}, expected a LayerNorm over "
            "tokens; pass global_pool='token'"
        )


def _freeze_as_identity(norm: nn.LayerNorm) -> None:
    with torch.no_grad():
        for value, parameter in ((1.0, norm.weight), (0.0, norm.bias)):
            if parameter is not None:
                parameter.fill_(value).requires_grad_(False)
