"""The demo: scenes, two tiny teachers, and the three stages by the same code as the commands.

images/{train,test}-*.tar   scenes with class, mask and depth labels  (demo.scenes)
teachers/*                  two tiny ViTs, trained on other scenes     (demo.train_teachers)
unic.toml                   makes the folder a project
feats/, runs/unic/          what unic-extract and unic-distill leave
results.json, features.png  scores, and PCA of patch tokens side by side

Teachers and baselines are scored by a second process (demo.scoring) while the student is trained.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from console.progress import ProgressBar
from console.project import read_project
from demo.scenes import CATEGORIES, SIZE, write_tars
from demo.scoring import TASKS, draw, score, second_process
from distill.config import DistillConfig
from distill.run import distill
from evaluate.config import EvalConfig
from evaluate.table import Score
from extract.cache.errors import UserError
from extract.config import ExtractConfig
from extract.run import extract

WEIGHTS = Path(__file__).parent / "teachers"
TASK = "scenes"
PATCH = 8


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults take little more than a minute on two cores."""

    folder: Path
    seed: int = 0
    train_images: int = 1500
    test_images: int = 500
    views: int = 4
    epochs: int = 12
    batch_size: int = 16
    lr: float = 8e-2
    drop_path: float = 0.0
    warmup_epochs: int = 2
    probe_steps: int = 1000


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
    known = (*names, f"random:{student(config.folder)}", f"pixels:{PATCH}")
    made = (f"unic={config.folder / 'runs' / 'unic' / 'student'}",)
    with second_process(config.folder / "scoring.log") as process:
        first = process.submit(score, evaluation(config, known))
        train(config, tuple(names))
        last = process.submit(score, evaluation(config, made))
        drawn = process.submit(
            draw, evaluation(config, known + made), config.folder / "features.png"
        )
        with ProgressBar("evaluate", len(known + made), "encoders") as bar:
            scores = first.result()
            bar.advance(len(known))
            scores += last.result()
            bar.advance(len(made))
        drawn.result()
    return scores


def train(config: DemoConfig, names: tuple[str, ...]) -> None:
    """What `unic-extract` and `unic-distill` do in the demo's folder."""
    cache = config.folder / "feats"
    extract(
        ExtractConfig(
            data=(str(config.folder / "images" / "train-*.tar"),),
            cache=cache,
            teachers=names,
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


def student(folder: Path) -> str:
    """The student has its teachers' architecture."""
    return str(folder / "teachers" / next(iter(teachers())))


def evaluation(config: DemoConfig, encoders: tuple[str, ...]) -> EvalConfig:
    """What `unic-eval` would be asked in the demo's folder."""
    images = config.folder / "images"
    return EvalConfig(
        task=TASKS[0],
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
