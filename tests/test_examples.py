"""The examples run as they are printed."""

import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_own_trainer_learns_from_the_cache(feats):
    train = runpy.run_path(str(EXAMPLES / "own_trainer.py"))["train"]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    losses = train(feats, 40, patch_size=16, embed_dim=32, depth=2, num_heads=2)
    assert len(losses) == 40
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
