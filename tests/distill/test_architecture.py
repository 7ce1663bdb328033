"""Naming a student in words."""

import json

import pytest

from distill.architecture import parse_student
from distill.student import Student


@pytest.mark.parametrize(
    "text, name, arguments",
    [
        ("vit_small_patch16_224", "vit_small_patch16_224", {}),
        (
            " vit_tiny_patch16_224  patch_size=8 depth=5 ",
            "vit_tiny_patch16_224",
            {"patch_size": 8, "depth": 5},
        ),
        (
            "vit_tiny_patch16_224 init_values=1e-5 qk_norm=True global_pool=token weight_init=",
            "vit_tiny_patch16_224",
            {"init_values": 1e-5, "qk_norm": True, "global_pool": "token", "weight_init": ""},
        ),
        ("", "", {}),
    ],
)
def test_names_and_arguments(text, name, arguments):
    assert parse_student(text) == (name, arguments)


def test_a_word_that_is_no_argument():
    with pytest.raises(ValueError, match="'depth' is no key=value; write for example"):
        parse_student("vit_tiny_patch16_224 depth")


def test_a_timm_folder_gives_its_architecture_without_size_and_head(encoders):
    name, arguments = parse_student(str(encoders["wide"]))
    assert name == "vit_tiny_patch16_224"
    assert not {"img_size", "num_classes"} & set(arguments)
    student = Student(name, img_size=96, **arguments)
    assert (student.width, student.depth, student.grid) == (48, 3, (8, 8))


def test_a_folder_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="names no architecture"):
        parse_student(str(tmp_path))
