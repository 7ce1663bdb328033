"""What one call of `unic-eval` is asked to do."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvalConfig:
    """Arguments of evaluation; `name` and `classes` describe the data set where they are known.

    `encoders` are written as for `unic-extract`; `size` is the side of the centre view in pixels;
    `steps` are those of the segmentation head, its protocol's where not given.
    """

    task: str
    encoders: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    cache: Path | str
    results: Path
    name: str = ""
    classes: tuple[str, ...] = ()
    size: int = 224
    seed: int = 0
    batch_size: int = 64
    workers: int = 2
    device: str = "auto"
    steps: int | None = None
