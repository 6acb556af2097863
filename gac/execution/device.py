"""The device of a run and the precision it computes in."""

import re

import torch

from gac.config import TrainConfig
from gac.errors import InputError
from gac.execution.distributed import SINGLE_PROCESS, Ranks


def select_device(name: str, ranks: Ranks = SINGLE_PROCESS) -> torch.device:
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


def memory_format(config: TrainConfig, device: torch.device) -> torch.memory_format:
    """Return the memory order of weights and of training images on a device, which activations take over."""
    # On a CPU with AVX2 oneDNN's weight gradient of a strided 1x1 convolution writes beyond its memory in channels_last
    # where channels are no multiple of 8 (seen with torch 2.14.1), and widths are free. Evaluation has no gradients.
    return torch.channels_last if config.channels_last and device.type == "cuda" else torch.contiguous_format


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the context in which a network runs for ``amp`` off, fp16 or bf16."""
    return torch.autocast(device.type, dtype=DTYPES.get(amp), enabled=amp != "off")


def check_precision(device: torch.device, amp: str) -> None:
    """Raise InputError if ``device`` cannot train in this precision."""
    if amp == "fp16" and device.type != "cuda":
        raise InputError(f"train.amp fp16 needs a CUDA device, got {device.type}; use bf16 or off")


def describe_precision(device: torch.device, amp: str) -> str:
    """Return the precision that ``amp`` amounts to on ``device``, in words."""
    if amp != "off":
        return amp
    # PyTorch's default, and so what the authors' float32 runs had on such GPUs.
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device)[0] >= 8:
        return "float32 with TF32 convolutions"
    return "float32"
