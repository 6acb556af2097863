"""The device a run uses."""

import re

import torch

from gac.errors import InputError


def select_device(name: str) -> torch.device:
    """Return the device that a ``device`` setting means: auto, cpu, cuda or cuda:N. A CUDA device becomes current.

    Raises InputError for another name and for a CUDA device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}")
    index = int(match[1] or 0)
    if index >= torch.cuda.device_count():
        raise InputError(
            f"device {name} is not there, PyTorch sees {torch.cuda.device_count()} CUDA devices: use --device auto"
            " or cpu, or see to the driver and CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", index)
    # Libraries that know only the current device would otherwise open a context, and allocate, on device 0.
    torch.cuda.set_device(device)
    return device
