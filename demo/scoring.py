"""Stage 3 of the demo, in a second process: teachers are probed while the student is trained.

The demo's tensors are too small for two threads to share one step, so that a second core helps only
with work of its own. Progress of that process goes to `scoring.log` in the demo's folder.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch

from evaluate.config import EvalConfig
from evaluate.table import Score

TASKS = ("classification", "segmentation")


@contextmanager
def second_process(log: Path) -> Iterator[ProcessPoolExecutor]:
    """A pool of one fresh process, with one thread for tensors and its stderr in `log`."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_start, initargs=(log,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(log: Path) -> None:
    torch.set_num_threads(1)
    # Two live progress bars would write over each other.
    sys.stderr = log.open("w", buffering=1)


def score(config: EvalConfig) -> list[Score]:
    """What `unic-eval classification` and `unic-eval segmentation` give for the encoders."""
    # Here, because only the second process needs scikit-learn and torchmetrics: seconds to import.
    from evaluate.run import evaluate

    return evaluate(config, TASKS)


def draw(config: EvalConfig, path: Path, rows: int = 6) -> None:
    """Scenes, their masks, and PCA of every encoder's patch tokens, as a picture at `path`."""
    from evaluate.pictures import pca_panel
    from evaluate.run import split

    test = split(config, "test")
    chosen = torch.arange(rows)
    encoders = test.selection.encoders
    pca_panel(
        test.pictures(range(rows)),
        {name: test.patches(name)[chosen] for name in encoders},
        {name: test.grid(name) for name in encoders},
        test.masks[:rows].long(),
        path,
    )
