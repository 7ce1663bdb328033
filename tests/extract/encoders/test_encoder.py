import json
from dataclasses import asdict

import pytest
import timm
import torch
from torch import nn

from extract.encoders.encoder import Encoder, EncoderError, weights_sha256
from extract.encoders.tokens import TimmTokens
from extract.teachers import load_encoder

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def views(batch: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def tiny(name: str = "random:vit_tiny_patch16_224", size: int = 32, **kwargs: object) -> Encoder:
    return load_encoder(name, size=size, model_args={**TINY, **kwargs})


def test_tokens_are_those_of_the_normalised_pixels() -> None:
    encoder = tiny()
    views_B3HW = views(3, 32)
    tokens = encoder(views_B3HW)
    mean = torch.tensor(encoder.spec.mean).view(1, 3, 1, 1)
    std = torch.tensor(encoder.spec.std).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = encoder.tokens.model.forward_features((views_B3HW / 255 - mean) / std)
    torch.testing.assert_close(tokens["cls"], expected[:, 0])
    torch.testing.assert_close(tokens["patches"], expected[:, 1:])
    assert set(tokens) == {"cls", "patches"}
    assert {token.dtype for token in tokens.values()} == {torch.float32}
    assert not any(token.requires_grad or token.is_inference() for token in tokens.values())


def test_an_encoder_stays_frozen_inside_a_module_in_training() -> None:
    encoder = tiny("random:vit_tiny_patch16_224", drop_path_rate=0.9)
    around = nn.ModuleList([encoder]).train()
    assert around.training and not any(module.training for module in encoder.modules())
    assert torch.equal(encoder(views(4, 32))["cls"], encoder(views(4, 32))["cls"])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_registers_are_never_patches() -> None:
    encoder = tiny("random:vit_small_patch14_reg4_dinov2", size=28)
    tokens = encoder(views(2, 28))
    assert tokens["cls"].shape == (2, 32)
    assert tokens["registers"].shape == (2, 4, 32)
    assert tokens["patches"].shape == (2, 4, 32)
    with torch.no_grad():
        model = encoder.tokens.model
        mean, std = encoder.mean_C11, encoder.std_C11
        features = model.forward_features((views(2, 28) / 255 - mean) / std)
    torch.testing.assert_close(tokens["registers"], features[:, 1:5])
    torch.testing.assert_close(tokens["patches"], features[:, 5:])


def test_a_model_without_class_token_gives_its_own_pooling() -> None:
    encoder = tiny("random:vit_base_patch16_siglip_224")
    tokens = encoder(views(2, 32))
    assert encoder.spec.global_token == "pool"
    assert tokens["patches"].shape == (2, 4, 32)
    with torch.no_grad():
        pixels = (views(2, 32) / 255 - encoder.mean_C11) / encoder.std_C11
        torch.testing.assert_close(tokens["cls"], encoder.tokens.model(pixels))


@pytest.mark.parametrize(
    ("name", "args", "first"),
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, False),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 1, 1)},
            True,
        ),
    ],
)
def test_feature_maps_are_flattened_row_by_row(name: str, args: dict, first: bool) -> None:
    encoder = load_encoder(f"random:{name}", size=224, model_args=args)
    views_B3HW = views(1, 224)
    tokens = encoder(views_B3HW)
    assert encoder.spec.grid == (7, 7) and encoder.spec.patch_size is None
    with torch.no_grad():
        pixels = (views_B3HW / 255 - encoder.mean_C11) / encoder.std_C11
        features = encoder.tokens.model.forward_features(pixels)
    for row, column in ((0, 0), (2, 5), (6, 1)):
        cell = features[:, row, column] if first else features[:, :, row, column]
        torch.testing.assert_close(tokens["patches"][:, row * 7 + column], cell)


def registers_of(name: str, size: int, **kwargs: object) -> tuple[Encoder, dict, torch.Tensor]:
    """An encoder, its tokens, and what timm's model gave, all of the same views."""
    encoder = load_encoder(f"random:{name}", size=size, model_args={**TINY, **kwargs})
    with torch.no_grad():
        pixels = (views(2, size) / 255 - encoder.mean_C11) / encoder.std_C11
        features = encoder.tokens.model.forward_features(pixels)
    return encoder, encoder(views(2, size)), features


@pytest.mark.parametrize(
    ("name", "cls", "registers"),
    [
        ("vit_small_patch16_dinov3", 1, 4),  # Eva; timm's head averages the patches
        ("vit_base_patch16_dinov3_qkvb.eupe_lvd1689m", 1, 4),
        ("vit_base_patch16_radio_v3", 1, 7),  # summaries of further teachers, and registers
        ("naflexvit_base_patch16_radio_v3", 1, 7),  # tokens in an embedding module
        ("vit_base_patch16_rope_reg1_gap_256", 0, 1),  # a register and no class token
        ("deit_tiny_distilled_patch16_224", 2, 0),  # class and distillation tokens
        ("vit_base_patch16_224", 1, 0),
    ],
)
def test_prefixes_of_all_kinds(name: str, cls: int, registers: int) -> None:
    encoder, tokens, features = registers_of(name, 32)
    prefix = cls + registers
    assert features.shape == (2, prefix + 4, 32) and encoder.spec.grid == (2, 2)
    torch.testing.assert_close(tokens["patches"], features[:, prefix:])
    assert encoder.spec.global_token == ("cls" if cls else "pool")
    if cls:
        torch.testing.assert_close(tokens["cls"], features[:, 0])
    assert ("registers" in tokens) == bool(registers)
    if registers:
        torch.testing.assert_close(tokens["registers"], features[:, cls:prefix])


