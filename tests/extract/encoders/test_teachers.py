"""Every way in, on files in the layouts that other projects write, at reduced width and depth.

The expected tokens come from `plain_vit`, a ViT in plain torch that shares no code with timm.
"""

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
from plain_vit import (
    ARGS,
    MEAN,
    STD,
    WIDTH,
    add_layer_scale,
    assert_close,
    plain_vit,
    resampled,
    upstream_vit,
    views,
)
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from extract.cache.errors import UserError
from extract.encoders.checkpoints import CheckpointError
from extract.encoders.encoder import EncoderError
from extract.teachers import TEACHERS, available_teachers, encoder_folder, load_encoder

DINO_TAG, DEIT3_TAG = TEACHERS["dino"].tag, TEACHERS["deit3"].tag


def dino_full(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> dict:
    """What DINO's training writes: both networks with their heads, the optimizer, arguments."""
    head = {f"module.head.mlp.{i}.weight": torch.zeros(8, 8) for i in (0, 2, 4)}
    head |= {"module.head.last_layer.weight_g": torch.zeros(9, 1)}
    wrapped = [
        {f"module.backbone.{k}": v for k, v in state.items()} | head for state in (student, teacher)
    ]
    return {
        "student": wrapped[0],
        "teacher": wrapped[1],
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_base", patch_size=16),
        "dino_loss": {"center": torch.zeros(1, 9)},
    }


def test_dino_from_its_full_checkpoint_takes_the_teacher(tmp_path: Path) -> None:
    teacher, student = upstream_vit(0), upstream_vit(1)
    torch.save(dino_full(teacher, student), tmp_path / "full.pth")
    encoder = load_encoder("dino", weights=tmp_path / "full.pth", model_args=ARGS)
    expected = plain_vit(teacher, views(224), teacher["pos_embed"])
    tokens = encoder(views(224))
    assert_close(tokens["cls"], expected[:, 0])
    assert_close(tokens["patches"], expected[:, 1:])
    spec = encoder.spec
    assert (spec.grid, spec.patch_size, spec.position_embedding) == ((14, 14), 16, "native")
    assert (spec.mean, spec.std, spec.licence) == (MEAN, STD, "apache-2.0")
    assert (spec.name, spec.source, spec.tap) == ("dino", "file:full.pth", "norm")


def test_the_same_weights_in_another_wrapping_are_the_same_encoder(tmp_path: Path) -> None:
    state = upstream_vit(0)
    torch.save(dino_full(state, upstream_vit(1)), tmp_path / "full.pth")
    torch.save(state, tmp_path / "backbone.pth")
    torch.save({"state_dict": state}, tmp_path / "ibot.pth")
    chunked = {k.replace("blocks.", "blocks.0."): v for k, v in state.items()}
    chunked |= {"mask_token": torch.zeros(1, WIDTH)}
    torch.save(
        {"model": {f"module.encoder.{k}": v for k, v in chunked.items()}}, tmp_path / "c.pth"
    )
    save_file(state, tmp_path / "backbone.safetensors")
    hashes = {
        load_encoder("dino", weights=file, model_args=ARGS).spec.sha256
        for file in sorted(tmp_path.iterdir())
    }
    assert len(hashes) == 1


def test_deit3_with_its_layer_scale_and_without_a_position_for_cls(tmp_path: Path) -> None:
    gammas = ("gamma_1", "gamma_2")
    state = add_layer_scale(upstream_vit(2, cls_position=False), gammas)
    head = {"head.weight": torch.zeros(1000, WIDTH), "head.bias": torch.zeros(1000)}
    torch.save({"model": state | head}, tmp_path / "deit3.pth")
    encoder = load_encoder("deit3", weights=tmp_path / "deit3.pth", model_args=ARGS)
    expected = plain_vit(state, views(224), state["pos_embed"], gammas=gammas)
    tokens = encoder(views(224))
    assert_close(tokens["cls"], expected[:, 0])
    assert_close(tokens["patches"], expected[:, 1:])


@pytest.mark.parametrize("rule", ["timm-bicubic-antialias", "bicubic-noantialias"])
def test_dinov2_with_registers_at_a_smaller_grid(tmp_path: Path, rule: str) -> None:
    gammas = ("ls1.gamma", "ls2.gamma")
    state = add_layer_scale(upstream_vit(3, grid=37, patch=14), gammas)
    registers = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(4))
    others = {"register_tokens": registers, "mask_token": torch.zeros(1, WIDTH)}
    torch.save(state | others, tmp_path / "dinov2.pth")
    encoder = load_encoder(
        "timm:vit_small_patch14_reg4_dinov2.lvd142m",
        size=56,
        weights=tmp_path / "dinov2.pth",
        model_args=ARGS,
        position_embedding=rule,
    )
    position = resampled(state["pos_embed"], 1, 4, antialias=rule == "timm-bicubic-antialias")
    expected = plain_vit(state, views(56), position, registers=registers, gammas=gammas)
    tokens = encoder(views(56))
    assert_close(tokens["cls"], expected[:, 0])
    assert_close(tokens["registers"], expected[:, 1:5])
    assert_close(tokens["patches"], expected[:, 5:])
    assert encoder.spec.position_embedding == rule and encoder.spec.grid == (4, 4)


