"""Distil a pretrained ViT and a teacher of one's own on real pictures, from nothing.

    uv run --group emoji examples/emoji/run.py --work emoji-work

Every step is skipped when its result is there, so the same command goes on where it stopped.
`--images` takes the unpacked npm package where there is no npm.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from dataset import Packed, fetch_package, pack_splits, read_emoji, split_emoji
from pretrained import SIZE, compare, convert, find_onnx
from supervised import TrainConfig, read_labelled, train_teacher
from torch import Tensor

from extract.cache.errors import UserError
from extract.cache.images import decode, index_tar
from extract.cache.views import draw_view, parse_recipe

COMPARED = 8

PROJECT = """\
data = "images/distill-*.tar"
cache = "feats"
runs = "runs"
recipe = "unic@112"
views = 2
student = "vit_tiny_patch16_224 patch_size=14 depth=6"
epochs = 40
batch_size = 32
learning_rate = 8e-3
drop_path = 0.0
warmup_epochs = 1

[teachers]
pretrained = "models/pretrained"
own = "models/own"

[tasks.heldout]
train = "images/heldout-a.tar"
test = "images/heldout-b.tar"
"""

ENCODERS = (
    *("pretrained", "own", "random:runs/unic/student", "pixels:14"),
    "runs/unic/student",
)
COMMANDS = (
    ("unic-extract", "--teacher", "pretrained", "--teacher", "own", "--store-views"),
    ("unic-distill",),
    *(
        ("unic-eval", task, *(word for name in ENCODERS for word in ("--encoder", name)))
        for task in ("knn", "classification")
    ),
)


def prepare_images(work: Path, images: Path | None) -> Packed:
    splits = split_emoji(read_emoji(images or fetch_package(work / "npm")))
    packed = pack_splits(splits, work / "images")
    print(
        f"images: {len(splits.distill):,} to distil on ({len(splits.seen)} classes and small "
        f"subcategories), {len(splits.half_a)} + {len(splits.half_b)} of {len(splits.held_out)} "
        "held-out classes"
    )
    return packed


def prepare_pretrained(folder: Path, views_B3HW: Tensor) -> None:
    source = find_onnx()
    if not (folder / "config.json").is_file():
        convert(source, folder)
    found = compare(folder, source, views_B3HW)
    print(
        f"pretrained: timm against onnxruntime on {found.images} pictures at {SIZE} px: relative "
        f"L2 {found.relative_l2:.1e}, largest difference {found.largest:.1e}, lowest cosine "
        f"{found.cosine:.7f}"
    )


def prepare_own(folder: Path, tars: Sequence[Path]) -> None:
    if (folder / "config.json").is_file():
        return
    accuracy = train_teacher(*read_labelled(tars), folder, TrainConfig())
    print(f"own teacher: training top-1 {accuracy:.1f} % on augmented views")


def centre_views(tar: Path, count: int) -> Tensor:
    """The first pictures of a tar as `unic-eval` shows them, uint8 `[count, 3, 224, 224]`."""
    recipe, index = parse_recipe(f"center@{SIZE}"), index_tar(tar)
    views = []
    for sample in index.samples[:count]:
        image = decode(index.read(sample, "png"), sample.key)
        height, width = image.shape[1:]
        drawn = draw_view(recipe, 0, tar.stem, sample.ordinal, sample.key, 0, height, width)
        views.append(recipe.apply(image, drawn))
    return torch.stack(views)


def prepare(work: Path, images: Path | None) -> None:
    packed = prepare_images(work, images)
    prepare_pretrained(work / "models/pretrained", centre_views(packed.half_a, COMPARED))
    prepare_own(work / "models/own", packed.distill)
    (work / "unic.toml").write_text(PROJECT, encoding="utf-8")


def run_commands(work: Path) -> None:
    """The three commands, as one would type them in the work folder."""
    for command in COMMANDS:
        print(f"\n$ {' '.join(command)}", flush=True)
        program = Path(sys.executable).with_name(command[0])
        done = subprocess.run([program, *command[1:]], cwd=work)
        if done.returncode:
            raise UserError(f"{command[0]} stopped with exit code {done.returncode}, see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("emoji-work"), help="folder to work in")
    parser.add_argument("--images", type=Path, help="the unpacked npm package, if you have it")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        prepare(arguments.work, arguments.images)
        run_commands(arguments.work)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