@pytest.mark.parametrize(
    "name",
    [
        "vit_pe_core_tiny_patch16_384",  # attention pooling beside a class token
        "beit_base_patch16_224",  # the only norm comes after the mean
        "eva02_tiny_patch14_224",
        "naflexvit_base_patch16_siglip",
    ],
)
def test_a_head_that_pools_by_trained_weights_gives_the_global_token(name: str) -> None:
    patch = 14 if "patch14" in name else 16
    encoder, tokens, features = registers_of(name, 2 * patch)
    assert encoder.spec.global_token == "pool" and encoder.spec.patch_size == patch
    head = encoder.tokens.model.forward_head
    with torch.no_grad():
        torch.testing.assert_close(tokens["cls"], head(features, pre_logits=True))
    assert tokens["patches"].shape == (2, 4, 32)


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("vit_small_patch14_reg4_dinov2", 56, TINY),
        ("vit_small_patch16_dinov3", 64, TINY),
        ("naflexvit_base_patch16_siglip", 64, TINY),
        ("hiera_tiny_224", 224, {}),
        ("cait_xxs24_224", 224, {"depth": 1}),
        ("convnext_atto", 128, {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
    ],
)
def test_patches_are_timms_own_spatial_map_row_by_row(name: str, size: int, args: dict) -> None:
    encoder = load_encoder(f"random:{name}", size=size, model_args=args)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (map_BDHW,) = encoder.tokens.model.forward_intermediates(
            pixels, indices=1, norm=encoder.spec.tap == "norm", intermediates_only=True
        )
        patches = encoder.tokens(pixels)["patches"]
    assert tuple(map_BDHW.shape[2:]) == encoder.spec.grid
    torch.testing.assert_close(patches, map_BDHW.flatten(2).mT)


def test_a_model_that_resamples_its_own_positions_says_so() -> None:
    encoder = load_encoder("random:naflexvit_base_patch16_radio_v3", size=32, model_args=TINY)
    assert encoder.spec.position_embedding == "model"
    assert tiny().spec.position_embedding == "native"


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "coat_lite_tiny", "pit_ti_224"])
def test_models_without_one_grid_of_patches_are_refused(name: str) -> None:
    with pytest.raises(EncoderError, match=r"no patch tokens to cache|gives \d+ tokens, not a"):
        load_encoder(f"random:{name}", size=240 if "240" in name else 224)


def test_cls_cannot_be_asked_of_a_model_without_one() -> None:
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    with pytest.raises(EncoderError, match="has no class token"):
        TimmTokens(model, "cls")
    with pytest.raises(EncoderError, match="expected 'cls' or 'pool'"):
        TimmTokens(model, "mean")


def test_wrong_views_are_refused() -> None:
    encoder = tiny()
    with pytest.raises(ValueError, match=r"uint8 views \[B, 3, 32, 32\]"):
        encoder(views(1, 48))
    with pytest.raises(ValueError, match="float32"):
        encoder(views(1, 32).float())


def test_the_spec_is_json_and_matches_the_tokens() -> None:
    encoder = tiny(size=48)
    spec = json.loads(json.dumps(asdict(encoder.spec)))
    assert spec["grid"] == [3, 3] and spec["patch_size"] == 16 and spec["size"] == 48
    assert (spec["cls_width"], spec["patch_width"], spec["tap"]) == (32, 32, "norm")
    assert spec["parameters"] == sum(p.numel() for p in encoder.parameters())
    assert spec["precision"] == "fp32"


def test_one_flipped_bit_changes_the_sha256() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = weights_sha256(model)
    assert before == weights_sha256(model.state_dict()) and len(before) == 64
    bits = model[0].weight.data.view(torch.int32)
    bits[1, 2] ^= 1
    assert weights_sha256(model) != before
    bits[1, 2] ^= 1
    assert weights_sha256(model) == before
    model[1].running_mean[0] += 1
    assert weights_sha256(model) != before


def test_names_shapes_and_dtypes_are_part_of_the_sha256() -> None:
    zeros = torch.zeros(2, 3)
    states = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.T.contiguous()},
        {"a": zeros.view(torch.int32)},
        {"a": zeros.bfloat16()},
        {"a": torch.zeros(())},
    ]
    assert len({weights_sha256(state) for state in states}) == len(states)
