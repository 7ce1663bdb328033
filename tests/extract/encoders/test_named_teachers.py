"""The named teachers, from files in the layouts that their authors publish.

Width and depth are reduced; the expected tokens are those of `plain_vit`, which is not timm.
"""

import argparse
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from plain_vit import (
    ARGS,
    DEPTH,
    MEAN,
    STD,
    WIDTH,
    add_layer_scale,
    assert_close,
    plain_clip,
    plain_vit,
    resampled,
    upstream_vit,
    views,
)
from torch import Tensor
from torch.nn import functional as F

from extract.encoders.checkpoints import CheckpointError
from extract.encoders.encoder import EncoderError
from extract.encoders.registry import TEACHERS, available_teachers
from extract.teachers import load_encoder

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
METACLIP = "vit_huge_patch14_clip_quickgelu_224.metaclip_2pt5b"


def test_the_cards_are_true_at_full_width() -> None:
    assert [c.name for c in available_teachers()] == (
        ["dino", "deit3", "ibot", "dbot-ft", "dinov2-g", "metaclip-h"]
    )
    for card in available_teachers():
        with torch.device("meta"):
            model = timm.create_model(card.tag, num_classes=0, **card.args)
        cfg = model.pretrained_cfg
        assert model.num_features == card.width, card.name
        assert sum(p.numel() for p in model.parameters()) == card.parameters, card.name
        assert cfg["input_size"][-1] == card.native_size, card.name
        assert (card.url is None) == ("." in card.tag), card.name
        if card.url is None:
            assert (card.mean, card.std) == (cfg["mean"], cfg["std"]), card.name
            assert timm.get_pretrained_cfg(card.tag).license == card.licence
        else:
            assert (card.mean, card.std) == (MEAN, STD), card.name
    assert (TEACHERS["metaclip-h"].mean, TEACHERS["metaclip-h"].std) == (CLIP_MEAN, CLIP_STD)


def test_the_documented_table_is_that_of_the_cards() -> None:
    text = (Path(__file__).parents[3] / "docs" / "teachers.md").read_text()
    table = text.partition("## The six of the paper")[2].partition("\n\n")[0].splitlines()[3:]
    rows = {cells[1].strip(" `"): cells for cells in (line.split("|") for line in table)}
    assert list(rows) == list(TEACHERS)
    for name, card in TEACHERS.items():
        cells = [cell.strip(" *") for cell in rows[name]]
        where = f"({card.url})" if card.url else f"`{card.tag}`"
        assert where in cells[3], name
        assert cells[4] == card.licence and cells[9] == str(card.width), name
        assert cells[5] == ("CLIP" if card.mean == CLIP_MEAN else "ImageNet"), name
        assert cells[6].startswith("CLS") == (card.global_token == "cls"), name


# iBOT


def ibot_file(path: Path, seed: int = 0) -> dict[str, Tensor]:
    """The backbone of the teacher network, as iBOT's authors publish it."""
    state = upstream_vit(seed)
    torch.save({"state_dict": state}, path)
    return state


