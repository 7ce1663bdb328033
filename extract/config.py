"""What one run of `unic-extract` is asked to do, resolved and checked."""

import os
from dataclasses import dataclass
from pathlib import Path

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
