"""Linear semantic segmentation from frozen patch tokens, after DINOv2's linear head.

The path of one mini-batch:
1. `train[rows]`            patch tokens, frozen             [B, P, D]
2. `LinearHead`             BN over channels, then linear    [B, C, h, w]
3. `upsample`               bilinear to the mask's size      [B, C, H, W]
4. cross-entropy            255 is ignored; mean over all pixels, as mmsegmentation does
At test, the arg-max over classes enters one confusion matrix over the whole test set.

Shapes: N rows, B rows of a batch, P = h * w patches, D channels, C classes, H x W mask pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

IGNORE = 255
# 40,000 steps of 16 crops (DINOv2), or 80,000 of 8 (UNIC): 31.7 epochs of ADE20K's 20,210 images.
FULL_CROPS = 640_000
FULL_EPOCHS = FULL_CROPS / 20_210
FULL_WARMUP, FULL_STEPS = 1500, 40_000
# Fewer leave the head of a handful of images half trained.
LEAST_STEPS = 500


class FeatureSource(Protocol):
    """Patch tokens by row number: a tensor `[N, P, D]`, or anything that reads them on demand."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Tokens `[B, P, D]`, of any float type, of the rows numbered by an int64 tensor `[B]`."""


@dataclass(frozen=True)
class SegResult:
    """Scores in percent over the whole test set, and the protocol that was followed.

    `per_class_iou` holds NaN for classes in neither prediction nor ground truth; `miou` is the
    mean of the others.
    """

    miou: float
    per_class_iou: list[float]
    pixel_accuracy: float
    steps: int
    batch: int
    lr: float
    train_loss: float
    protocol: str


def segmentation_probe(
    train: FeatureSource,
    train_masks_NHW: Tensor,
    test: FeatureSource,
    test_masks_NHW: Tensor,
    num_classes: int,
    grid: int | tuple[int, int],
    *,
    steps: int | None = None,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> SegResult:
    """Train a linear head on patch tokens and masks, then measure mIoU on the test rows.

    Masks are integers `[N, H, W]`: class numbers below `num_classes`, 255 where ignored. `grid` is
    the patch grid, (rows, columns) or the side of a square one. `progress(step, steps)` is called
    after each training step. The last iterate is tested, with BN's running statistics. The same
    seed gives the same result on the same machine.

    Protocol: DINOv2's linear segmentation, which UNIC follows: 640,000 crops, 31.7 epochs of
    ADE20K. `steps` defaults to as many epochs of the rows given, at least 500 steps and never
    above the 640,000 crops; fewer crops than these are called reduced in `protocol`.

    Raises ValueError for tokens that do not fit the grid or the masks, tokens that are not finite,
    and mask values that are neither a class nor 255.
    """
    height, width = (grid, grid) if isinstance(grid, int) else grid
    _check_rows(train, train_masks_NHW, "train")
    _check_rows(test, test_masks_NHW, "test")
    batch = min(batch, len(train))
    steps = default_steps(len(train), batch) if steps is None else steps
    if min(steps, batch, num_classes) < 1:
        raise ValueError(f"expected at least 1, found {steps=}, {batch=}, {num_classes=}")
    draw = torch.Generator().manual_seed(seed)
    data = _Split(train, train_masks_NHW, num_classes, height, width, "train", device)
    first_BPD, _ = data[torch.arange(1)]
    head = LinearHead(first_BPD.shape[-1], num_classes, height, width, draw).to(device)
    loss = _train(head, data, steps, batch, lr, draw, progress)
    data = _Split(test, test_masks_NHW, num_classes, height, width, "test", device)
    confusion_CC = _test(head, data, batch)
    iou_C = iou_from_confusion(confusion_CC)
    return SegResult(
        miou=float(100 * iou_C.nanmean()),
        per_class_iou=(100 * iou_C).tolist(),
        pixel_accuracy=float(100 * confusion_CC.diag().sum() / confusion_CC.sum()),
        steps=steps,
        batch=batch,
        lr=lr,
        train_loss=loss,
        protocol=_protocol(steps, batch),
    )


def default_steps(rows: int, batch: int) -> int:
    """The protocol's 31.7 epochs of `rows` images, at least 500 steps, at most 640,000 crops."""
    return min(max(LEAST_STEPS, round(FULL_EPOCHS * rows / batch)), FULL_CROPS // batch)


def learning_rate(step: int, steps: int, base: float = 1e-3) -> float:
    """The rate at a step: linear warm-up from 1e-6 of it, times a straight line down to 0.

    Warm-up takes 1,500 steps of 40,000 and more, and the same share of shorter runs.
    """
    warmup = min(FULL_WARMUP, round(steps * FULL_WARMUP / FULL_STEPS))
    ramp = 1.0 if step >= warmup else 1 - (1 - step / warmup) * (1 - 1e-6)
    return base * (1 - step / steps) * ramp


def iou_from_confusion(confusion_CC: Tensor) -> Tensor:
    """IoU of each class `[C]` in float64, from areas summed over all images; NaN where absent.

    Rows of the confusion matrix are ground truth, columns predictions, entries pixel counts.
    """
    both_C = confusion_CC.diag().double()
    # torchmetrics' Jaccard index counts in float32, which loses pixels above 2^24 (64 images of
    # 512 x 512), and calls absent classes 0.
    either_C = (confusion_CC.sum(0) + confusion_CC.sum(1)).double() - both_C
    return both_C / either_C  # 0 / 0 is NaN: in neither, so not part of the mean


def confusion(predicted: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Pixel counts `[C, C]` (ground truth, prediction), without the pixels whose mask is 255."""
    return _counter(num_classes).to(masks.device)(predicted, masks)


class LinearHead(nn.Module):
    """Batch normalisation over channels, then a linear classifier of each patch.

    The same function as SyncBN and a 1x1 convolution on `[B, D, h, w]`, on tokens as they lie.
    Weights N(0, 0.01), biases 0 (DINOv2).
    """

    def __init__(self, width: int, num_classes: int, rows: int, cols: int, draw: torch.Generator):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.classify = nn.Linear(width, num_classes)
        nn.init.normal_(self.classify.weight, std=0.01, generator=draw)
        nn.init.zeros_(self.classify.bias)
        self.rows, self.cols = rows, cols

    def forward(self, patches_BPD: Tensor) -> Tensor:
        """Logits `[B, C, h, w]` of tokens `[B, P, D]`."""
        logits = self.classify(self.norm(patches_BPD.flatten(0, 1)))
        return logits.view(-1, self.rows, self.cols, logits.shape[-1]).permute(0, 3, 1, 2)


def upsample(logits_BChw: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation (align_corners False) to `[B, C, H, W]`.

    As two matrix products with torch's own weights: its gradient on a GPU is deterministic, and on
    a CPU it takes a third of `interpolate`'s time.
    """
    down_hH = _bilinear_weights(logits_BChw.shape[2], height, logits_BChw)
    across_wW = _bilinear_weights(logits_BChw.shape[3], width, logits_BChw)
    return down_hH.T @ logits_BChw @ across_wW


def _bilinear_weights(old: int, new: int, like: Tensor) -> Tensor:
    eye = torch.eye(old, dtype=like.dtype, device=like.device)
    return F.interpolate(eye[None], size=new, mode="linear", align_corners=False)[0]


def _train(
    head: LinearHead,
    data: "_Split",
    steps: int,
    batch: int,
    lr: float,
    draw: torch.Generator,
    progress: Callable[[int, int], None] | None,
) -> float:
    adamw = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.999))
    head.train()
    waiting = torch.empty(0, dtype=torch.long)
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        # Batches run on from one epoch to the next, so that each is full.
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(len(data.tokens), generator=draw)])
        rows_B, waiting = waiting[:batch], waiting[batch:]
        adamw.param_groups[0]["lr"] = learning_rate(step, steps, lr)
        patches_BPD, masks_BHW = data[rows_B]
        loss = pixel_loss(upsample(head(patches_BPD), *masks_BHW.shape[1:]), masks_BHW)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        if progress:
            progress(step + 1, steps)
    loss = loss.detach()
    if not loss.isfinite():
        raise ValueError(f"the head diverged: loss {float(loss)} after {steps} steps at rate {lr}")
    return float(loss)