def ibot_full(path: Path) -> dict[str, Tensor]:
    """What iBOT's training writes: only the student has a token for masked patches."""
    teacher, student = upstream_vit(0), upstream_vit(1) | {"masked_embed": torch.zeros(1, WIDTH)}
    heads = {"head.mlp.0.weight": torch.zeros(8, WIDTH), "head.last_layer.weight_g": torch.ones(9)}
    content = {
        "student": {f"module.backbone.{k}": v for k, v in student.items()}
        | {f"module.{k}": v for k, v in heads.items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.items()} | heads,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 400,
        "args": argparse.Namespace(arch="vit_base", patch_size=16),
        "ibot_loss": {"center": torch.zeros(1, 9), "center2": torch.zeros(1, 1, 9)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }
    torch.save(content, path)
    return teacher


@pytest.mark.parametrize("write", [ibot_file, ibot_full])
def test_ibot(tmp_path: Path, write) -> None:
    state = write(tmp_path / "checkpoint_teacher.pth")
    encoder = load_encoder("ibot", weights=tmp_path / "checkpoint_teacher.pth", model_args=ARGS)
    expected = plain_vit(state, views(224), state["pos_embed"])
    tokens = encoder(views(224))
    assert_close(tokens["cls"], expected[:, 0])
    assert_close(tokens["patches"], expected[:, 1:])
    spec = encoder.spec
    # The architecture's own default in timm is 0.5 for all: other weights' constants.
    assert (spec.mean, spec.std) == (MEAN, STD)
    assert (spec.global_token, spec.tap, spec.licence) == ("cls", "norm", "apache-2.0")
    assert spec.source == "file:checkpoint_teacher.pth"


# dBOT, fine-tuned


def dbot_file(path: Path) -> dict[str, Tensor]:
    """MAE's fine-tuning format: no `norm`, an `fc_norm` before the 1000-way head."""
    state = upstream_vit(7)
    model = {k.replace("norm.", "fc_norm.") if k[:5] == "norm." else k: v for k, v in state.items()}
    model |= {"head.weight": torch.ones(1000, WIDTH), "head.bias": torch.ones(1000)}
    content = {
        "model": model,
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": []},
        "epoch": 99,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="vit_base_patch16", global_pool=True),
    }
    torch.save(content, path)
    return state


def test_dbot_ft_pools_then_norms_and_leaves_patches_as_they_are(tmp_path: Path) -> None:
    state = dbot_file(tmp_path / "84.5_dbot_base_finetune.pth")
    file = tmp_path / "84.5_dbot_base_finetune.pth"
    encoder = load_encoder("dbot-ft", weights=file, model_args=ARGS)
    expected = plain_vit(state, views(224), state["pos_embed"], norm=False)
    norm = partial(F.layer_norm, normalized_shape=(WIDTH,), eps=1e-6)
    final = {"weight": state["norm.weight"], "bias": state["norm.bias"]}
    tokens = encoder(views(224))
    assert_close(tokens["cls"], norm(expected[:, 1:].mean(1), **final))
    assert_close(tokens["patches"], expected[:, 1:])
    # What a look at the first token would have given, normed or not, and the patches normed.
    for wrong in (expected[:, 0], norm(expected[:, 0], **final), norm(expected.mean(1), **final)):
        assert (tokens["cls"] - wrong).abs().max() > 1e-3
    assert (tokens["patches"] - norm(expected[:, 1:], **final)).abs().max() > 0.1
    spec = encoder.spec
    assert (spec.global_token, spec.tap, spec.mean, spec.std) == ("pool", "features", MEAN, STD)
    assert (spec.name, spec.licence) == ("dbot-ft", "apache-2.0")


def test_files_of_the_one_are_refused_by_the_other(tmp_path: Path) -> None:
    ibot_file(tmp_path / "ibot.pth")
    dbot_file(tmp_path / "dbot.pth")
    with pytest.raises(CheckpointError, match=r"missing: fc_norm.weight, fc_norm.bias"):
        load_encoder("dbot-ft", weights=tmp_path / "ibot.pth", model_args=ARGS)
    with pytest.raises(CheckpointError, match=r"unexpected: fc_norm.weight, fc_norm.bias"):
        load_encoder("ibot", weights=tmp_path / "dbot.pth", model_args=ARGS)


# DINOv2 g/14


