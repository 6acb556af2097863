"""The device a run uses."""

import re

import torch

from gac.errors import InputError
from gac.training.distributed import ALONE, Ranks


def select_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Return the device that a ``device`` setting means: auto, cpu, cuda or cuda:N. A CUDA device becomes current.

    Of several ranks each gets a CUDA device of its own, in their order on the machine. Raises InputError for another
    name, for a CUDA device that is not there and for one that several ranks would share.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}")
    index = int(match[1] or 0)
    if ranks.size > 1:
        if match[1] is not None:
            raise InputError(
                f"device {name} is a single one, and there are {ranks.size} processes: use --device cuda, which gives"
                " each its own, or auto or cpu"
            )
        index = ranks.local_rank
        if index >= torch.cuda.device_count():
            raise InputError(
                f"there is no CUDA device for process {index} of this machine, PyTorch sees"
                f" {torch.cuda.device_count()}: lower torchrun's --nproc_per_node or see to CUDA_VISIBLE_DEVICES"
            )
    if index >= torch.cuda.device_count():
        raise InputError(
            f"device {name} is not there, PyTorch sees {torch.cuda.device_count()} CUDA devices: use --device auto"
            " or cpu, or see to the driver and CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", index)
    # Libraries that know only the current device would otherwise open a context, and allocate, on device 0.
    torch.cuda.set_device(device)
    return device