def pixel_loss(logits_BCHW: Tensor, masks_BHW: Tensor) -> Tensor:
    """Cross-entropy summed over labelled pixels, divided by all pixels (mmsegmentation's mean)."""
    total = F.cross_entropy(logits_BCHW, masks_BHW, ignore_index=IGNORE, reduction="sum")
    return total / masks_BHW.numel()


@torch.no_grad()
def _test(head: LinearHead, data: "_Split", batch: int) -> Tensor:
    head.eval()
    counter = _counter(head.classify.out_features).to(data.device)
    for rows_B in torch.arange(len(data.tokens)).split(batch):
        patches_BPD, masks_BHW = data[rows_B]
        logits_BCHW = upsample(head(patches_BPD), *masks_BHW.shape[1:])
        counter.update(logits_BCHW.argmax(1), masks_BHW)
    confusion_CC = counter.compute().cpu()
    if not confusion_CC.sum():
        raise ValueError("no labelled pixel in the test masks: all are 255")
    return confusion_CC


def _counter(num_classes: int) -> MulticlassConfusionMatrix:
    return MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)


@dataclass(frozen=True)
class _Split:
    """Tokens `[B, P, D]` float32 and masks `[B, H, W]` int64 of given rows, checked."""

    tokens: FeatureSource
    masks: Tensor
    num_classes: int
    height: int
    width: int
    name: str
    device: torch.device | str

    def __getitem__(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        patches_BPD = self.tokens[rows_B]
        if patches_BPD.ndim != 3 or patches_BPD.shape[1] != self.height * self.width:
            raise ValueError(
                f"{self.name}: expected tokens [B, {self.height * self.width}, D] for a grid of "
                f"{self.height} x {self.width} patches, found {list(patches_BPD.shape)}"
            )
        if not patches_BPD.isfinite().all():
            raise ValueError(f"{self.name}: NaN or infinity in the tokens; verify their cache")
        masks_BHW = self.masks[rows_B].long()
        wrong = masks_BHW[
            (masks_BHW != IGNORE) & ((masks_BHW < 0) | (masks_BHW >= self.num_classes))
        ]
        if len(wrong):
            raise ValueError(
                f"{self.name}: expected mask values 0 to {self.num_classes - 1} or {IGNORE}, "
                f"found {wrong.unique().tolist()[:10]}"
            )
        return patches_BPD.to(self.device).float(), masks_BHW.to(self.device)


def _check_rows(tokens: FeatureSource, masks_NHW: Tensor, split: str) -> None:
    if masks_NHW.ndim != 3 or len(tokens) != len(masks_NHW) or not len(tokens):
        raise ValueError(
            f"{split}: expected masks [N, H, W], one for each of {len(tokens)} rows of tokens, "
            f"found {list(masks_NHW.shape)}"
        )


def _protocol(steps: int, batch: int) -> str:
    full = FULL_CROPS // batch
    return f"linear, {steps:,} steps" + (f" (reduced from {full:,})" if steps < full else "")
