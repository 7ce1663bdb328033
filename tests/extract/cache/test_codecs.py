"""Codecs: fidelity in standardized space, the clip rule, and formulas written out as loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from extract.cache.codecs import Codec, FeatureError, calibrate, fidelity
from extract.cache.schema import CODECS, feature_specs

QUANTISING = [name for name in CODECS if name != "fp16"]


def patches(rows: int = 40, outlier: float = 1.0) -> Tensor:
    """Tokens [B, 16, 32] with channels of unlike means and scales; one token is `outlier` times."""
    rng = torch.Generator().manual_seed(0)
    scale_D = torch.logspace(-2, 1, 32)
    tokens = torch.randn(rows, 16, 32, generator=rng) * scale_D + 3 * scale_D.flip(0)
    tokens[3, 5] *= outlier
    return tokens


def codec(name: str, tokens: Tensor) -> Codec:
    return calibrate(name, tokens.half())


def kept(name: str, tokens: Tensor, calibration: Tensor | None = None) -> tuple[Tensor, Codec, int]:
    made = codec(name, tokens if calibration is None else calibration)
    stored, rescaled = made.encode("patches", tokens, str)
    specs = feature_specs({"patches": tokens.shape[1:]}, name)
    for array, values in stored.items():
        assert values.numpy().dtype == specs[array].dtype
        assert values.shape[1:] == specs[array].row_shape
    return made.decode(stored, "patches"), made, rescaled


@pytest.mark.parametrize(
    ("name", "relative", "cosine"),
    [("int8", 0.02, 0.999), ("int8-zstd", 0.04, 0.998), ("int4", 0.12, 0.98)],
)
def test_fidelity_is_within_what_was_measured(name: str, relative: float, cosine: float) -> None:
    tokens = patches(200)
    found = fidelity(codec(name, tokens), tokens.half())
    assert found["relative_l2"] < relative and found["cosine_p1"] > cosine
    # And no better than the step allows: a uniform error over one step, of unit variance.
    step = {"int8": 1 / 16, "int8-zstd": 1 / 8, "int4": 2 * 2.75 / 16}[name]
    assert found["relative_l2"] > 0.8 * step / 12**0.5
    if name != "int4":
        assert found["clipped"] == 0
    assert fidelity(codec("fp16", tokens), tokens.half()) == {}


def test_int8_is_the_formula_of_the_layout() -> None:
    tokens = patches()[:3]
    made = codec("int8", patches())
    stored, rescaled = made.encode("patches", tokens, str)
    mean, std = (np.array(made.calibration[key], np.float32) for key in ("mean", "std"))
    for b, p, d in np.ndindex(*tokens.shape):
        z = (np.float32(tokens[b, p, d].half()) - mean[d]) / std[d]
        assert stored["patches"][b, p, d] == np.round(z * 16), (b, p, d)
        decoded = mean[d] + std[d] * stored["patches"][b, p, d].item() / 16
        assert made.decode(stored, "patches")[b, p, d] == np.float16(decoded)
    assert rescaled == 0 and torch.all(stored["scale_patches"] == 1)


def test_int4_packs_even_channels_low() -> None:
    made = Codec("int4", {"mean": [0.0] * 4, "std": [1.0] * 4})
    tokens = torch.tensor([[[-9.0, -2.7, 0.1, 2.7]]]) / 8
    stored, _ = made.encode("patches", tokens, str)
    levels = [int(np.floor((z / 2.75 + 1) * 8)) for z in tokens.half().flatten().tolist()]
    assert stored["patches"].flatten().tolist() == [
        levels[0] | levels[1] << 4,
        levels[2] | levels[3] << 4,
    ]
    back = made.decode(stored, "patches").flatten().tolist()
    assert back == pytest.approx([((q + 0.5) / 8 - 1) * 2.75 for q in levels], abs=1e-3)
    with pytest.raises(FeatureError, match=r"two channels in a byte.*have 3"):
        Codec("int4", {"mean": [0.0] * 3, "std": [1.0] * 3}).encode("patches", tokens[..., :3], str)


@pytest.mark.parametrize("name", QUANTISING)
def test_a_token_beyond_the_range_keeps_its_direction_by_a_factor(name: str) -> None:
    tokens = patches(outlier=60.0)
    back, made, rescaled = kept(name, tokens, calibration=patches())
    assert rescaled == 1
    z, z_back = (made.standardized(t[3, 5]) for t in (tokens.half(), back))
    # int4 cuts off what is beyond 2.75 times the token's own root mean square.
    lowest, off = (0.95, 0.25) if name == "int4" else (0.999, 0.01)
    assert torch.nn.functional.cosine_similarity(z, z_back, dim=0) > lowest
    assert (z_back.norm() / z.norm()).item() == pytest.approx(1, abs=off)
    plain = made.encode("patches", patches(), str)[0]
    with_outlier = made.encode("patches", tokens, str)[0]
    assert torch.equal(plain["patches"][:3], with_outlier["patches"][:3])


@pytest.mark.parametrize("name", QUANTISING)
def test_a_channel_that_never_moves_is_kept(name: str) -> None:
    tokens = patches()
    tokens[..., 7] = 2.5
    back, _, rescaled = kept(name, tokens)
    assert back[..., 7].sub(2.5).abs().max() < (0.2 if name == "int4" else 1e-3)
    assert rescaled == 0


@pytest.mark.parametrize("name", CODECS)
def test_values_that_cannot_be_stored_name_the_row(name: str) -> None:
    for bad in (float("nan"), float("inf"), 1e6):
        tokens = patches()
        tokens[11, 2, 3] = bad
        with pytest.raises(FeatureError, match="row 11"):
            codec(name, patches()).encode("patches", tokens, lambda i: f"row {i}")


def test_only_patches_are_quantised() -> None:
    tokens = patches()
    stored, rescaled = codec("int8", tokens).encode("cls", tokens[:, 0], str)
    assert list(stored) == ["cls"] and stored["cls"].dtype == torch.float16 and not rescaled
    assert codec("int8", tokens).needs("patches") == ("patches", "scale_patches")
    assert codec("fp16", tokens).needs("patches") == ("patches",)


def test_bytes_a_value() -> None:
    sizes = {
        name: sum(s.row_bytes for s in feature_specs({"patches": (196, 768)}, name).values())
        / (196 * 768)
        for name in CODECS
    }
    assert sizes["fp16"] == pytest.approx(2, rel=1e-3)
    assert sizes["int8"] == pytest.approx(1, rel=5e-3)
    # Four views for the bytes of one in fp16, but for the factors.
    assert sizes["int4"] == pytest.approx(0.5, rel=1e-2)