def dinov2_giant_file(path: Path) -> dict[str, Tensor]:
    """SwiGLU with both halves in one matrix, LayerScale, positions for 37 x 37 patches."""
    state = add_layer_scale(upstream_vit(3, grid=37, patch=14), ("ls1.gamma", "ls2.gamma"))
    generator = torch.Generator().manual_seed(8)
    hidden = 85  # timm's 2.66667 times the width; upstream rounds to a multiple of 8 at full width
    for i in range(DEPTH):
        for name in ("fc1", "fc2"):
            del state[f"blocks.{i}.mlp.{name}.weight"], state[f"blocks.{i}.mlp.{name}.bias"]
        for name, rows, columns in (("w12", 2 * hidden, WIDTH), ("w3", WIDTH, hidden)):
            draw = torch.randn(rows, columns + 1, generator=generator) * 0.2
            state[f"blocks.{i}.mlp.{name}.weight"] = draw[:, 1:].contiguous()
            state[f"blocks.{i}.mlp.{name}.bias"] = draw[:, 0].contiguous()
    torch.save(state | {"mask_token": torch.zeros(1, WIDTH)}, path)
    return state


@pytest.mark.parametrize("size", [224, 518])
def test_dinov2_giant_at_the_views_size_and_its_own(tmp_path: Path, size: int) -> None:
    state = dinov2_giant_file(tmp_path / "dinov2_vitg14_pretrain.pth")
    file = tmp_path / "dinov2_vitg14_pretrain.pth"
    encoder = load_encoder("dinov2-g", size=size, weights=file, model_args=ARGS)
    position = state["pos_embed"]
    if size == 224:
        position = resampled(position, 1, 16, antialias=True)
    expected = plain_vit(state, views(size, 1), position, gammas=("ls1.gamma", "ls2.gamma"))
    tokens = encoder(views(size, 1))
    assert_close(tokens["cls"], expected[:, 0])
    assert_close(tokens["patches"], expected[:, 1:])
    assert set(tokens) == {"cls", "patches"}, "not the model with registers"
    rule = "timm-bicubic-antialias" if size == 224 else "native"
    assert encoder.spec.position_embedding == rule
    assert encoder.spec.grid == (size // 14, size // 14)


# MetaCLIP H/14


def metaclip_file(path: Path) -> dict[str, Tensor]:
    """Both towers of CLIP by CLIP's own names, as the authors' training writes them."""
    generator = torch.Generator().manual_seed(9)
    draw = partial(torch.randn, generator=generator)
    state = {
        "positional_embedding": draw(77, 24),
        "text_projection": draw(24, 16),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": draw(WIDTH),
        "visual.positional_embedding": draw(1 + 16 * 16, WIDTH) * 0.2,
        "visual.proj": draw(WIDTH, 16),
        "visual.conv1.weight": draw(WIDTH, 3, 14, 14) * 0.05,
        "token_embedding.weight": draw(100, 24),
        "ln_final.weight": torch.ones(24),
        "ln_final.bias": torch.zeros(24),
        "transformer.resblocks.0.attn.in_proj_weight": draw(72, 24),
        "transformer.resblocks.0.ln_1.weight": torch.ones(24),
    }
    blocks = [f"visual.transformer.resblocks.{i}" for i in range(DEPTH)]
    norms = ["visual.ln_pre", "visual.ln_post", *(f"{b}.ln_{j}" for b in blocks for j in (1, 2))]
    for name in norms:
        state |= {f"{name}.weight": 1 + 0.2 * draw(WIDTH), f"{name}.bias": 0.2 * draw(WIDTH)}
    for block in blocks:
        for name, rows, columns in (
            ("attn.in_proj_", 3 * WIDTH, WIDTH),
            ("attn.out_proj.", WIDTH, WIDTH),
            ("mlp.c_fc.", 4 * WIDTH, WIDTH),
            ("mlp.c_proj.", WIDTH, 4 * WIDTH),
        ):
            state[f"{block}.{name}weight"] = 0.3 * draw(rows, columns)
            state[f"{block}.{name}bias"] = 0.3 * draw(rows)
    named = {f"module.{k}": v for k, v in state.items()}
    torch.save({"epoch": 1, "name": "h14", "state_dict": named}, path)
    return state


def test_metaclip_with_quickgelu_and_clip_s_own_normalisation(tmp_path: Path) -> None:
    state = metaclip_file(tmp_path / "h14_fullcc2.5b.pt")
    file = tmp_path / "h14_fullcc2.5b.pt"
    encoder = load_encoder("metaclip-h", weights=file, model_args=ARGS)
    tokens = encoder(views(224))
    expected = plain_clip(state, views(224), CLIP_MEAN, CLIP_STD, quick=True)
    assert_close(tokens["cls"], expected[:, 0])
    assert_close(tokens["patches"], expected[:, 1:])
    assert tokens["cls"].shape[1] == WIDTH, "before the projection to the text's space"
    spec = encoder.spec
    assert (spec.mean, spec.std, spec.licence) == (CLIP_MEAN, CLIP_STD, "cc-by-nc-4.0")
    # The same weights in timm's model of nearly the same name, which has the plain GELU.
    other = load_encoder(
        f"timm:{METACLIP.replace('quickgelu_', '')}", weights=file, model_args=ARGS
    )
    plain = plain_clip(state, views(224), CLIP_MEAN, CLIP_STD, quick=False)
    assert_close(other(views(224))["cls"], plain[:, 0])
    assert (other(views(224))["cls"] - tokens["cls"]).abs().max() > 1e-2
    assert other.spec.sha256 == spec.sha256


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("ibot", ibot_file),
        ("dbot-ft", dbot_file),
        ("dinov2-g", dinov2_giant_file),
        ("metaclip-h", metaclip_file),
    ],
)
def test_one_tensor_too_many_or_too_few_is_refused(tmp_path: Path, name: str, write) -> None:
    write(tmp_path / "w.pth")
    content = torch.load(tmp_path / "w.pth", weights_only=False)  # written above, holds a Namespace
    inner = content.get("state_dict", content.get("model", content))
    first = next(k for k in inner if k.endswith(("norm1.weight", "visual.ln_pre.weight")))
    extra = first.replace("weight", "gain")
    inner[extra] = inner[first]
    torch.save(content, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: .*gain"):
        load_encoder(name, weights=tmp_path / "more.pth", model_args=ARGS)
    del inner[extra], inner[first]
    torch.save(content, tmp_path / "fewer.pth")
    with pytest.raises(CheckpointError, match=r"missing: (blocks.0.norm1|norm_pre).weight"):
        load_encoder(name, weights=tmp_path / "fewer.pth", model_args=ARGS)


# Downloads


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder behind a real web server, and torch.hub's cache in an empty one."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def publish(monkeypatch: pytest.MonkeyPatch, name: str, url: str, sha256: str | None = None):
    monkeypatch.setitem(TEACHERS, name, replace(TEACHERS[name], url=url, sha256=sha256))


def test_weights_are_downloaded_once(
    served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, address = served
    state = ibot_file(folder / "checkpoint_teacher.pth")
    publish(monkeypatch, "ibot", f"{address}/checkpoint_teacher.pth")
    encoder = load_encoder("ibot", model_args=ARGS)
    expected = plain_vit(state, views(224), state["pos_embed"])
    assert_close(encoder(views(224))["patches"], expected[:, 1:])
    assert encoder.spec.source == f"url:{address}/checkpoint_teacher.pth"
    assert f"from {address}/checkpoint_teacher.pth" in capsys.readouterr().err
    (folder / "checkpoint_teacher.pth").unlink()
    again = load_encoder("mine=ibot", model_args=ARGS)
    assert again.spec.sha256 == encoder.spec.sha256 and again.spec.name == "mine"
    cached = list((tmp_path / "cache").rglob("*.pth"))
    assert [path.name for path in cached] == ["ibot-checkpoint_teacher.pth"]
    given = load_encoder("ibot", weights=cached[0], model_args=ARGS)
    assert given.spec.source == "file:ibot-checkpoint_teacher.pth"


def test_without_a_connection_the_error_is_the_line_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    publish(monkeypatch, "dbot-ft", "http://127.0.0.1:9/84.5_dbot_base_finetune.pth")
    with pytest.raises(EncoderError) as error:
        load_encoder("dbot-ft", model_args=ARGS)
    message = str(error.value)
    assert " http://127.0.0.1:9/84.5_dbot_base_finetune.pth " in message
    assert message.endswith(
        ": unic-extract --teacher dbot-ft --weights 84.5_dbot_base_finetune.pth"
    )
    assert not list(tmp_path.rglob("*.pth*"))


def test_a_damaged_download_says_which_file_to_delete(
    served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    ibot_file(folder / "w.pth")
    (folder / "w.pth").write_bytes((folder / "w.pth").read_bytes()[:10_000])
    publish(monkeypatch, "ibot", f"{address}/w.pth")
    with pytest.raises(CheckpointError, match=r"no whole torch file(.|\n)*delete .*ibot-w\.pth"):
        load_encoder("ibot", model_args=ARGS)


def test_a_download_with_another_sha256_is_not_kept(
    served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    ibot_file(folder / "w.pth")
    publish(monkeypatch, "ibot", f"{address}/w.pth", "0" * 64)
    with pytest.raises(EncoderError, match="invalid hash value"):
        load_encoder("ibot", model_args=ARGS)
    assert not list((tmp_path / "cache").rglob("*.pth*"))


def test_an_untrained_named_teacher_needs_no_weights() -> None:
    encoder = load_encoder("random:dbot-ft", model_args=ARGS)
    assert (encoder.spec.global_token, encoder.spec.tap) == ("pool", "features")
    assert (encoder.spec.mean, encoder.spec.source) == (MEAN, "random:0")


# Architectures with rules of their own


def timm_file(path: Path, name: str, **args: object) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **{**ARGS, **args})
    torch.nn.init.normal_(model.pos_embed)
    torch.save(model.state_dict(), path)


def test_radio_of_a_fixed_size_is_right_at_that_size_only(tmp_path: Path) -> None:
    name = "timm:vit_base_patch16_radio_v3.c_radio"
    timm_file(tmp_path / "radio.pth", "vit_base_patch16_radio_v3")
    load = partial(load_encoder, name, weights=tmp_path / "radio.pth", model_args=ARGS)
    assert load(size=512).spec.position_embedding == "native"
    with pytest.raises(EncoderError, match="use timm:naflexvit_base_patch16_radio_v3, which"):
        load(size=224)
    chosen = load(size=224, position_embedding="bicubic-noantialias")
    assert chosen.spec.position_embedding == "bicubic-noantialias"
    own = {"radio_model.model.patch_generator.pos_embed": torch.zeros(1, 128 * 128, WIDTH)}
    torch.save(own, tmp_path / "nvidia.pth")
    with pytest.raises(CheckpointError, match="RADIO's own file"):
        load_encoder(name, weights=tmp_path / "nvidia.pth", model_args=ARGS)


def test_flexivit_is_resized_as_it_was_trained(tmp_path: Path) -> None:
    timm_file(tmp_path / "flexi.pth", "flexivit_small", img_size=240)
    state = torch.load(tmp_path / "flexi.pth", weights_only=True)
    name = "timm:flexivit_small.1200ep_in1k"
    encoder = load_encoder(name, size=96, weights=tmp_path / "flexi.pth", model_args=ARGS)
    assert encoder.spec.position_embedding == "bilinear-noantialias"
    table = state["pos_embed"][:, -15 * 15 :].view(1, 15, 15, WIDTH).permute(0, 3, 1, 2)
    expected = F.interpolate(table, (6, 6), mode="bilinear", antialias=False)
    found = encoder.tokens.model.pos_embed[:, -36:]
    assert_close(found, expected.flatten(2).transpose(1, 2))
