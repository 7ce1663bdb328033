"""Stage 2, top to bottom: a cache of teachers' features in, a student out.

    batches = the cache, checked: whole, consistent, the very pixels that the teachers saw
    distillation = student + ladder of projectors + standardization (exact, from the cache)
    for each step:  loss of Eq. 1-4 -> AdamW; now and then a line of metrics, a checkpoint
    student/ (a timm folder) and heads.safetensors

Stopped anywhere, the same command goes on from the last checkpoint, to the same bits on one CPU.
"""

import json
import time
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from console.command import StopRequest
from console.device import torch_device
from console.progress import ProgressBar
from distill import checkpoint, optim
from distill.architecture import canonical, parse_student
from distill.batches import Batch, TrainingBatches
from distill.config import DistillConfig, DistillError, differences
from distill.export import export_heads, export_student
from distill.metrics import Metrics, finite
from distill.projectors import Ladder
from distill.recipes import Recipe, resolve
from distill.standardization import Standardization
from distill.step import Distillation, Position
from distill.student import Student


@dataclass(frozen=True)
class Finished:
    """A finished run: where the student is, its last metrics, and how many steps were made now."""

    student: Path
    last: dict[str, Any]
    steps: int
    made: int


def distill(config: DistillConfig) -> Finished:
    """Run the stage.

    Raises `UserError` when the cache is unsuitable, the run's folder holds another run, or the
    loss stops being finite; checkpoints written before stay.
    """
    batches = TrainingBatches(
        config.cache,
        teachers=config.teachers,
        recipe=config.view_recipe,
        views=config.views,
        data=config.data,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    device = torch_device(config.device)
    torch.manual_seed(config.seed)
    distillation = build(config, batches).to(device).train()
    run = Training(config, batches, distillation, device)
    first = run.resume()
    run.train(first)
    return run.finish(made=run.total - first)


def build(config: DistillConfig, batches: TrainingBatches) -> Distillation:
    """The modules of a run, freshly initialised; raises `DistillError` for an unknown student."""
    try:
        recipe = resolve(
            config.recipe, config.reference, drop=config.drop, teachers=len(batches.teachers)
        )
        arch, arguments = parse_student(config.student)
        student = Student(
            arch,
            img_size=batches.view_size,
            drop_path_rate=config.drop_path,
            train_norm=config.train_norm,
            **arguments,
        )
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise DistillError(f"cannot build the run: {error}") from None
    ladder = build_ladder(student, recipe, batches)
    statistics = {name: teacher.statistics for name, teacher in batches.teachers.items()}
    return Distillation(
        student,
        ladder,
        Standardization(recipe.standardize, statistics),
        recipe,
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
    )


def build_ladder(student: Student, recipe: Recipe, batches: TrainingBatches) -> Ladder:
    """The recipe's projectors for the teachers of the cache."""
    teachers = batches.teachers.values()
    unequal = [t.name for t in teachers if t.patch_width not in (None, t.cls_width)]
    if unequal:
        raise DistillError(
            f"{', '.join(unequal)}: CLS and patch tokens of different widths are not supported yet"
        )
    return Ladder(
        student.width,
        student.depth,
        {t.name: t.cls_width for t in teachers},
        blocks=None if recipe.ladder else [student.depth - 1],
        shared=not recipe.dedicated,
        hidden=recipe.hidden,
        grid=student.grid,
        grids={t.name: t.grid for t in teachers},
        cls_only=[t.name for t in teachers if t.patch_width is None],
    )


class Training:
    """The loop, and what it leaves in the run's folder."""

    def __init__(
        self,
        config: DistillConfig,
        batches: TrainingBatches,
        distillation: Distillation,
        device: torch.device,
    ) -> None:
        self.config, self.batches, self.device = config, batches, device
        self.distillation = distillation
        self.optimizer = optim.adamw(
            distillation.student, distillation.ladder, weight_decay=config.weight_decay
        )
        self.total = config.epochs * batches.steps_per_epoch
        self.warmup = optim.warmup_steps(self.total, batches.steps_per_epoch, config.warmup_epochs)
        self.peak = optim.peak_lr(batches.batch_size, config.lr)
        half = device.type == "cuda" and not torch.cuda.is_bf16_supported()
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.dtype = torch.float16 if half else torch.bfloat16
        self.modules: dict[str, torch.nn.Module] = {"distillation": distillation}
        self.checkpoints = config.out / "checkpoints"

    def resume(self) -> int:
        """The first step to make: after the newest checkpoint, or 0 in a new folder.

        Raises `DistillError` when the folder holds a run with other settings.
        """
        path, wanted = self.config.out / "config.json", self.describe()
        if path.exists():
            changed = differences(_settings(path), wanted)
            if changed:
                raise DistillError(
                    f"{self.config.out} holds a run with other settings ({'; '.join(changed)}): "
                    "use the same ones to go on with it, or another --out"
                )
        self.config.out.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text(json.dumps(wanted, indent=1) + "\n")
        aside.rename(path)
        found = checkpoint.load(self.checkpoints)
        if found is None:
            return 0
        checkpoint.restore(found, self.modules, self.optimizer)
        return found.step

    def describe(self) -> dict[str, Any]:
        """Settings and what they were resolved to, for `config.json`."""
        return {
            **self.config.resolved(),
            "student": canonical(self.config.student),
            "teachers": list(self.batches.teachers),
            "teacher_fingerprints": {n: t.fingerprint for n, t in self.batches.teachers.items()},
            "view_recipe": self.batches.recipe,
            "views": self.batches.views,
            "images": self.batches.rows,
            "steps": self.total,
        }

    def train(self, first: int) -> None:
        """Make the steps from `first` on; on a stop request, save and raise what asked for it."""
        teachers = list(self.distillation.ladder.dims)
        saved = time.monotonic()
        bar = ProgressBar("distill", self.total, "steps", start=first)
        opened = closing(Metrics(self.config.out, teachers, first))
        with opened as metrics, bar, StopRequest() as stop:
            waited = time.monotonic()
            stream = self.batches.iterate(first, self.total, self.config.workers)
            for step, batch in enumerate(stream, first):
                waited = time.monotonic() - waited
                metrics.add(self.step(step, batch), len(batch["index"]), waited)
                done = step + 1
                last = done == self.total
                due = time.monotonic() - saved > 60 * self.config.checkpoint_minutes
                # Asked once a step: a signal that comes while saving is for the next one.
                stopping = bool(stop)
                note = ""
                if done % self.config.log_every == 0 or last or due or stopping:
                    note = self._log(metrics, done)
                if last or due or stopping:
                    checkpoint.save(self.checkpoints, done, self.modules, self.optimizer)
                    saved = time.monotonic()
                bar.advance(1, note)
                if stopping:
                    stop.raise_if_requested()
                waited = time.monotonic()

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One optimisation step; returns the detached metrics of `Distillation.forward`."""
        optim.set_lr(self.optimizer, self.lr(step))
        size = len(batch["index"])
        momentum = optim.ema_momentum(step, self.total)
        here = self.batches.decoded(_to(batch, self.device))
        views, targets = here["views"], here["targets"]
        with self._autocast():
            at = Position(self.config.seed, step, 0, size)
            loss, values = self.distillation(views, targets, here["positions"], at, momentum)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        return optim.lr_at(step, peak=self.peak, total=self.total, warmup=self.warmup)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=self.dtype)
        return nullcontext()

    def _log(self, metrics: Metrics, done: int) -> str:
        epoch = done / self.batches.steps_per_epoch
        line = metrics.write(done, epoch, self.lr(done - 1))
        if not finite(line):
            raise DistillError(
                f"the loss is {line['loss']} after step {done}; the last checkpoint before it is "
                f"in {self.checkpoints}. Try a lower --lr, or look for damaged features"
            )
        return f"epoch {epoch:.1f}, loss {line['loss']:.4f}"

    def finish(self, made: int) -> Finished:
        """Export the student and the projectors; the run's last line of metrics comes along."""
        config, batches = self.config, self.batches
        licences = sorted({teacher.licence for teacher in batches.teachers.values()})
        folder = export_student(
            self.distillation.student,
            config.out / "student",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            licence=", ".join(licences),
            tag=f"unic_{config.recipe}",
            extra={
                "teachers": {n: t.fingerprint for n, t in batches.teachers.items()},
                "recipe": config.recipe,
                "reference": config.reference,
                "steps": self.total,
            },
        )
        export_heads(
            self.distillation.ladder,
            self.distillation.standardization,
            config.out / "heads.safetensors",
        )
        last = (config.out / "metrics.jsonl").read_text().splitlines()[-1]
        return Finished(folder, json.loads(last), self.total, made)


def _to(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, as stored: quantised targets are decoded there."""

    def move(tensor: Tensor) -> Tensor:
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor

    return Batch(
        views=move(batch["views"]),
        targets={
            teacher: {name: move(stored) for name, stored in arrays.items()}
            for teacher, arrays in batch["targets"].items()
        },
        positions={teacher: move(chosen) for teacher, chosen in batch["positions"].items()},
        index=batch["index"],
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise DistillError(
            f"{path} is damaged ({error}), so that the run in its folder cannot go on: "
            "restore it, or use another --out"
        ) from None
