"""Choosing the device that a command runs on."""

import torch

from extract.cache.errors import UserError


def torch_device(name: str) -> torch.device:
    """The device named: `auto` is the first CUDA device, or the CPU where there is none.

    Raises `UserError` for a name that is no device, or a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
