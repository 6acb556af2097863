"""The device of a run and the precision it computes in."""

import functools
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from gac.config import TrainConfig
from gac.errors import InputError
from gac.execution.distributed import SINGLE_PROCESS, Ranks

logger = logging.getLogger("gac")


def select_device(name: str, ranks: Ranks = SINGLE_PROCESS) -> torch.device:
    """Return the device that a ``device`` setting means: auto, cpu, cuda, cuda:N or PyTorch's name of another one.

    A CUDA device becomes current. Each of several ranks gets its own CUDA device, in their order on the machine. Raises
    InputError for any other name, for a device that is not there and for one that several ranks would share. Warns
    where auto means the CPU of a machine with an NVIDIA GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if ranks.is_main and (unused := unused_gpus()):
            logger.warning("device auto is the CPU: %s", unused)
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    try:
        named = torch.device(name)
    except RuntimeError:
        named = None
    if named is None or kind == "cpu":
        raise InputError(
            "device must be auto, cpu, cuda, cuda:N or another accelerator of PyTorch, such as mps or xpu;"
            f" got {name!r}"
        )
    if kind != "cuda":
        return _other_accelerator(named, ranks)
    index = named.index or 0
    if ranks.size > 1:
        if number:
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
        unused = unused_gpus()
        remedy = f"; {unused}" if unused else ", or see to the driver and CUDA_VISIBLE_DEVICES"
        raise InputError(
            f"device {name} is not there, PyTorch sees {torch.cuda.device_count()} CUDA devices: use --device auto"
            f" or cpu{remedy}"
        )
    device = torch.device("cuda", index)
    # Libraries that use the current device would otherwise open a context and allocate on device 0.
    torch.cuda.set_device(device)
    return device


@functools.cache
def unused_gpus() -> str | None:
    """Return which NVIDIA GPUs of this machine torch cannot use, why and what to do; None if there is no such GPU.

    Nor are there any where CUDA_VISIBLE_DEVICES is set: whoever did that chose.
    """
    if torch.cuda.is_available() or "CUDA_VISIBLE_DEVICES" in os.environ or shutil.which("nvidia-smi") is None:
        return None
    # Below a GPU are the parts that it is divided into.
    gpus = [line for line in ask("nvidia-smi", "-L").splitlines() if line.startswith("GPU ")]
    names = ", ".join(sorted({line.partition(": ")[2].partition(" (UUID")[0] for line in gpus}))
    if not names:
        return None
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no device"
    remedy = "update the NVIDIA driver, or install a torch for the CUDA version that nvidia-smi shows"
    if torch.version.cuda is None:
        built = f"torch {torch.__version__} is built without CUDA"
        remedy = "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
    return f"there is a GPU ({names}), but {built}; {remedy}"


def _other_accelerator(device: torch.device, ranks: Ranks) -> torch.device:
    """Return a device that is neither the CPU nor a CUDA device; see :func:`select_device`."""
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    if found is None or device.type != found.type or (device.index or 0) >= count:
        there = "no accelerator" if found is None else f"{count} x {found.type}"
        raise InputError(f"device {device} is not there, PyTorch sees {there}: use --device auto or cpu")
    if ranks.size > 1:
        raise InputError(
            f"several processes need CUDA devices or the CPU, not {device}: use --device cpu, or one process"
        )
    logger.warning("this package has been tried on the CPU and written for CUDA devices, not tried on %s", device)
    return device


def describe_device(device: torch.device) -> str:
    """Return in a line what hardware a CPU or CUDA device is, and what limits its speed."""
    if device.type == "cpu":
        return f"{_cpu_model()}, threads: {torch.get_num_threads()}"
    properties = torch.cuda.get_device_properties(device)
    query = ("nvidia-smi", f"--id=GPU-{properties.uuid}", "--format=csv,noheader")
    # Clock and power limits decide what a card reaches.
    answer = ask(*query, "--query-gpu=driver_version,power.limit,clocks.max.sm").split(", ")
    limits = f"driver {answer[0]}"
    if len(answer) == 3:
        limits += f", power limit {answer[1]}, SM clock up to {answer[2]}"
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.1f} GiB, {limits}"


def ask(*command: str) -> str:
    """Return what a command of the system prints, or that it is unknown and why."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def float_for_sums(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type that ``device`` computes in: float64, except on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def memory_format(config: TrainConfig, device: torch.device) -> torch.memory_format:
    """Return the memory order of weights and training images on a device; activations inherit it."""
    # On a CPU with AVX2, oneDNN's weight gradient of a strided 1x1 convolution in channels_last writes beyond its
    # memory unless channels are a multiple of 8 (seen with torch 2.14.1), and a network may have any width. Evaluation
    # has no gradients.
    return torch.channels_last if config.channels_last and device.type == "cuda" else torch.contiguous_format


def network_input(images: Tensor, order: torch.memory_format) -> Tensor:
    """Return images [B, C, H, W] in a memory order, or event frames [B, T, C, H, W] as a sequence [T, B, C, H, W]."""
    if images.dim() == 4:
        return images.contiguous(memory_format=order)
    sequence = images.transpose(0, 1)
    return sequence.flatten(0, 1).contiguous(memory_format=order).unflatten(0, sequence.shape[:2])


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the context in which a network runs for ``amp`` off, fp16 or bf16."""
    return torch.autocast(device.type, dtype=DTYPES.get(amp), enabled=amp != "off")


def check_precision(device: torch.device, amp: str | None) -> None:
    """Raise InputError if ``device`` cannot train or evaluate in this precision."""
    if amp == "fp16" and device.type != "cuda":
        raise InputError(f"train.amp fp16 needs a CUDA device, got {device.type}; use bf16 or off")


def describe_precision(device: torch.device, amp: str) -> str:
    """Return, in words, the precision of computations on ``device``."""
    if amp != "off":
        return amp
    # PyTorch's default, and so what the authors' float32 runs had on such GPUs.
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device)[0] >= 8:
        return "float32 with TF32 convolutions"
    return "float32"
