"""A teacher of one's own: a small ViT trained on the seen classes, in minutes on two cores.

Shapes: N pictures, B of them in a step, C classes, S side of the view in pixels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision.transforms import v2

from extract.cache.images import decode, index_tar

ARCHITECTURE = "vit_tiny_patch16_224"
LICENCE = "cc-by-4.0"  # its pictures are; credit Twemoji


@dataclass(frozen=True)
class TrainConfig:
    """How the teacher is trained; `depth` and `patch_size` shape the ViT of width 192."""

    size: int = 112
    patch_size: int = 14
    depth: int = 4
    epochs: int = 36
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    smoothing: float = 0.1
    seed: int = 0

    @property
    def model_args(self) -> dict[str, Any]:
        """What timm needs to make the encoder."""
        return {"img_size": self.size, "patch_size": self.patch_size, "depth": self.depth}


def read_labelled(tars: Sequence[Path]) -> tuple[list[Tensor], Tensor]:
    """Pictures uint8 `[3, H, W]` and class numbers `[N]` of the samples that have a `.cls`."""
    pictures, labels = [], []
    for path in tars:
        index = index_tar(path)
        for sample in index.samples:
            if "cls" in sample.members:
                labels.append(int(index.read(sample, "cls")))
                pictures.append(decode(index.read(sample, "png"), sample.key))
    return pictures, torch.tensor(labels)


def train_teacher(
    pictures: Sequence[Tensor],
    labels_N: Tensor,
    folder: Path,
    config: TrainConfig,
    progress: Callable[[str], None] = print,
) -> float:
    """Train on all of `pictures` and write the encoder, without its classifier, as a timm folder.

    Returns the training accuracy of the last epoch in percent, augmented views. Nothing is held
    back to choose anything by: the recipe is fixed, and evaluation is on classes unseen here.
    """
    torch.manual_seed(config.seed)
    classes = int(labels_N.max()) + 1
    model = timm.create_model(
        ARCHITECTURE, num_classes=classes, drop_path_rate=0.1, **config.model_args
    )
    accuracy = _fit(model, pictures, labels_N, config, progress)
    # A timm model: its methods are known at run time only.
    model.reset_classifier(0)  # type: ignore[operator]
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={
            "pretrained_cfg": {
                "tag": "emoji",
                "license": LICENCE,
                "input_size": [3, config.size, config.size],
                "mean": list(IMAGENET_DEFAULT_MEAN),
                "std": list(IMAGENET_DEFAULT_STD),
                "crop_pct": 1.0,
                "interpolation": "bicubic",
            },
            "trained_on": "Twemoji, (c) Twitter, Inc. and other contributors, CC BY 4.0",
        },
        model_args=config.model_args,
        safe_serialization=True,
    )
    return accuracy


class _Augmented(Dataset[tuple[Tensor, int]]):
    """Pictures with their classes, drawn anew each time."""

    def __init__(
        self, pictures: Sequence[Tensor], labels_N: Tensor, augment: Callable[[Tensor], Tensor]
    ) -> None:
        self.pictures, self.labels, self.augment = pictures, labels_N.tolist(), augment

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.augment(self.pictures[row]), self.labels[row]


def _fit(
    model: nn.Module,
    pictures: Sequence[Tensor],
    labels_N: Tensor,
    config: TrainConfig,
    progress: Callable[[str], None],
) -> float:
    steps = config.epochs * (len(pictures) // config.batch_size)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    draw = torch.Generator().manual_seed(config.seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    # A rare class would otherwise hardly be met beside 252 flags.
    weight_N = 1 / labels_N.bincount()[labels_N].sqrt()
    loader = DataLoader(
        _Augmented(pictures, labels_N, _augmentation(config.size)),
        batch_size=config.batch_size,
        sampler=WeightedRandomSampler(weight_N.tolist(), len(pictures), generator=draw),
        # In a process of its own: torch's threads get in each other's way on such small pictures.
        num_workers=1,
        persistent_workers=True,
        drop_last=True,
        generator=draw,
    )
    began, accuracy = time.monotonic(), 0.0
    model.train()
    for epoch in range(config.epochs):
        hits = 0
        for views_B3SS, labels_B in loader:
            logits_BC = model(views_B3SS)
            loss = F.cross_entropy(logits_BC, labels_B, label_smoothing=config.smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            hits += int((logits_BC.argmax(1) == labels_B).sum())
        accuracy = 100 * hits / (len(loader) * config.batch_size)
        if (epoch + 1) % 5 == 0:
            progress(
                f"own teacher: epoch {epoch + 1}/{config.epochs}, training top-1 {accuracy:.1f} %, "
                f"{time.monotonic() - began:.0f} s"
            )
    return accuracy


def _augmentation(size: int) -> v2.Compose:
    """Crops, flips and colours; mild, for pictures that are already centred and small."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(degrees=15, translate=(0.1, 0.1), fill=255),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.1),
            # Last: the pictures are 64 px, and all before is cheaper on those.
            v2.RandomResizedCrop(size, scale=(0.4, 1.0), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
