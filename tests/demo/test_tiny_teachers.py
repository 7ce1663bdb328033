"""The demo's teachers: what is in their folders, what they see, and how they were made."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from demo.run import PATCH, teachers
from demo.scenes import CATEGORIES, SIZE, Scene, scene
from demo.train_teachers import OBJECTIVES, describe
from evaluate.classification import linear_probe
from evaluate.segmentation import segmentation_probe
from extract.encoders.baselines import PixelTokens

GRID = SIZE // PATCH
TRAIN, TEST = 500, 250


def pixels_of(scenes: list[Scene]) -> Tensor:
    images = torch.from_numpy(np.stack([one.image for one in scenes]))
    return images.permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Scene], list[Scene]]:
    return [scene(40, i) for i in range(TRAIN)], [scene(41, i) for i in range(TEST)]


@pytest.mark.parametrize("name", sorted(teachers()))
def test_a_folder_says_what_it_is_and_no_path_of_its_maker(name: str) -> None:
    text = (teachers()[name] / "config.json").read_text()
    facts = json.loads(text)["pretrained_cfg"]
    assert facts["input_size"] == [3, SIZE, SIZE] and facts["mean"] == facts["std"] == [0.5] * 3
    assert facts["license"] == "apache-2.0" and facts["tag"] == name
    values = [value for value in facts.values() if isinstance(value, str)]
    assert not [value for value in values if "/" in value]
    weights = load_file(teachers()[name] / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@torch.no_grad()
def tokens_of(name: str, images: Tensor) -> dict[str, Tensor]:
    if name == "pixels":
        return PixelTokens(PATCH)(images.float() / 255)
    model = timm.create_model(f"local-dir:{teachers()[name]}", pretrained=True).eval()
    tokens = model.forward_features((images.float() / 255 - 0.5) / 0.5)
    return {"cls": tokens[:, 0], "patches": tokens[:, 1:]}


def test_each_teacher_beats_pixels_and_the_two_complement_each_other(
    drawn: tuple[list[Scene], list[Scene]],
) -> None:
    """The supervised one knows classes, the masked one, which saw no label, knows places."""
    labels = [torch.tensor([one.label for one in part]) for part in drawn]
    masks = [torch.from_numpy(np.stack([one.mask for one in part])) for part in drawn]
    top1, miou = {}, {}
    for name in ("pixels", *teachers()):
        train_tokens, test_tokens = (tokens_of(name, pixels_of(part)) for part in drawn)
        top1[name] = linear_probe(
            train_tokens["cls"], labels[0], test_tokens["cls"], labels[1], grid_c=(1e-2, 1.0)
        ).top1
        miou[name] = segmentation_probe(
            *(train_tokens["patches"], masks[0], test_tokens["patches"], masks[1]),
            num_classes=len(CATEGORIES),
            grid=GRID,
            steps=150,
            lr=1e-2,
        ).miou
    for name in teachers():
        assert top1[name] > top1["pixels"] + 20, top1
        assert miou[name] > miou["pixels"] + 20, miou
    assert top1["scenes_supervised"] > top1["scenes_masked"] + 10, top1
    assert miou["scenes_masked"] > miou["scenes_supervised"] + 2, miou


def test_the_masked_objective_looks_at_no_label() -> None:
    images = pixels_of([scene(0, index) for index in range(8)])
    pixels = (images.float() / 255 - 0.5) / 0.5
    losses = []
    for labels in (torch.zeros(8, dtype=torch.long), torch.arange(8)):
        torch.manual_seed(0)
        model = timm.create_model(f"local-dir:{teachers()['scenes_masked']}", pretrained=True)
        losses.append(OBJECTIVES["masked"][0]()(model.eval(), pixels, labels).item())
    assert losses[0] == losses[1]


def test_a_description_tells_the_direction_of_an_edge() -> None:
    """Orientation 0 is a gradient across; 4 of 8 is a gradient down."""
    across = torch.linspace(-1, 1, SIZE).expand(1, 3, SIZE, SIZE)
    described = describe(across)
    assert described.shape == (1, GRID * GRID, 12)
    assert (described[..., :8].argmax(-1) == 0).all()
    assert (describe(across.mT)[..., :8].argmax(-1) == 4).all()
    assert described[0, 0, -1] < described[0, GRID - 1, -1]
