"""A ViT in plain torch that shares no code with timm, and checkpoints in the layout it reads."""

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH, DEPTH, HEADS = 32, 2, 2
ARGS = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def upstream_vit(
    seed: int, *, grid: int = 14, patch: int = 16, cls_position: bool = True
) -> dict[str, Tensor]:
    """The keys that DINO, iBOT, DeiT-III and DINOv2 share, with random values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    state = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, cls_position + grid * grid, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, patch, patch, scale=0.05),
        "patch_embed.proj.bias": draw(WIDTH),
    }
    norms = ["norm", *(f"blocks.{i}.norm{j}" for i in range(DEPTH) for j in (1, 2))]
    for name in norms:
        state |= {f"{name}.weight": 1 + draw(WIDTH), f"{name}.bias": draw(WIDTH)}
    for i in range(DEPTH):
        for name, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):
            state[f"blocks.{i}.{name}.weight"] = draw(rows, columns)
            state[f"blocks.{i}.{name}.bias"] = draw(rows)
    return state


def add_layer_scale(state: dict[str, Tensor], names: tuple[str, str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(99)
    gammas = {
        f"blocks.{i}.{name}": torch.rand(WIDTH, generator=generator)
        for i in range(DEPTH)
        for name in names
    }
    return state | gammas


def plain_vit(
    state: dict[str, Tensor],
    views: Tensor,
    position: Tensor,
    *,
    registers: Tensor | None = None,
    gammas: tuple[str, str] | None = None,
    norm: bool = True,
) -> Tensor:
    """Tokens `[B, 1 + R + P, D]`; `position` is for CLS and patches, or for patches alone."""

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = (
            part.view(batch, count, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in linear(x, f"{name}.qkv").split(WIDTH, -1)
        )
        weights = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        return linear((weights @ v).transpose(1, 2).reshape(x.shape), f"{name}.proj")

    def feed_forward(x: Tensor, name: str) -> Tensor:
        if f"{name}.w12.weight" in state:
            return swiglu(state, x, name)
        return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")

    pixels = (views / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(pixels, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    cls = state["cls_token"].expand(len(x), -1, -1)
    if position.shape[1] == x.shape[1]:
        x = torch.cat([cls, x + position], 1)
    else:
        x = torch.cat([cls, x], 1) + position
    if registers is not None:
        x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(DEPTH):
        scale1, scale2 = (state[f"blocks.{i}.{g}"] for g in gammas) if gammas else (1.0, 1.0)
        x = x + scale1 * attention(layer_norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn")
        x = x + scale2 * feed_forward(layer_norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
    return layer_norm(x, "norm") if norm else x


def resampled(position: Tensor, prefix: int, side: int, antialias: bool) -> Tensor:
    old = round((position.shape[1] - prefix) ** 0.5)
    grid = position[:, prefix:].view(1, old, old, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=antialias)
    return torch.cat([position[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


def views(size: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def swiglu(state: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    """The feed-forward part of DINOv2's giant: silu(gate) * value, from one matrix."""
    both = x @ state[f"{name}.w12.weight"].T + state[f"{name}.w12.bias"]
    gate, value = both.chunk(2, -1)
    return (F.silu(gate) * value) @ state[f"{name}.w3.weight"].T + state[f"{name}.w3.bias"]


def plain_clip(
    state: dict[str, Tensor],
    views: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    quick: bool,
) -> Tensor:
    """All tokens `[B, 1 + P, D]` of CLIP's image tower after `ln_post`, in CLIP's own names."""

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    pixels = (views / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    kernel = state["visual.conv1.weight"]
    x = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    cls = state["visual.class_embedding"].expand(len(x), 1, WIDTH)
    x = torch.cat([cls, x], 1) + state["visual.positional_embedding"]
    x = layer_norm(x, "visual.ln_pre")
    for i in range(DEPTH):
        block = f"visual.transformer.resblocks.{i}"
        attended, _ = F.multi_head_attention_forward(
            *[layer_norm(x, f"{block}.ln_1").transpose(0, 1)] * 3,
            *(WIDTH, HEADS),
            *(state[f"{block}.attn.in_proj_{kind}"] for kind in ("weight", "bias")),
            *(None, None, False, 0.0),
            *(state[f"{block}.attn.out_proj.{kind}"] for kind in ("weight", "bias")),
            training=False,
        )
        x = x + attended.transpose(0, 1)
        hidden = F.linear(
            layer_norm(x, f"{block}.ln_2"),
            *(state[f"{block}.mlp.c_fc.{kind}"] for kind in ("weight", "bias")),
        )
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)
        x = x + F.linear(
            hidden, *(state[f"{block}.mlp.c_proj.{kind}"] for kind in ("weight", "bias"))
        )
    return layer_norm(x, "visual.ln_post")
