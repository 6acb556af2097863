"""Compiles and launches the CUDA kernels, and decides where they can run.

CuPy is used for two things only: NVRTC (compilation at run time) and the driver's launch call. Memory and streams
are torch's. Nothing outside this file imports CuPy.
"""

import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gac.errors import InputError
from gac.ops import kernel_cache

KERNEL_FOLDER = Path(__file__).parent / "kernels"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# No -ftz and no fast math: subnormal potentials count, as they do in the reference.
COMPILE_OPTIONS = ("-std=c++17",)

_POINTERS = {"float": torch.float32, "Float16": torch.float16, "BFloat16": torch.bfloat16}
_SCALARS = {"float": np.float32, "int": np.int32, "long long": np.int64}

_log = logging.getLogger("gac")


@dataclass(frozen=True)
class Kernel:
    """One instantiation of a kernel template.

    Args:
        file: Source file in ``gac/ops/kernels``, such as "lif.cu".
        instance: C++ name, such as "lif_forward<float, 6, true, 4, Reset::hard>".
        parameters: C++ type of each parameter: "float", "int", "long long", or a pointer such as "const float*".
            A "?" after a pointer allows None (a null pointer).
    """

    file: str
    instance: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class CompiledKernel:
    """What NVRTC made of a kernel: binary (cubin, or PTX), mangled name, and the compiler's log."""

    binary: bytes
    name: str
    log: str


@dataclass(frozen=True)
class CupyStatus:
    """Whether the CUDA kernels can run on a device; if not, what is missing and how to get it, a line each."""

    ok: bool
    reason: str
    hint: str | None = None


def source_text(file: str, folders: Sequence[Path] = (KERNEL_FOLDER,)) -> str:
    """Return a kernel file's text with its headers put in place; the first folder that has a file wins."""
    included: set[str] = set()

    def expand(name: str) -> str:
        path = next(folder / name for folder in folders if (folder / name).is_file())
        lines = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            header = re.fullmatch(r'#include "(.+)"', line)
            if header is None:
                lines.append("" if line == "#pragma once" else line)
            elif header[1] not in included:
                included.add(header[1])
                lines += [f'#line 1 "{header[1]}"', expand(header[1]), f'#line {number + 1} "{name}"']
        return "\n".join(lines)

    return f'#line 1 "{file}"\n{expand(file)}\n'


