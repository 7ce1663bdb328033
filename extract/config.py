"""What one run of `unic-extract` is asked to do, resolved and checked."""

import os
from dataclasses import dataclass
from pathlib import Path

from extract.cache.errors import UserError
from extract.cache.schema import CODECS

TOKENS = ("all", "cls")
PIXELS = ("raw", "jpeg")


@dataclass(frozen=True)
class ExtractConfig:
    """Arguments of extraction. `views` counts views an image; `workers` are decoding threads.

    `codec` stores patch tokens (None: as the cache has it, fp16 at first); `tokens` is `all` or
    `cls`; `patches` keeps that many patch tokens of each view (None: as the cache has it, all at
    first); `store_views` keeps pixels, `raw` or `jpeg`. With `skip_bad`, images that cannot be
    decoded are recorded and left out, up to the share `max_bad` of all. `shard_index` of
    `num_shards` says which tars this process begins with. With `replace`, features that another
    encoder made under the same name are deleted and made anew (for caches of evaluation, where a
    student is trained again and again); without, they are an error.
    """

    data: tuple[str, ...]
    cache: Path | str
    teachers: tuple[str, ...]
    recipe: str = "unic@224"
    views: int = 4
    seed: int = 0
    batch_size: int = 64
    workers: int = max(1, min(8, os.cpu_count() or 1))
    codec: str | None = None
    tokens: str = "all"
    patches: int | None = None
    store_views: str = ""
    skip_bad: bool = False
    max_bad: float = 0.001
    shard_index: int = 0
    num_shards: int = 1
    weights: Path | None = None
    device: str = "auto"
    replace: bool = False

    def __post_init__(self) -> None:
        for name in ("views", "batch_size", "workers", "patches", "num_shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{_flag(name)} must be at least 1, found {value}")
        choices = {"codec": (None, *CODECS), "tokens": TOKENS, "store_views": ("", *PIXELS)}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(
                    f"{_flag(name)} {value!r} is unknown: expected one of "
                    f"{', '.join(choice for choice in known if choice)}"
                )
        if not 0 <= self.shard_index < self.num_shards:
            raise UserError(
                f"--shard-index must be from 0 to {self.num_shards - 1} (one less than "
                f"--num-shards), found {self.shard_index}"
            )
        if not self.teachers:
            raise UserError("name at least one encoder, for example --teacher dino")
        if self.weights is not None and len(self.teachers) != 1:
            raise UserError(
                f"--weights goes with exactly one --teacher, found {len(self.teachers)}; "
                "run unic-extract once for each, the views are shared through the cache"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
