"""Choosing the device that a command runs on."""

import os
from collections.abc import Mapping

import torch

from extract.cache.errors import UserError


def local_rank(environment: Mapping[str, str]) -> int:
    """This process's number among those of its machine; 0 without a launcher."""
    text = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or "0"
    return int(text) if text.isdecimal() else 0


def torch_device(name: str) -> torch.device:
    """The device named: `auto` is a CUDA device, or the CPU where there is none.

    Of several CUDA devices, `auto` takes that of this process's number on its machine, as torchrun
    (LOCAL_RANK) and SLURM (SLURM_LOCALID) give it, else the first. Raises `UserError` for a name
    that is no device, or a device that this machine lacks.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", local_rank(os.environ) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"--device {name!r} is no device; expected auto, cpu, cuda or cuda:N"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that "
            "torch can use; choose another, or --device cpu"
        )
    return device
