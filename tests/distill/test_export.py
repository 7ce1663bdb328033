"""The exported student is what timm loads; the heads are what was trained."""

import json

import pytest
import timm
import torch
from safetensors import safe_open

from distill.export import export_heads, export_student
from distill.projectors import Ladder
from distill.standardization import Standardization
from distill.student import Student

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SMALL = dict(img_size=48, patch_size=8, embed_dim=64, depth=4, num_heads=4)


def trained_like(student):
    """Move every parameter away from its initial value."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return student.eval()


def export(student, folder, **kwargs):
    return export_student(student, folder, mean=MEAN, std=STD, licence="cc-by-4.0", **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [SMALL, dict(SMALL, train_norm=True, init_values=1e-5, reg_tokens=2), dict(depth=2)],
    ids=["small", "trained norm and registers", "native size"],
)
def test_timm_alone_restores_the_student(tmp_path, kwargs):
    student = trained_like(Student("vit_tiny_patch16_224", **kwargs))
    folder = export(student, tmp_path / "student")
    images = torch.randn(2, 3, *student.image_size)
    with torch.no_grad():
        expected = student.features(images)
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(loaded.forward_features(images), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(loaded(images), expected[:, 0], rtol=0, atol=1e-6)
        random = timm.create_model(f"local-dir:{folder}").eval()
        assert (random.forward_features(images) - expected).abs().max() > 0.1


def test_the_folder_states_the_preprocessing_of_the_training(tmp_path):
    folder = export(trained_like(Student("vit_tiny_patch16_224", **SMALL)), tmp_path / "student")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, 48, 48)
    assert (tuple(data["mean"]), tuple(data["std"])) == (MEAN, STD)
    assert (data["crop_pct"], data["crop_mode"]) == (1.0, "center")
    assert data["interpolation"] == "bicubic"
    assert model.pretrained_cfg["license"] == "cc-by-4.0"
    assert model.pretrained_cfg["tag"] == "unic"
    assert not any(isinstance(m, timm.layers.DropPath) for m in model.modules())


def test_config_holds_the_extra_facts_and_nothing_of_other_weights(tmp_path):
    student = Student("vit_tiny_patch16_224", **SMALL)
    folder = export(student, tmp_path / "student", extra={"teachers": ["dino", "deit3"]})
    config = json.loads((folder / "config.json").read_text())
    assert config["unic"] == {"teachers": ["dino", "deit3"]}
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert "augreg" not in json.dumps(config) and "drop_path_rate" not in config["model_args"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_second_export_replaces_the_first_and_leaves_nothing_behind(tmp_path):
    folder = export(Student("vit_tiny_patch16_224", **SMALL), tmp_path / "runs" / "student")
    (folder / "stale").touch()
    student = trained_like(Student("vit_tiny_patch16_224", **SMALL))
    export(student, folder)
    assert [p.name for p in folder.parent.iterdir()] == ["student"]
    assert not (folder / "stale").exists()
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(loaded.cls_token, student.encoder.cls_token)


def test_a_failed_export_leaves_the_old_one(tmp_path):
    folder = export(Student("vit_tiny_patch16_224", **SMALL), tmp_path / "student")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(TypeError):
        export(Student("vit_tiny_patch16_224", **SMALL), folder, extra={"x": object()})
    assert (folder / "config.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    with pytest.raises(ValueError, match="a value for each colour"):
        export_student(
            Student("vit_tiny_patch16_224", **SMALL), folder, mean=(0.5,), std=STD, licence="mit"
        )


def test_heads_can_be_loaded_again(tmp_path):
    ladder = Ladder(64, 4, {"timm:vit.dino": 8, "deit3": 6}, grid=(6, 6), grids={"deit3": (5, 5)})
    statistics = {
        teacher: {token: (torch.randn(dim), torch.rand(dim)) for token in ("cls", "patches")}
        for teacher, dim in ladder.dims.items()
    }
    standardization = Standardization("exact", statistics)
    path = export_heads(ladder, standardization, tmp_path / "heads.safetensors")
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["ladder"])
        kind = json.loads(file.metadata()["standardization"])["kind"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    again = Ladder(64, **config)
    again.load_state_dict(
        {n.removeprefix("ladder."): t for n, t in tensors.items() if n.startswith("ladder.")}
    )
    outputs = [(torch.randn(2, 64), torch.randn(2, 36, 64)) for _ in range(4)]
    for teacher, (cls, patches) in ladder(outputs).items():
        assert torch.equal(again(outputs)[teacher][0], cls)
        assert torch.equal(again(outputs)[teacher][1], patches)
    assert kind == "exact"
    mean = tensors["standardization.teachers.timm:vit%2Edino.patches.mean"]
    assert torch.equal(mean, statistics["timm:vit.dino"]["patches"][0])
    assert [p.name for p in tmp_path.iterdir()] == ["heads.safetensors"]
