"""Automatic mixed precision."""

import torch

from gac.errors import InputError

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