def test_dinov2_at_224_px(tmp_path: Path) -> None:
    state = add_layer_scale(upstream_vit(3, grid=37, patch=14), ("ls1.gamma", "ls2.gamma"))
    torch.save(state | {"mask_token": torch.zeros(1, WIDTH)}, tmp_path / "dinov2.pth")
    name = "timm:vit_small_patch14_dinov2.lvd142m"
    encoder = load_encoder(name, weights=tmp_path / "dinov2.pth", model_args=ARGS)
    assert encoder(views(224))["patches"].shape == (2, 256, WIDTH)
    native = load_encoder(name, size=518, weights=tmp_path / "dinov2.pth", model_args=ARGS)
    assert native.spec.position_embedding == "native"
    assert native.spec.sha256 == encoder.spec.sha256, "the identity of weights has no size"


def test_a_file_of_another_grid_is_native_at_its_own_size(tmp_path: Path) -> None:
    state = upstream_vit(6, grid=4)
    torch.save(state, tmp_path / "small.pth")
    encoder = load_encoder("dino", size=64, weights=tmp_path / "small.pth", model_args=ARGS)
    assert encoder.spec.position_embedding == "native"
    expected = plain_vit(state, views(64), state["pos_embed"])
    assert_close(encoder(views(64))["patches"], expected[:, 1:])


def test_pooled_global_token_and_unnormalised_patches(tmp_path: Path) -> None:
    """dBOT fine-tuned: the norm comes after pooling, so the patches have none."""
    state = upstream_vit(7)
    file = {k.replace("norm.", "fc_norm.") if k[:5] == "norm." else k: v for k, v in state.items()}
    torch.save({"model": file | {"head.weight": torch.zeros(5, WIDTH)}}, tmp_path / "dbot.pth")
    encoder = load_encoder(
        "dbot",
        weights=tmp_path / "dbot.pth",
        model_name=DINO_TAG,
        model_args={**ARGS, "global_pool": "avg"},
        global_token="pool",
    )
    expected = plain_vit(state, views(224), state["pos_embed"], norm=False)
    pooled = expected[:, 1:].mean(1)
    pooled = F.layer_norm(pooled, (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6)
    tokens = encoder(views(224))
    assert_close(tokens["cls"], pooled)
    assert_close(tokens["patches"], expected[:, 1:])
    assert (encoder.spec.tap, encoder.spec.global_token) == ("features", "pool")
    assert encoder.spec.licence == "unknown"


def test_a_file_of_another_width_names_the_keys(tmp_path: Path) -> None:
    torch.save(upstream_vit(0), tmp_path / "narrow.pth")
    args = {**ARGS, "embed_dim": 48}
    with pytest.raises(CheckpointError, match="of another shape: ") as error:
        load_encoder("dino", weights=tmp_path / "narrow.pth", model_args=args)
    assert "cls_token [1, 1, 32], expected [1, 1, 48]" in str(error.value)
    assert "narrow.pth" in str(error.value)


def test_a_file_of_another_patch_size_is_not_resampled(tmp_path: Path) -> None:
    # With a mask token timm's filter has work to do, and would resample the kernel on the way.
    state = upstream_vit(0, patch=8) | {"mask_token": torch.zeros(1, WIDTH)}
    torch.save(state, tmp_path / "patch8.pth")
    with pytest.raises(CheckpointError, match=r"patch_embed.proj.weight \[32, 3, 8, 8\]"):
        load_encoder("dino", weights=tmp_path / "patch8.pth", model_args=ARGS)


def timm_folder(folder: Path, size: int = 64, **config: object) -> timm.models.VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=size, **ARGS)
    torch.nn.init.normal_(model.pos_embed)
    cfg = {"input_size": [3, size, size], "mean": MEAN, "std": STD, "license": "mit"}
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": cfg, **config},
        model_args={**ARGS, "img_size": size},
        safe_serialization=True,
    )
    return model.eval()


