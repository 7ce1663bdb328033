import pytest
import torch

from extract.encoders.baselines import fixed_seed
from extract.encoders.encoder import EncoderError
from extract.teachers import load_encoder


def test_pixel_tokens_are_the_pixels() -> None:
    encoder = load_encoder("pixels:8", size=32)
    views = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = encoder(views)
    pooled = views.float().div(255).view(2, 3, 16, 2, 16, 2).mean((3, 5))
    torch.testing.assert_close(tokens["cls"], pooled.flatten(1))
    assert tokens["patches"].shape == (2, 16, 192)
    patch = views[1, :, 8:16, 24:32].float().div(255)  # row 1, column 3
    torch.testing.assert_close(tokens["patches"][1, 1 * 4 + 3], patch.flatten())


def test_pixels_have_no_weights_and_a_spec_that_says_so() -> None:
    spec = load_encoder("pixels").spec
    assert (spec.grid, spec.patch_size, spec.parameters) == ((14, 14), 16, 0)
    assert (spec.cls_width, spec.patch_width) == (768, 768)
    assert spec.sha256 == load_encoder("pixels:8").spec.sha256


@pytest.mark.parametrize("name", ["pixels:15", "pixels:0", "pixels:big", "pixels:-4"])
def test_patches_that_do_not_tile_are_refused(name: str) -> None:
    with pytest.raises(EncoderError, match="pixels:16"):
        load_encoder(name, size=32)


def test_the_untrained_model_is_the_same_every_time() -> None:
    args = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_encoder("random:vit_tiny_patch16_224", size=32, model_args=args)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = load_encoder("random:vit_tiny_patch16_224", size=32, model_args=args)
    assert first.spec == second.spec
    assert first.spec.source == "random:0" and first.spec.licence == "none"


def test_fixed_seed_makes_the_same_draws() -> None:
    with fixed_seed(3):
        first = torch.rand(4)
    with fixed_seed(3):
        assert torch.equal(torch.rand(4), first)
    with fixed_seed(4):
        assert not torch.equal(torch.rand(4), first)