def compile_kernel(kernel: Kernel, capability: int, options: Sequence[str] = ()) -> CompiledKernel:
    """Compile a kernel with NVRTC for a compute capability such as 90; needs CuPy but no GPU.

    For a GPU that is newer than NVRTC the binary is PTX, which the driver finishes.

    Raises:
        RuntimeError: With the compiler's log, if the source does not compile.
    """
    from cupy.cuda import nvrtc

    supported = nvrtc.getSupportedArchs()
    if capability in supported:
        # CuPy takes the last byte for the end of a string; it is the binary's own, a zero.
        target, read_binary = f"-arch=sm_{capability}", lambda program: nvrtc.getCUBIN(program) + b"\0"
    else:
        known = max((arch for arch in supported if arch <= capability), default=None)
        if known is None:
            raise RuntimeError(
                f"NVRTC compiles for compute capability {min(supported) / 10} and above, not {capability / 10}"
            )
        target, read_binary = f"-arch=compute_{known}", nvrtc.getPTX
    # Not cupy.RawModule: it always adds -ftz=true, which flushes subnormal numbers to zero.
    program = nvrtc.createProgram(source_text(kernel.file), kernel.file, [], [])
    try:
        nvrtc.addNameExpression(program, kernel.instance)
        try:
            nvrtc.compileProgram(program, [*COMPILE_OPTIONS, target, *options])
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"{kernel.instance} does not compile ({target}):\n{log}") from error
        name = nvrtc.getLoweredName(program, kernel.instance)
        return CompiledKernel(read_binary(program), name, nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def compile_once(kernel: Kernel, capability: int) -> tuple[bytes, str]:
    """Return a kernel's binary and mangled name from the disk (:mod:`gac.ops.kernel_cache`), or compile it.

    Raises:
        RuntimeError: With the compiler's log, if the source does not compile.
    """
    from cupy.cuda import nvrtc

    key = kernel_cache.key_of(
        source_text(kernel.file), kernel.instance, capability, COMPILE_OPTIONS, nvrtc.getVersion()
    )
    cached = kernel_cache.load(key)
    if cached is not None:
        name, _, binary = cached.partition(b"\n")
        return binary, name.decode()
    compiled = compile_kernel(kernel, capability)
    kernel_cache.store(key, compiled.name.encode() + b"\n" + compiled.binary)
    return compiled.binary, compiled.name


# Called with kernel, grid, block and typed arguments in place of a CUDA launch for tensors on the CPU.
# Only tests set it: they run the kernels' source compiled for the CPU.
CpuLauncher = Callable[[Kernel, tuple[int, ...], tuple[int, ...], list[np.generic]], None]
_cpu_launcher: CpuLauncher | None = None


def set_cpu_launcher(launcher: CpuLauncher | None) -> None:
    """Let ``launcher`` run the kernels for tensors on the CPU; None takes it away. For tests."""
    global _cpu_launcher
    _cpu_launcher = launcher


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: Sequence[Tensor | float | None],
) -> None:
    """Launch a kernel on torch's current stream of the tensors' device.

    Compiles the kernel at its first launch on a device; that launch cannot be inside a CUDA graph capture.

    Raises:
        TypeError: If number, dtypes or devices of the arguments are not what the kernel declares.
        RuntimeError: For tensors on a device that has no launcher.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    typed = _typed_arguments(kernel, arguments, device)
    if device.type == "cuda":
        _launch_on_cuda(kernel, device, grid, block, typed)
    elif device.type == "cpu" and _cpu_launcher is not None:
        _cpu_launcher(kernel, grid, block, typed)
    else:
        raise RuntimeError(f"CUDA kernels cannot run on tensors on {device}")


def _launch_on_cuda(
    kernel: Kernel, device: torch.device, grid: tuple[int, ...], block: tuple[int, ...], typed: list[np.generic]
) -> None:
    with torch.cuda.device(device):
        stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
        _loaded_function(kernel, device.index)(grid, block, typed, stream=stream)


@dataclass(frozen=True)
class _Stream:
    # CuPy reads nothing but .ptr; its own wrapper of foreign streams changed between versions 13 and 14.
    ptr: int


def _typed_arguments(
    kernel: Kernel, arguments: Sequence[Tensor | float | None], device: torch.device
) -> list[np.generic]:
    # CuPy checks nothing: a wrong type here would read other memory than the kernel's author meant.
    if len(arguments) != len(kernel.parameters):
        raise TypeError(f"{kernel.instance} takes {len(kernel.parameters)} arguments, got {len(arguments)}")
    typed: list[np.generic] = []
    for position, (declared, argument) in enumerate(zip(kernel.parameters, arguments, strict=True)):
        pointee, optional = _parse_type(declared)
        if pointee is None and isinstance(argument, (int, float)):
            typed.append(_SCALARS[declared](argument))
        elif pointee is not None and argument is None and optional:
            typed.append(np.uint64(0))
        elif isinstance(argument, Tensor) and argument.dtype is pointee and argument.device == device:
            typed.append(np.uint64(argument.data_ptr()))
        else:
            got = f"{argument.dtype} on {argument.device}" if isinstance(argument, Tensor) else repr(argument)
            raise TypeError(f"argument {position} of {kernel.instance} is a {declared} on {device}, got {got}")
    return typed


@functools.cache
def _parse_type(declared: str) -> tuple[torch.dtype | None, bool]:
    """Return a pointer's dtype, or None for a scalar, and whether it may be null."""
    if declared in _SCALARS:
        return None, False
    pointer = re.fullmatch(r"(?:const )?(\w+)\*(\??)", declared)
    return _POINTERS[pointer[1]], pointer[2] == "?"


@functools.cache
def _loaded_function(kernel: Kernel, device_index: int) -> Callable[..., None]:
    from cupy.cuda import function

    major, minor = torch.cuda.get_device_capability(device_index)
    binary, name = compile_once(kernel, 10 * major + minor)
    module = function.Module()
    module.load(binary)
    return module.get_function(name)


# Blocks that "run at once" on the CPU: several, so that tests see results of more than one block combined.
_CPU_BLOCKS = 3


