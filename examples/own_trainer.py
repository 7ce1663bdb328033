"""Somebody else's training loop on a feature cache: only the reader is ours.

    python examples/own_trainer.py feats 500

A timm ViT learns the standardized CLS token of every teacher in the cache, by a linear head each.
"""

import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from extract.cache import Cache, CachedViews, select


def train(cache: Path, steps: int, arch: str = "vit_tiny_patch16_224", **shape: int) -> list[float]:
    selection = select(Cache(cache))
    dataset = CachedViews(selection, arrays=["cls"])
    loader = DataLoader(dataset, batch_size=32, shuffle=True, collate_fn=CachedViews.collate)
    moments = {teacher: selection.statistics(teacher)["cls"] for teacher in selection.encoders}
    mean = {teacher: torch.from_numpy(m.mean).float() for teacher, m in moments.items()}
    std = {teacher: torch.from_numpy(m.std()).float() for teacher, m in moments.items()}

    student = timm.create_model(arch, img_size=dataset.recipe.size, num_classes=0, **shape)
    heads = torch.nn.ModuleDict(
        {teacher: torch.nn.Linear(student.num_features, len(mean[teacher])) for teacher in mean}
    )
    optimizer = torch.optim.AdamW([*student.parameters(), *heads.parameters()], lr=1e-3)
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader:
            features = student(batch["views"].float() / 127.5 - 1)
            loss = torch.zeros(())
            for teacher, head in heads.items():
                target = (batch["targets"][teacher]["cls"].float() - mean[teacher]) / std[teacher]
                loss = loss + 1 - F.cosine_similarity(head(features), target, dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses[:steps]


if __name__ == "__main__":
    losses = train(Path(sys.argv[1]), int(sys.argv[2]))
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
