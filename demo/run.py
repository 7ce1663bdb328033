"""The demo: scenes, two tiny teachers, and the three stages by the same code as the commands.

images/{train,test}-*.tar   scenes with class, mask and depth labels  (demo.scenes)
teachers/*                  two tiny ViTs, trained on other scenes     (demo.train_teachers)
unic.toml                   makes the folder a project
feats/, runs/unic/          what unic-extract and unic-distill leave
results.json, features.png  scores, and PCA of patch tokens side by side
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from console.project import read_project
from demo.scenes import CATEGORIES, SIZE, write_tars
from distill.config import DistillConfig
from distill.run import distill
from evaluate.config import EvalConfig
from evaluate.encoder import Split
from evaluate.pictures import pca_panel
from evaluate.run import evaluate, split
from evaluate.table import Score
from extract.cache.errors import UserError
from extract.config import ExtractConfig
from extract.run import extract

WEIGHTS = Path(__file__).parent / "teachers"
TASK = "scenes"
PATCH = 8


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults take about two minutes on one core."""

    folder: Path
    seed: int = 0
    train_images: int = 1500
    test_images: int = 500
    views: int = 4
    epochs: int = 24
    batch_size: int = 32
    lr: float = 4e-2
    drop_path: float = 0.0
    warmup_epochs: int = 2
    probe_steps: int = 600


class DemoError(UserError):
    """A demo folder that cannot be used."""


def teachers() -> dict[str, Path]:
    """The teachers that come with the demo, by name."""
    return {path.parent.name: path.parent for path in sorted(WEIGHTS.glob("*/config.json"))}


def demo(config: DemoConfig) -> list[Score]:
    """Make the project folder, run the three stages in it, draw the picture; return all scores.

    Raises `DemoError` when the folder holds something else.
    """
    prepare(config)
    names = [f"{name}={config.folder / 'teachers' / name}" for name in teachers()]
    cache = config.folder / "feats"
    extract(
        ExtractConfig(
            data=(str(config.folder / "images" / "train-*.tar"),),
            cache=cache,
            teachers=tuple(names),
            recipe=f"unic@{SIZE}",
            views=config.views,
            seed=config.seed,
            store_views="raw",
        )
    )
    distill(
        DistillConfig(
            cache=cache,
            out=config.folder / "runs" / "unic",
            student=student(config.folder),
            view_recipe=f"unic@{SIZE}",
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            drop_path=config.drop_path,
            warmup_epochs=config.warmup_epochs,
            seed=config.seed,
        )
    )
    baselines = [f"random:{student(config.folder)}", f"pixels:{PATCH}"]
    encoders = (*names, *baselines, f"unic={config.folder / 'runs' / 'unic' / 'student'}")
    scores = []
    for task in ("classification", "segmentation"):
        scores += evaluate(evaluation(config, task, encoders))
    draw(split(evaluation(config, "segmentation", encoders), "test"), config.folder)
    return scores


def student(folder: Path) -> str:
    """The student has its teachers' architecture."""
    return str(folder / "teachers" / next(iter(teachers())))


def evaluation(config: DemoConfig, task: str, encoders: tuple[str, ...]) -> EvalConfig:
    """What `unic-eval TASK` would be asked in the demo's folder."""
    images = config.folder / "images"
    return EvalConfig(
        task=task,
        encoders=encoders,
        train=(str(images / "train-*.tar"),),
        test=(str(images / "test-*.tar"),),
        cache=config.folder / "feats",
        results=config.folder / "results.json",
        name=TASK,
        classes=CATEGORIES,
        size=SIZE,
        seed=config.seed,
        steps=config.probe_steps,
    )


def prepare(config: DemoConfig) -> None:
    """Scenes, teachers and `unic.toml`; what is there already from the same settings is kept."""
    text = project_file(config)
    marker = config.folder / "unic.toml"
    if config.folder.exists() and any(config.folder.iterdir()):
        if not marker.exists() or marker.read_text() != text:
            raise DemoError(
                f"{config.folder} holds something else, or a demo with other settings: delete it, "
                "or choose another with --folder"
            )
        read_project(config.folder)
    config.folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(text)
    images = config.folder / "images"
    write_tars(images, "train", 2 * config.seed, config.train_images)
    write_tars(images, "test", 2 * config.seed + 1, config.test_images)
    for name, folder in teachers().items():
        shutil.copytree(folder, config.folder / "teachers" / name, dirs_exist_ok=True)


def project_file(config: DemoConfig) -> str:
    """The demo's `unic.toml`."""
    named = "\n".join(f'{name} = "teachers/{name}"' for name in teachers())
    categories = ", ".join(f'"{name}"' for name in CATEGORIES)
    return f"""# In this folder, unic-extract, unic-distill and unic-eval know what they need.
data = "images/train-*.tar"
cache = "feats"
runs = "runs"
recipe = "unic@{SIZE}"
views = {config.views}
seed = {config.seed}
student = "teachers/{next(iter(teachers()))}"
epochs = {config.epochs}
batch_size = {config.batch_size}
learning_rate = {config.lr}
drop_path = {config.drop_path}
warmup_epochs = {config.warmup_epochs}

[teachers]
{named}

[tasks.{TASK}]
train = "images/train-*.tar"
test = "images/test-*.tar"
classes = [{categories}]
"""


def draw(test: Split, folder: Path, rows: int = 6) -> None:
    """`features.png`: scenes, their masks, and PCA of every encoder's patch tokens."""
    chosen = torch.arange(rows)
    encoders = test.selection.encoders
    pca_panel(
        test.pictures(range(rows)),
        {name: test.patches(name)[chosen] for name in encoders},
        {name: test.grid(name) for name in encoders},
        test.masks[:rows].long(),
        folder / "features.png",
    )
