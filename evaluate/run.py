"""Stage 3, top to bottom: encoders and a labelled data set in, a table and results.json out.

both splits through unic-extract's stage (centre views), every encoder loaded once, cached
for each encoder: the task's probe on frozen features
results.json (merged), one table with the best marked and the gain over the best teacher
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evaluate.config import EvalConfig
from evaluate.encoder import (
    Encoder,
    EvaluationError,
    Split,
    check_classes,
    encoder_folder,
    extract_split,
    load_encoders,
)
from evaluate.table import Provenance, Role, Score, write_results
from evaluate.tasks import Request, run_task


def evaluate(config: EvalConfig, tasks: Sequence[str] = ()) -> list[Score]:
    """Run one task for every encoder, add the scores to the results file, and return them.

    `tasks`, where given, are run in place of `config.task`, all on the same features. Raises
    `UserError` for data or encoders that cannot be evaluated; scores of encoders that were finished
    before are written all the same.
    """
    _check_names(config.encoders)
    check_classes(config.train, config.test)
    train, test = open_splits(config)
    scores: list[Score] = []
    for task in tasks or (config.task,):
        scores += _score(replace(config, task=task), train, test)
    return scores


def _score(config: EvalConfig, train: Split, test: Split) -> list[Score]:
    scores: list[Score] = []
    began = time.monotonic()
    try:
        for encoder in config.encoders:
            request = Request(
                encoder=encoder_folder(encoder),
                role=role(encoder),
                train=train,
                test=test,
                classes=len(config.classes),
                seed=config.seed,
                steps=config.steps,
            )
            scores += run_task(config.task, request)
    finally:
        if scores:
            _keep(config, scores, train, time.monotonic() - began)
    return scores


def _check_names(encoders: Sequence[str]) -> None:
    taken: dict[str, str] = {}
    for encoder in encoders:
        name = encoder_folder(encoder)
        if name in taken:
            both = f"{taken[name]} and {encoder} are both called {name!r}"
            raise EvaluationError(
                f"{encoder} is given twice: name each encoder once"
                if taken[name] == encoder
                else f"{both}: give one a name of its own with --encoder NEWNAME={encoder}"
            )
        taken[name] = encoder


def open_splits(config: EvalConfig) -> tuple[Split, Split]:
    """Train and test split, extracted with every encoder of the call; each is loaded once."""
    loaded = load_encoders(config.encoders, config.size, config.device)
    return split(config, "train", loaded), split(config, "test", loaded)


def split(config: EvalConfig, name: str, loaded: Mapping[str, Encoder] | None = None) -> Split:
    """The `train` or `test` split, extracted with every encoder of the call."""
    data = {"train": config.train, "test": config.test}[name]
    return extract_split(
        config.encoders,
        data,
        config.cache,
        name=config.name,
        split=name,
        size=config.size,
        batch_size=config.batch_size,
        workers=config.workers,
        device=config.device,
        loaded=loaded,
    )


def role(encoder: str) -> Role:
    """Baselines by their names, students by what their run wrote beside them, else teachers."""
    source = encoder.rpartition("=")[2]
    if source.startswith(("random:", "pixels")):
        return "baseline"
    folder = Path(source)
    student = folder if folder.name == "student" else folder / "student"
    return "student" if (student.parent / "heads.safetensors").exists() else "teacher"


def _keep(config: EvalConfig, scores: list[Score], split: Split, seconds: float) -> None:
    provenance = Provenance(
        data=f"train {', '.join(config.train)}; test {', '.join(config.test)}",
        seed=config.seed,
        encoder_sha256={s.encoder: split.weights_sha256(s.encoder) for s in scores},
        seconds={config.task: round(seconds, 2)},
    )
    try:
        write_results(config.results, scores, provenance)
    except ValueError as error:
        raise EvaluationError(str(error)) from None
