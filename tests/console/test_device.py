"""Choosing the device."""

import pytest
import torch

from console.device import local_rank, torch_device
from extract.cache.errors import UserError


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "3"}, 3),
        ({"SLURM_LOCALID": "2"}, 2),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "2"}, 1),
        ({"LOCAL_RANK": "x"}, 0),
    ],
)
def test_a_process_takes_the_device_of_its_number(
    environment: dict[str, str], expected: int
) -> None:
    assert local_rank(environment) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_without_cuda() -> None:
    assert torch_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="has 0 CUDA devices"):
        torch_device("cuda:1")


def test_what_is_no_device() -> None:
    with pytest.raises(UserError, match="'gpu' is no device; expected auto, cpu, cuda"):
        torch_device("gpu")
