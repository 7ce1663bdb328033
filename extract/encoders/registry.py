"""The teachers that have a short name: the six of the paper.

A card says everything about a teacher that its weights do not: which timm model they are for, where
they come from, which token is the global one, what its pixels were normalised by, whose it is.
`docs/teachers.md` is the same table for people.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

_BYTEDANCE = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource"


@dataclass(frozen=True)
class TeacherCard:
    """A teacher that the commands know by a short name.

    Attributes:
        name: what it is called, also as its folder in a cache.
        tag: timm's architecture, and after the dot the weights on the Hugging Face hub. Without a
            dot the weights come from `url`.
        global_token: `cls` (the class token) or `pool` (the model's own pooling).
        native_size: side of the images that its position embedding is for, in pixels.
        width: D of its tokens.
        parameters: their number at that size, without classifiers.
        licence: of the weights.
        paper: where it is described.
        note: how it was trained, and which tokens are taken.
        mean: of the normalisation, for pixels in [0, 1].
        std: the same.
        args: further arguments of `timm.create_model`.
        url: where its authors publish the weights, where timm does not have them.
        sha256: of the file at `url`, where it is known.
    """

    name: str
    tag: str
    global_token: str
    native_size: int
    width: int
    parameters: int
    licence: str
    paper: str
    note: str
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    args: Mapping[str, Any] = field(default_factory=dict)
    url: str | None = None
    sha256: str | None = None


TEACHERS = {
    card.name: card
    for card in (
        TeacherCard(
            name="dino",
            tag="vit_base_patch16_224.dino",
            global_token="cls",
            native_size=224,
            width=768,
            parameters=85_798_656,
            licence="apache-2.0",
            paper="DINO ViT-B/16 (Caron et al., 2021)",
            note="self-supervised on ImageNet-1K; CLS and patches after the final norm",
        ),
        TeacherCard(
            name="deit3",
            tag="deit3_base_patch16_224.fb_in1k",
            global_token="cls",
            native_size=224,
            width=768,
            parameters=85_816_320,
            licence="apache-2.0",
            paper="DeiT-III ViT-B/16 (Touvron et al., 2022)",
            note="supervised on ImageNet-1K; CLS and patches after the final norm",
        ),
        TeacherCard(
            name="ibot",
            tag="vit_base_patch16_224",
            global_token="cls",
            native_size=224,
            width=768,
            parameters=85_798_656,
            licence="apache-2.0",
            paper="iBOT ViT-B/16 (Zhou et al., 2022)",
            note="self-supervised on ImageNet-1K, random masking, the teacher network; CLS and "
            "patches after the final norm",
            url=f"{_BYTEDANCE}/archive/2022/ibot/vitb_16_rand_mask/checkpoint_teacher.pth",
        ),
        TeacherCard(
            name="dbot-ft",
            tag="vit_base_patch16_224",
            global_token="pool",
            native_size=224,
            width=768,
            parameters=85_798_656,
            licence="apache-2.0",
            paper="dBOT ViT-B/16, fine-tuned (Liu et al., 2024)",
            note="fine-tuned on ImageNet-1K labels; the global token is the norm of the mean of "
            "all patches, the patches themselves have no norm, the class token is not used",
            args={"global_pool": "avg"},
            url=f"{_BYTEDANCE}/mmodal/dbot/84.5_dbot_base_finetune.pth",
        ),
        TeacherCard(
            name="dinov2-g",
            tag="vit_giant_patch14_dinov2.lvd142m",
            global_token="cls",
            native_size=518,
            width=1536,
            parameters=1_136_479_232,
            licence="apache-2.0",
            paper="DINOv2 ViT-g/14 (Oquab et al., 2024)",
            note="self-supervised on LVD-142M, without registers; CLS and patches after the final "
            "norm",
        ),
        TeacherCard(
            name="metaclip-h",
            tag="vit_huge_patch14_clip_quickgelu_224.metaclip_2pt5b",
            global_token="cls",
            native_size=224,
            width=1280,
            parameters=630_766_080,
            licence="cc-by-nc-4.0",
            paper="MetaCLIP ViT-H/14 (Xu et al., 2024)",
            note="contrastive on 2.5 billion image-text pairs, with QuickGELU; CLS and patches "
            "after the final norm, before the projection to the text's space",
            mean=OPENAI_CLIP_MEAN,
            std=OPENAI_CLIP_STD,
        ),
    )
}


def available_teachers() -> list[TeacherCard]:
    """The teachers that have a short name."""
    return list(TEACHERS.values())
