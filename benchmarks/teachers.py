"""What `unic-extract` takes from each encoder: a table of shapes, measured at full width.

    uv run python -m benchmarks.teachers                       the list below, as in the docs
    uv run python -m benchmarks.teachers dinov2-g TAG TAG@384  these only, the last one at 384 px

Every model is made at full width and depth with random weights (nothing is downloaded), one after
the other, and run on one random view on the CPU; its patches must be timm's own spatial map, row by
row. The largest here needs some 5 GB of memory.
"""

import gc
import sys

import torch

from extract.encoders.encoder import EncoderError
from extract.teachers import TEACHERS, load_encoder

TAGS = (
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_dinov3.lvd1689m",
    "vit_large_patch16_dinov3.lvd1689m",
    "vit_huge_plus_patch16_dinov3.lvd1689m",
    "convnext_base.dinov3_lvd1689m",
    "vit_base_patch16_dinov3_qkvb.eupe_lvd1689m",
    "convnext_base.eupe_lvd1689m",
    "vit_base_patch16_siglip_224.v2_webli",
    "vit_so400m_patch14_siglip_224.v2_webli",
    "naflexvit_base_patch16_siglip.v2_webli",
    "naflexvit_base_patch16_radio_v3.c_radio",
    "naflexvit_so400m_patch16_radio_v4.c_radio",
    "vit_base_patch16_radio_v3.c_radio@512",
    "vit_pe_core_base_patch16_224.fb",
    "vit_pe_core_large_patch14_336.fb@336",
    "vit_pe_spatial_base_patch16_512.fb@512",
    "aimv2_large_patch14_224.apple_pt",
    "vit_huge_patch14_clip_quickgelu_224.metaclip2_worldwide",
    "vit_base_patch14_reg1_tipsv2.webli",
    "eva02_base_patch14_224.mim_in22k",
    "eva02_large_patch14_clip_224.merged2b",
    "beitv2_base_patch16_224.in1k_ft_in22k",
    "vit_base_patch16_224.mae",
    "vit_huge_patch14_gap_224.in22k_ijepa",
    "vit_base_patch16_clip_224.openai",
    "samvit_base_patch16.sa1b@1024",
    "hiera_base_224.mae",
    "convnext_base.clip_laion2b",
    "swin_base_patch4_window7_224.ms_in22k",
    "deit_base_distilled_patch16_224.fb_in1k",
    "resnet50.a1_in1k",
)
COLUMNS = ("encoder", "M parameters", "px", "grid", "cls", "patches", "registers", "global", "tap")


def row(asked: str) -> tuple[object, ...]:
    tag, _, size = asked.partition("@")
    name = tag if tag in TEACHERS else f"timm:{tag}"
    view = torch.randint(0, 256, (1, 3, int(size or 224), int(size or 224)), dtype=torch.uint8)
    try:
        encoder = load_encoder(f"random:{name}", size=int(size or 224))
    except EncoderError as error:
        return (f"`{name}`", *[""] * 7, str(error))
    tokens, spec = encoder(view), encoder.spec
    assert all(token.isfinite().all() for token in tokens.values())
    pixels = torch.randn(1, 3, spec.size, spec.size)
    with torch.no_grad():
        model = encoder.tokens.model
        # What timm calls the norm of SAM is its neck, which is part of its features.
        norm = spec.tap == "norm" or hasattr(model, "neck")
        (map_BDHW,) = model.forward_intermediates(
            pixels, indices=1, norm=norm, intermediates_only=True
        )
        patches = encoder.tokens(pixels)["patches"]
    assert tuple(map_BDHW.shape[2:]) == spec.grid
    torch.testing.assert_close(patches, map_BDHW.flatten(2).mT)
    registers = tokens.get("registers")
    return (
        f"`{name}`",
        f"{spec.parameters / 1e6:.0f}",
        spec.size,
        "{} x {}".format(*spec.grid),
        spec.cls_width,
        "{} x {}".format(*tokens["patches"].shape[1:]),
        "" if registers is None else registers.shape[1],
        spec.global_token,
        spec.tap,
    )


def main() -> None:
    print(*COLUMNS, sep=" | ")
    print(*["---"] * len(COLUMNS), sep=" | ")
    for asked in sys.argv[1:] or (*TEACHERS, *TAGS):
        print(*row(asked), sep=" | ", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
