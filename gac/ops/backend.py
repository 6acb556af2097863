"""Whether the CUDA kernels can run on a device, and the choice between them and torch."""

import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gac.errors import InputError
from gac.ops.cuda import launch
from gac.ops.cuda.compiler import ELEMENTS, Kernel

_log = logging.getLogger("gac")
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY in cuda.h


@dataclass(frozen=True)
class CupyStatus:
    """Whether the CUDA kernels can run on a device; if not, what is missing and how to get it, a line each."""

    ok: bool
    reason: str
    hint: str | None = None


def cupy_installed() -> bool:
    """Return whether there is a CuPy at all, working or not."""
    return importlib.util.find_spec("cupy") is not None


@functools.cache
def toolchain_status() -> CupyStatus:
    """Return whether CuPy is installed, fits torch's CUDA version and finds NVRTC; needs no GPU."""
    if torch.version.cuda is None:
        return CupyStatus(False, f"torch {torch.__version__} is built without CUDA", "install a CUDA build of torch")
    major = int(torch.version.cuda.split(".")[0])
    command = f"pip install cupy-cuda{major}x"
    if not cupy_installed():
        return CupyStatus(False, "CuPy is not installed", command)
    try:
        import cupy
        from cupy.cuda import driver, nvrtc
    except (ImportError, AttributeError) as error:  # CuPy 13 asks NumPy 2 for names that it no longer has
        return CupyStatus(False, f"CuPy cannot be imported: {_first_line(error)}", command)
    cupy_major = driver.get_build_version() // 1000
    if cupy_major != major:
        return CupyStatus(
            False,
            f"CuPy {cupy.__version__} is built for CUDA {cupy_major}, torch for CUDA {major}",
            f"pip uninstall cupy-cuda{cupy_major}x && {command}",
        )
    try:
        version = nvrtc.getVersion()
    except (RuntimeError, ImportError, OSError) as error:
        package = "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
        return CupyStatus(False, f"CuPy cannot load NVRTC: {_first_line(error)}", f"pip install {package}")
    return CupyStatus(True, f"CuPy {cupy.__version__} with NVRTC {version[0]}.{version[1]}")


@functools.cache
def cupy_status(device: torch.device) -> CupyStatus:
    """Return whether the CUDA kernels can run on a device, naming the missing piece; checked once a process.

    Raises torch.OutOfMemoryError if the device has no memory left for the check, which says nothing of the kernels.
    """
    if device.type != "cuda":
        return CupyStatus(False, f"the CUDA kernels need a CUDA device, the tensor is on {device.type}")
    toolchain = toolchain_status()
    if not toolchain.ok:
        return toolchain
    if not torch.cuda.is_available():
        return CupyStatus(False, "torch finds no CUDA device", "check the GPU and its driver with nvidia-smi")
    import cupy

    if not cupy.cuda.is_available():
        return CupyStatus(False, "CuPy cannot use the CUDA driver", "update the NVIDIA driver")
    try:
        probe(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as error:
        # CuPy's error for the driver has its number.
        if getattr(error, "status", None) == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"{device} has no memory left to load a kernel") from error
        hint = "python -m gac.doctor shows the whole error"
        return CupyStatus(False, f"a kernel does not run on {device}: {_first_line(error)}", hint)
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


def _first_line(error: Exception) -> str:
    lines = [line.strip(" =") for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def choose_backend(
    requested: Literal["auto", "cupy", "torch"], x: Tensor, unsupported: str | None = None
) -> Literal["cupy", "torch"]:
    """Return what runs an operation on ``x``: the CUDA kernels ("cupy") or torch.

    "auto" is the kernels for a float32, float16 or bfloat16 tensor on a CUDA device where CuPy works, else torch; each
    choice is logged once, as a warning where a CUDA device runs without the kernels. ``unsupported`` says why the
    kernels do not have the operation asked for, if so.

    Raises:
        InputError: For "cupy" where the kernels cannot run, and for an unknown name.
    """
    if requested == "torch":
        return "torch"
    return _choose_backend(requested, x.device, x.dtype, unsupported)


# Under torch.compile the choice is a constant of the graph; Dynamo does not trace into imports and logging.
@torch.compiler.assume_constant_result
def _choose_backend(
    requested: str, device: torch.device, dtype: torch.dtype, unsupported: str | None
) -> Literal["cupy", "torch"]:
    if requested not in ("auto", "cupy"):
        raise InputError(f"backend must be auto, cupy or torch, got {requested!r}")
    status = cupy_status(device)
    if status.ok and dtype not in ELEMENTS:
        names = ", ".join(str(kernel_dtype) for kernel_dtype in ELEMENTS)
        status = CupyStatus(False, f"the CUDA kernels take {names}, the tensor is {dtype}")
    if status.ok and unsupported is not None:
        status = CupyStatus(False, unsupported)
    if requested == "cupy" and not status.ok:
        remedy = f"{status.hint}, or use backend='torch'" if status.hint else "use backend='auto' or 'torch'"
        raise InputError(f"backend 'cupy' cannot run: {status.reason}; {remedy}")
    backend = "cupy" if status.ok else "torch"
    _log_choice(device.type, backend, status)
    return backend


@functools.cache
def _log_choice(device_type: str, backend: str, status: CupyStatus) -> None:
    remedy = f"; {status.hint}" if status.hint else ""
    level = logging.WARNING if (device_type, backend) == ("cuda", "torch") else logging.INFO
    _log.log(level, "LIF backend on %s: %s (%s)%s", device_type, backend, status.reason, remedy)
