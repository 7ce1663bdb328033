"""What one run of `unic-distill` is asked to do, and the errors of this stage."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from console.command import UserError


class DistillError(UserError):
    """A run that cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class DistillConfig:
    """Arguments of distillation; defaults are the paper's (200 epochs, 10 of warm-up, lr 3e-4).

    `student` is a timm architecture, optionally followed by `key=value` arguments, or a timm
    folder whose architecture (not weights) is taken. `lr` is for a batch of 256 images. `views`
    and `teachers` are everything that the cache has when not given. `workers`, `device`,
    `log_every`, `checkpoint_minutes` and `data` may change when a run is resumed.
    """

    cache: Path | str
    out: Path
    student: str = "vit_base_patch16_224"
    recipe: str = "unic"
    reference: bool = False
    teachers: tuple[str, ...] = ()
    view_recipe: str | None = None
    views: int | None = None
    epochs: int = 200
    batch_size: int = 128
    lr: float = 3e-4
    weight_decay: float = 0.03
    drop: float | None = None
    drop_path: float = 0.1
    warmup_epochs: int = 10
    train_norm: bool = False
    seed: int = 0
    workers: int = 2
    device: str = "auto"
    log_every: int = 50
    checkpoint_minutes: float = 10.0
    data: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "workers", "log_every"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise DistillError(f"{flag} must be at least 1, found {getattr(self, name)}")

    def resolved(self) -> dict[str, Any]:
        """Plain JSON types, as written to `config.json` in the run's folder."""
        return {
            name: str(value)
            if isinstance(value, Path)
            else list(value)
            if isinstance(value, tuple)
            else value
            for name, value in asdict(self).items()
        }


FREE_ON_RESUME = (
    *("cache", "out", "workers", "device", "log_every", "checkpoint_minutes", "data"),
)


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` for every setting that a resumed run must not change."""
    return [
        f"{name}: {stored.get(name)!r} -> {value!r}"
        for name, value in wanted.items()
        if name not in FREE_ON_RESUME and stored.get(name) != value
    ]
