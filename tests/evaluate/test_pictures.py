import numpy as np
import pytest
import torch
from PIL import Image

from evaluate.pictures import pca_colours, pca_panel


def _tokens(n=3, side=4, width=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, side * side, width, generator=draw) * torch.arange(1, width + 1)


def _images(n=3):
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, 32, 48), dtype=torch.uint8, generator=draw)


def test_colours_follow_the_principal_components():
    tokens = _tokens()
    flat = tokens.flatten(0, 1).double()
    _, _, axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    colours = pca_colours(tokens, 4).reshape(-1, 3)
    for channel in range(3):
        inside = (colours[:, channel] > 0) & (colours[:, channel] < 1)
        wanted = ((flat - flat.mean(0)) @ axes[channel]).numpy()
        assert abs(np.corrcoef(colours[inside, channel], wanted[inside])[0, 1]) > 0.9999
        assert 0 < np.sum(~inside) <= 4  # 2 percent of 48 tokens at each end


def test_signs_do_not_depend_on_the_order_of_the_images():
    tokens = _tokens()
    turned = pca_colours(tokens.flip(0), 4)[::-1]
    np.testing.assert_allclose(turned, pca_colours(tokens, 4), atol=1e-9)


def test_one_outlier_does_not_wash_out_the_picture():
    tokens = _tokens(n=10)
    tokens[0, 0] = 1000  # 1 of 160, fewer than the 2 percent that are clipped
    assert pca_colours(tokens, 4)[1:].std(axis=(0, 1, 2)).min() > 0.1


def test_two_channels_and_constant_tokens_have_colours_too():
    assert (pca_colours(_tokens(width=2), 4)[..., 2] == 0.5).all()
    assert (pca_colours(torch.ones(2, 16, 8), 4) == 0.5).all()


def test_panel_has_a_row_an_image_and_a_column_an_encoder(tmp_path):
    path = tmp_path / "report" / "pca.png"
    encoders = {"dino": _tokens(), "unic": _tokens(side=2)}
    masks = torch.zeros(3, 32, 48, dtype=torch.long)
    masks[:, :16] = 255
    grids = {"dino": 4, "unic": (2, 2)}
    panel = pca_panel(_images(), encoders, grids, masks, path, cell_pixels=60)
    without = pca_panel(_images(), encoders, grids, cell_pixels=60)
    two_rows = pca_panel(_images(2), {"dino": _tokens(2)}, 4, cell_pixels=60)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(panel))
    assert panel.width - without.width == pytest.approx(60 * 1.04, abs=1)
    assert without.height - two_rows.height == pytest.approx(60 * (32 / 48 + 0.04), abs=1)


def test_mask_is_drawn_in_plain_colours_with_ignored_pixels_black():
    masks = torch.zeros(1, 32, 48, dtype=torch.long)
    masks[:, :, 24:] = 255
    picture = np.asarray(pca_panel(_images(1), {}, 4, masks, cell_pixels=100))
    right = picture[40:70, 100 + 60 : 100 + 95].reshape(-1, 3)
    left = picture[40:70, 100 + 15 : 100 + 45].reshape(-1, 3)
    assert (right == 0).all()
    assert len(np.unique(left, axis=0)) == 1
    assert left[0].any()


def test_panel_is_reproducible_and_an_encoder_may_be_called_image():
    data = (_images(), {"image": _tokens()}, 4)
    first, again = (np.asarray(pca_panel(*data, cell_pixels=50)) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.shape[1] > 100


def test_errors_name_the_fault():
    with pytest.raises(ValueError, match="of uint8"):
        pca_panel(_images().float(), {}, 4)
    with pytest.raises(ValueError, match="dino: expected 3 rows"):
        pca_panel(_images(), {"dino": _tokens(2)}, 4)
    with pytest.raises(ValueError, match=r"expected tokens \[N, 25, D\]"):
        pca_panel(_images(), {"dino": _tokens()}, 5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        pca_colours(_tokens() * float("nan"), 4)
