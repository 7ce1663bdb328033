"""How the demo's two teachers were made: `python -m demo.train_teachers`, minutes on two cores.

    scenes_supervised   cross-entropy on the scenes' classes: its CLS token knows what stands there
    scenes_masked       masked feature prediction (after MaskFeat, Wei et al. 2022): gradients and
                        colours of hidden patches from those around them; no label is ever seen

Both are the same tiny ViT, on 8,000 scenes of seeds that the demo never uses.
B = batch, P = 36 patches, D = 64 channels, C = 12 numbers that describe a patch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from demo.scenes import CLASSES, SIZE, scene

ARCHITECTURE = "vit_tiny_patch16_224"
PATCH, WIDTH, HEADS = 8, 64, 4
ORIENTATIONS, HIDDEN = 8, 0.4
DESCRIBED = ORIENTATIONS + 4
MODEL: dict[str, Any] = {
    **{"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 4, "num_heads": HEADS},
    "num_classes": 0,
}
SEED, SCENES, BATCH = 1_000_000, 8_000, 128
FOLDER = Path(__file__).parent / "teachers"

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Supervised(nn.Module):
    """Cross-entropy of a linear classifier on the CLS token."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, len(CLASSES))

    def forward(self, model: nn.Module, pixels_B3SS: Tensor, labels_B: Tensor) -> Tensor:
        """The batch's loss."""
        return F.cross_entropy(self.head(model(pixels_B3SS)), labels_B, label_smoothing=0.1)


class Masked(nn.Module):
    """Masked feature prediction: what a hidden patch looks like, told from those around it."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(WIDTH))
        self.patches = nn.Linear(WIDTH, DESCRIBED)
        self.image = nn.Linear(WIDTH, DESCRIBED)

    def forward(self, model: Any, pixels_B3SS: Tensor, labels_B: Tensor) -> Tensor:
        """The batch's loss; labels are not looked at."""
        target_BPC = describe(pixels_B3SS)
        hidden_BP1 = torch.rand(*target_BPC.shape[:2], 1) < HIDDEN
        tokens_BPD = torch.where(hidden_BP1, self.mask, model.patch_embed(pixels_B3SS))
        encoded = model.norm(model.blocks(model._pos_embed(tokens_BPD)))
        dense = F.smooth_l1_loss(self.patches(encoded[:, 1:]), target_BPC)
        return dense + F.smooth_l1_loss(self.image(encoded[:, 0]), target_BPC.mean(1))


def describe(pixels_B3SS: Tensor) -> Tensor:
    """Look of each patch `[B, P, 12]`: 8 gradient orientations (as HOG), contrast, mean colour."""
    grey = F.pad(pixels_B3SS.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]
    down = grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    strength = (across.square() + down.square() + 1e-6).sqrt()
    angle = torch.atan2(down, across) % torch.pi / torch.pi * ORIENTATIONS
    bins = torch.arange(ORIENTATIONS)[:, None, None]
    distance = (angle - bins).abs()
    share = (1 - torch.minimum(distance, ORIENTATIONS - distance)).clamp(min=0) * strength
    shares = F.avg_pool2d(share, PATCH)
    contrast = shares.sum(1, keepdim=True)
    colour = F.avg_pool2d(pixels_B3SS, PATCH)
    maps = [8 * shares / (contrast + 0.1), (contrast + 0.01).log(), 2 * colour]
    return torch.cat(maps, 1).flatten(2).mT


OBJECTIVES = {"supervised": (Supervised, 20), "masked": (Masked, 24)}


def load_scenes() -> tuple[Tensor, Tensor]:
    """All training scenes: uint8 `[N, 3, S, S]` and labels `[N]`."""
    drawn = [scene(SEED, index) for index in range(SCENES)]
    images = torch.from_numpy(np.stack([s.image for s in drawn])).permute(0, 3, 1, 2)
    return images.contiguous(), torch.tensor([s.label for s in drawn])


def augment(images_B3SS: Tensor) -> Tensor:
    """Random crops, flips, grey and light; pixels in about [-1, 1]."""
    batch = len(images_B3SS)
    pixels = (images_B3SS.float() / 255 - 0.5) / 0.5
    zoom = torch.empty(batch).uniform_(0.6, 1.05)
    place = torch.zeros(batch, 2, 3)
    place[:, 0, 0] = zoom * (torch.rand(batch) < 0.5).float().mul(2).sub(1)
    place[:, 1, 1] = zoom
    place[:, :, 2] = (torch.rand(batch, 2) * 2 - 1) * (1 - zoom).clamp(min=0)[:, None]
    grid = F.affine_grid(place, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    grey = (torch.rand(batch, 1, 1, 1) < 0.1).float()
    pixels = pixels * (1 - grey) + pixels.mean(1, keepdim=True) * grey
    contrast = torch.empty(batch, 1, 1, 1).uniform_(0.6, 1.4)
    return pixels * contrast + torch.empty(batch, 1, 1, 1).uniform_(-0.2, 0.2)


def train(objective: str, images: Tensor, labels: Tensor) -> nn.Module:
    """Train one teacher; AdamW with a one-cycle schedule."""
    torch.manual_seed(0)
    kind, epochs = OBJECTIVES[objective]
    model = timm.create_model(ARCHITECTURE, drop_path_rate=0.05, **MODEL)
    loss_of = kind()
    parameters = [*model.parameters(), *loss_of.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05, betas=(0.9, 0.98))
    steps = epochs * (SCENES // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    for epoch in range(epochs):
        for rows in torch.randperm(SCENES)[: SCENES // BATCH * BATCH].split(BATCH):
            loss = loss_of(model, augment(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        typer.echo(f"{objective}: epoch {epoch + 1} of {epochs}, loss {loss.item():.4f}")
    return model.eval()


def save(objective: str, model: nn.Module) -> Path:
    """Write the teacher as a timm folder, weights in half precision."""
    folder = FOLDER / f"scenes_{objective}"
    facts = {
        "tag": f"scenes_{objective}",
        "license": "apache-2.0",
        "input_size": [3, SIZE, SIZE],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    timm.models.save_for_hf(
        model.half(),
        str(folder),
        model_config={"pretrained_cfg": facts},
        model_args=MODEL,
        safe_serialization=True,
    )
    return folder


def main(objective: str = "all") -> None:
    """Train the teachers (or the one named) and write them beside this file."""
    images, labels = load_scenes()
    for name in OBJECTIVES if objective == "all" else [objective]:
        typer.echo(f"written to {save(name, train(name, images, labels))}")


if __name__ == "__main__":
    typer.run(main)
