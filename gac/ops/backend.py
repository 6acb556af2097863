"""Whether the kernels can run on a device, and the choice between them and torch."""

import functools
import importlib.util
import logging
from typing import Literal

import torch
from torch import Tensor

from gac.errors import InputError, first_line
from gac.ops import c_kernels
from gac.ops.c_kernels import Status
from gac.ops.cuda import launch
from gac.ops.cuda.compiler import ELEMENTS, Kernel
from gac.ops.watchers import constant_when_compiled

_log = logging.getLogger("gac")
Choice = Literal["cupy", "c", "torch"]
"""What runs an operation: the CUDA kernels, which CuPy loads, their C versions on the CPU, or torch."""


def cupy_installed() -> bool:
    """Return whether there is a CuPy at all, working or not."""
    return importlib.util.find_spec("cupy") is not None


@functools.cache
def toolchain_status() -> Status:
    """Return whether CuPy is installed, fits torch's CUDA version and finds NVRTC; needs no GPU."""
    if torch.version.cuda is None:
        return Status(False, f"torch {torch.__version__} is built without CUDA", "install a CUDA build of torch")
    major = int(torch.version.cuda.split(".")[0])
    command = f"pip install cupy-cuda{major}x"
    if not cupy_installed():
        return Status(False, "CuPy is not installed", command)
    try:
        import cupy
        from cupy.cuda import driver, nvrtc
    except (ImportError, AttributeError) as error:  # CuPy 13 asks NumPy 2 for names that it no longer has
        return Status(False, f"CuPy cannot be imported: {first_line(error)}", command)
    cupy_major = driver.get_build_version() // 1000
    if cupy_major != major:
        return Status(
            False,
            f"CuPy {cupy.__version__} is built for CUDA {cupy_major}, torch for CUDA {major}",
            f"pip uninstall cupy-cuda{cupy_major}x && {command}",
        )
    try:
        version = nvrtc.getVersion()
    except (RuntimeError, ImportError, OSError) as error:
        package = "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
        return Status(False, f"CuPy cannot load NVRTC: {first_line(error)}", f"pip install {package}")
    return Status(True, f"CuPy {cupy.__version__} with NVRTC {version[0]}.{version[1]}")


@functools.cache
def cupy_status(device: torch.device) -> Status:
    """Return whether the CUDA kernels can run on a device, naming the missing piece; checked once a process.

    Raises torch.OutOfMemoryError if the device has no memory left for the check, which says nothing of the kernels.
    """
    if device.type != "cuda":
        return Status(False, f"the CUDA kernels need a CUDA device, the tensor is on {device.type}")
    toolchain = toolchain_status()
    if not toolchain.ok:
        return toolchain
    if not torch.cuda.is_available():
        return Status(False, "torch finds no CUDA device", "check the GPU and its driver with nvidia-smi")
    import cupy

    if not cupy.cuda.is_available():
        return Status(False, "CuPy cannot use the CUDA driver", "update the NVIDIA driver")
    try:
        probe(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as error:
        hint = "python -m gac.doctor shows the whole error"
        return Status(False, f"a kernel does not run on {device}: {first_line(error)}", hint)
    return toolchain


def probe(device: torch.device) -> None:
    """Compile, load and launch the smallest kernel on a device; waits for it.

    Raises:
        RuntimeError: Where one of these fails.
    """
    answer = torch.zeros(1, device=device)
    launch.launch(Kernel("probe.cu", "probe", ("float*",)), (1,), (1,), (answer,))
    if answer.item() != 42.0:
        raise RuntimeError("it was launched but left no result")


def choose_backend(
    requested: Literal["auto", "cupy", "c", "torch"], x: Tensor, unsupported: str | None = None
) -> Choice:
    """Return what runs an operation on ``x``: the kernels ("cupy" on a CUDA device, "c" on the CPU) or torch.

    "auto" is the kernels where they work: for a float32, float16 or bfloat16 tensor on a CUDA device with CuPy, and for
    a float32 tensor on the CPU with a C compiler, outside torch.compile. Each choice is logged once, with its reason:
    as a warning where a CUDA device runs without the kernels and nobody asked for that. ``unsupported`` says why the
    kernels do not have the operation asked for, if so.

    Raises:
        InputError: For "cupy" and "c" where those kernels cannot run, and for an unknown name.
    """
    return _choose_backend(requested, x.device, x.dtype, unsupported)


def explain_backend(
    requested: Literal["auto", "cupy", "c", "torch"], x: Tensor, unsupported: str | None = None
) -> tuple[Choice, str]:
    """Return what :func:`choose_backend` does, and why, in a line; logs nothing."""
    choice, status = _decide(requested, x.device, x.dtype, unsupported)
    return choice, status.reason + _remedy(status)


# Under torch.compile the choice is a constant of the graph; Dynamo does not trace into imports and logging.
@constant_when_compiled
def _choose_backend(requested: str, device: torch.device, dtype: torch.dtype, unsupported: str | None) -> Choice:
    choice, status = _decide(requested, device, dtype, unsupported)
    _log_choice(device.type, choice, status)
    return choice


def _decide(requested: str, device: torch.device, dtype: torch.dtype, unsupported: str | None) -> tuple[Choice, Status]:
    if requested == "torch":
        return "torch", Status(True, "as asked for")
    if requested not in ("auto", "cupy", "c"):
        raise InputError(f"backend must be auto, cupy, c or torch, got {requested!r}")
    kind = requested
    if requested == "auto":
        kind = "c" if device.type == "cpu" and not cupy_status(device).ok else "cupy"
    status = _c_status(device, dtype) if kind == "c" else _cupy_status(device, dtype)
    if status.ok and unsupported is not None:
        status = Status(False, unsupported)
    if requested != "auto" and not status.ok:
        remedy = f"{status.hint}, or use backend='torch'" if status.hint else "use backend='auto' or 'torch'"
        raise InputError(f"backend {requested!r} cannot run: {status.reason}; {remedy}")
    return kind if status.ok else "torch", status


def kernels_status(kind: Literal["cupy", "c"], device: torch.device) -> Status:
    """Return whether the CUDA kernels ("cupy"), or their C versions ("c"), can run float32 on a device."""
    return _c_status(device, torch.float32) if kind == "c" else _cupy_status(device, torch.float32)


def _cupy_status(device: torch.device, dtype: torch.dtype) -> Status:
    status = cupy_status(device)
    if status.ok and dtype not in ELEMENTS:
        names = ", ".join(str(kernel_dtype) for kernel_dtype in ELEMENTS)
        return Status(False, f"the CUDA kernels take {names}, the tensor is {dtype}")
    return status


def _c_status(device: torch.device, dtype: torch.dtype) -> Status:
    if device.type != "cpu":
        return Status(False, f"the C kernels need the CPU, the tensor is on {device.type}")
    if dtype != torch.float32:
        return Status(False, f"the C kernels take torch.float32, the tensor is {dtype}")
    if torch.compiler.is_compiling():
        return Status(False, "torch.compile sees more in torch's operations")
    return c_kernels.status()


@functools.cache
def _log_choice(device_type: str, backend: str, status: Status) -> None:
    level = logging.WARNING if device_type == "cuda" and not status.ok else logging.INFO
    _log.log(level, "LIF backend on %s: %s (%s)%s", device_type, backend, status.reason, _remedy(status))


def _remedy(status: Status) -> str:
    return f"; {status.hint}" if status.hint else ""