@pytest.mark.parametrize("asked", ["run", "run/student"])
def test_a_timm_folder_or_the_run_that_holds_it(tmp_path: Path, asked: str) -> None:
    model = timm_folder(tmp_path / "run" / "student")
    name = str(tmp_path / asked)
    encoder = load_encoder(name, size=64)
    pixels = (views(64) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = model.forward_features(pixels)
    assert_close(encoder(views(64))["patches"], expected[:, 1:])
    assert_close(encoder(views(64))["cls"], expected[:, 0])
    spec = encoder.spec
    assert (spec.source, spec.licence, spec.mean) == ("folder:run", "mit", MEAN)
    assert encoder_folder(name) == "run"


def test_a_folder_chooses_its_rule_and_global_token(tmp_path: Path) -> None:
    timm_folder(tmp_path / "plain")
    timm_folder(tmp_path / "other", position_embedding="bicubic-noantialias", global_token="pool")
    plain, other = (load_encoder(str(tmp_path / n), size=32) for n in ("plain", "other"))
    assert plain.spec.position_embedding == "timm-bicubic-antialias"
    assert other.spec.position_embedding == "bicubic-noantialias"
    assert (plain.spec.global_token, other.spec.global_token) == ("cls", "pool")
    assert plain.spec.sha256 == other.spec.sha256
    argued = load_encoder(
        str(tmp_path / "plain"), size=32, position_embedding="bicubic-noantialias"
    )
    assert torch.equal(argued(views(32))["patches"], other(views(32))["patches"])
    assert (plain(views(32))["patches"] - other(views(32))["patches"]).abs().max() > 1e-3


def test_swin_tables_are_resized_by_timm(tmp_path: Path) -> None:
    args = {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 1, 1)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **args)
    timm.models.save_for_hf(model, str(tmp_path / "s"), model_args=args, safe_serialization=True)
    encoder = load_encoder(str(tmp_path / "s"), size=448)
    assert encoder.spec.grid == (14, 14)
    with pytest.raises(EncoderError, match="one way only"):
        load_encoder(str(tmp_path / "s"), size=448, position_embedding="bicubic-noantialias")


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    timm_folder(tmp_path / "m")
    with pytest.raises(EncoderError, match="unknown rule 'nearest'"):
        load_encoder(str(tmp_path / "m"), size=32, position_embedding="nearest")
    with pytest.raises(EncoderError, match="choose a multiple, such as 48"):
        load_encoder(str(tmp_path / "m"), size=50)
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights file"):
        load_encoder(str(tmp_path / "m"), size=64)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"architecture": "nonesuch"}))
    with pytest.raises(EncoderError, match="'nonesuch'"):
        load_encoder(str(tmp_path / "m"), size=64)
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(EncoderError, match="no JSON"):
        load_encoder(str(tmp_path / "m"), size=64)
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(EncoderError, match="is no timm folder"):
        load_encoder(str(tmp_path / "m"), size=64)


def test_a_random_model_of_a_folder_has_its_architecture_not_its_weights(tmp_path: Path) -> None:
    timm_folder(tmp_path / "m")
    trained = load_encoder(str(tmp_path / "m"), size=64)
    random = load_encoder(f"random:{tmp_path / 'm'}", size=64)
    assert random.spec.sha256 != trained.spec.sha256
    assert (random.spec.cls_width, random.spec.grid) == (WIDTH, (4, 4))
    assert random.spec.sha256 == load_encoder(f"random:{tmp_path / 'm'}", size=64).spec.sha256


def test_folders_of_the_cache(tmp_path: Path) -> None:
    timm_folder(tmp_path / "my model")
    names = {
        "dino": "dino",
        "pixels": "pixels",
        "pixels:8": "pixels-8",
        f"timm:{DEIT3_TAG}": "deit3_base_patch16_224-fb_in1k",
        "random:dino": "random-dino",
        f"random:{DINO_TAG}": "random-vit_base_patch16_224-dino",
        str(tmp_path / "my model"): "my-model",
        f"mine={tmp_path / 'my model'}": "mine",
        "v2=timm:vit_small_patch14_dinov2": "v2",
    }
    assert {name: encoder_folder(name) for name in names} == names


def test_an_alias_loads_what_it_names(tmp_path: Path) -> None:
    timm_folder(tmp_path / "m")
    alias = load_encoder(f"mine={tmp_path / 'm'}", size=64)
    assert alias.spec.sha256 == load_encoder(str(tmp_path / "m"), size=64).spec.sha256
    assert alias.spec.name == "mine"
    pixels = load_encoder("px=pixels:16", size=64).spec
    assert (pixels.name, pixels.architecture) == ("px", "pixels")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinno", "did you mean dino"),
        ("vit_base_patch16_224", "did you mean timm:vit_base_patch16_224"),
        ("timm:vit_bsae_patch16_224", "vit_base_patch16_224"),
        ("timm:vit_base_patch16_224.dinno", "it has: .*dino"),
        ("no/such/folder", "no folder at no/such/folder"),
        ("random:nothing", "unknown encoder 'nothing'"),
    ],
)
def test_unknown_names_get_choices(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_encoder(name)


def test_weights_go_with_models_that_have_some(tmp_path: Path) -> None:
    for name in ("pixels", "random:dino"):
        with pytest.raises(EncoderError, match="leave out --weights"):
            load_encoder(name, weights=tmp_path / "w.pth")
    with pytest.raises(EncoderError, match="goes with a weights file"):
        load_encoder("mine", model_name=DINO_TAG)
    with pytest.raises(CheckpointError, match="no weights file at"):
        load_encoder("dino", weights=tmp_path / "absent.pth", model_args=ARGS)


def test_without_the_hub_the_error_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EncoderError, match="--weights FILE") as error:
        load_encoder("dino", model_args=ARGS)
    assert DINO_TAG in str(error.value)


def test_every_card_names_weights_that_timm_knows() -> None:
    assert [card.name for card in available_teachers()][:2] == ["dino", "deit3"]
    for card in available_teachers():
        assert timm.get_pretrained_cfg(card.tag).license == card.licence