def resident_blocks(kernel: Kernel, threads: int, device: torch.device, most: int | None = None) -> int:
    """Return how many blocks of ``threads`` threads of a kernel a device runs at once; fixed for a kind of device.

    With ``most``, as if a multiprocessor ran no more than that many.
    """
    return _CPU_BLOCKS if device.type == "cpu" else _resident_blocks(kernel, threads, device.index, most)


@functools.cache
def _resident_blocks(kernel: Kernel, threads: int, device_index: int, most: int | None) -> int:
    from cupy.cuda import driver

    with torch.cuda.device(device_index):
        function = _loaded_function(kernel, device_index)
        per_multiprocessor = driver.occupancyMaxActiveBlocksPerMultiprocessor(function.ptr, threads, 0)
    per_multiprocessor = min(per_multiprocessor, most or per_multiprocessor)
    return per_multiprocessor * torch.cuda.get_device_properties(device_index).multi_processor_count


OPERATORS: dict[str, Callable] = {}
"""The operators' implementations by name; the tests register them for the CPU as well."""


def implement(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as what runs an operator such as "gac::norm_lif" on CUDA devices."""

    def register(function: Callable) -> Callable:
        torch.library.impl(name, "cuda", function)
        OPERATORS[name] = function
        return function

    return register


def differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> Callable[..., Any]:
    """Give an operator such as "gac::norm_lif" its derivative, and return the function that calls it.

    ``setup_context`` and ``backward`` are what torch.library.register_autograd takes. Differentiating twice fails with
    a clear message; torch.func's transforms do not take the function.
    """
    short_name = name.removeprefix("gac::")
    operator = getattr(torch.ops.gac, short_name).default

    def forward(ctx: torch.autograd.function.FunctionCtx, *arguments: object) -> Any:
        output = operator(*arguments)
        setup_context(ctx, arguments, output)
        return output

    def backward_once(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        fresh = (None if each is None else each.detach().requires_grad_() for each in results)
        return _NoSecondDerivative.apply(name, *fresh)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
    function = type(short_name, (torch.autograd.Function,), methods)
    torch.library.register_autograd(name, backward_once, setup_context=setup_context)

    def call(*arguments: object) -> Any:
        # A compiler is to see the operator. Elsewhere a plain autograd.Function does the same as the one that
        # torch.library generates for it, in a fraction of the time on the host.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return operator(*arguments)
        return function.apply(*arguments)

    return call


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients as they are, of which a derivative fails with a clear message instead of being zero."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, name: str, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return gradients

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor | None) -> None:
        raise NotImplementedError(f"{ctx.name} has no second derivative: the CUDA kernels have none of second order")


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
    """Return whether the CUDA kernels can run on a device, naming the missing piece; checked once a process."""
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
    except (RuntimeError, OSError) as error:
        hint = "python -m gac.doctor shows the whole error"
        return CupyStatus(False, f"a kernel does not run on {device}: {_first_line(error)}", hint)
    return toolchain


def probe(device: torch.device) -> None:
    """Compile, load and launch the smallest kernel on a device; waits for it.

    Raises:
        RuntimeError: Where one of these fails.
    """
    answer = torch.zeros(1, device=device)
    launch(Kernel("probe.cu", "probe", ("float*",)), (1,), (1,), (answer,))
    if answer.item() != 42.0:
        raise RuntimeError("it was launched but left no result")


def _first_line(error: Exception) -> str:
    lines = [line.strip(" =") for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def choose_backend(
    requested: Literal["auto", "cupy", "torch"], x: Tensor, unsupported: str | None = None
) -> Literal["cupy", "torch"]:
    """Return what runs an operation on ``x``: the CUDA kernels ("cupy") or torch.

    "auto" is the kernels for a float32, float16 or bfloat16 tensor on a CUDA device where CuPy works, else torch;
    each choice is logged once. ``unsupported`` says why the kernels do not have the operation asked for, if so.

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
    if status.ok and dtype not in KERNEL_DTYPES:
        names = ", ".join(str(kernel_dtype) for kernel_dtype in KERNEL_DTYPES)
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
    _log.info("LIF backend on %s: %s (%s)%s", device_type, backend, status.reason, remedy)
