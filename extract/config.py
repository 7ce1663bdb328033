"""What one run of `unic-extract` is asked to do, resolved and checked."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from extract.cache.errors import UserError


@dataclass(frozen=True)
class ExtractConfig:
    """Arguments of extraction. `views` counts views an image; `workers` are decoding threads.

    With `replace`, features that another encoder made under the same name are deleted and made
    anew (for caches of evaluation, where a student is trained again and again); without, they are
    an error.
    """

    data: tuple[str, ...]
    cache: Path
    teachers: tuple[str, ...]
    recipe: str = "unic@224"
    views: int = 4
    seed: int = 0
    batch_size: int = 64
    workers: int = max(1, min(8, os.cpu_count() or 1))
    store_views: bool = False
    weights: Path | None = None
    device: str = "auto"
    replace: bool = False

    def __post_init__(self) -> None:
        for name in ("views", "batch_size", "workers"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} must be at least 1, found {getattr(self, name)}")
        if not self.teachers:
            raise UserError("name at least one encoder, for example --teacher dino")
        if self.weights is not None and len(self.teachers) != 1:
            raise UserError(
                f"--weights goes with exactly one --teacher, found {len(self.teachers)}; "
                "run unic-extract once for each, the views are shared through the cache"
            )

    def torch_device(self) -> torch.device:
        """The device: as named, else the first CUDA device, else the CPU."""
        if self.device != "auto":
            try:
                device = torch.device(self.device)
            except RuntimeError:
                raise UserError(
                    f"--device {self.device!r} is no device; expected cpu, cuda or cuda:N"
                ) from None
            if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
                raise UserError(
                    f"--device {self.device}: this machine has {torch.cuda.device_count()} CUDA "
                    "devices that torch can use; choose another, or --device cpu"
                )
            return device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
