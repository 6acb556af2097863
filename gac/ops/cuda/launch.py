"""Launches kernels: on a CUDA device by CuPy, on torch's current stream; on the CPU their C versions.

Memory is torch's.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gac.ops import c_kernels
from gac.ops.cuda import compiler
from gac.ops.cuda.compiler import Kernel

_POINTERS = {element: dtype for dtype, element in compiler.ELEMENTS.items()}
_SCALARS = {"float": np.float32, "int": np.int32, "long long": np.int64}

Argument = Tensor | float | None | tuple["Argument", ...]
"""What a kernel is launched with; a tuple is a struct."""
Packed = np.generic | np.ndarray

# Called with kernel, grid, block and typed arguments for tensors on the CPU in place of the C kernels.
# Tests set it, to run the CUDA kernels' source compiled for the CPU, and benchmarks.sass, to see what is launched.
CpuLauncher = Callable[[Kernel, tuple[int, ...], tuple[int, ...], list[Packed]], None]
_cpu_launcher: CpuLauncher | None = None


def set_cpu_launcher(launcher: CpuLauncher | None) -> None:
    """Let ``launcher`` run the kernels for tensors on the CPU, None the C kernels. For tests."""
    global _cpu_launcher
    _cpu_launcher = launcher


def launch(kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Argument]) -> None:
    """Launch a kernel on torch's current stream of the tensors' device, or run its C version on the CPU.

    Compiles the kernel at its first launch on a device; that launch cannot be inside a CUDA graph capture.

    Raises:
        TypeError: If number, dtypes or devices of the arguments are not what the kernel declares.
        InputError: On the CPU, for a kernel of another dtype than float32, and without a C compiler.
        RuntimeError: For tensors on a device that has no launcher.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    typed = _typed_arguments(kernel, arguments, device)
    if device.type == "cuda":
        _launch_on_cuda(kernel, device, grid, block, typed)
    elif device.type == "cpu":
        (_cpu_launcher or c_kernels.launch)(kernel, grid, block, typed)
    else:
        raise RuntimeError(f"the kernels cannot run on tensors on {device}")


def _launch_on_cuda(
    kernel: Kernel, device: torch.device, grid: tuple[int, ...], block: tuple[int, ...], typed: list[Packed]
) -> None:
    with torch.cuda.device(device):
        stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
        _loaded_function(kernel, device.index)(grid, block, typed, stream=stream)


@dataclass(frozen=True)
class _Stream:
    # CuPy reads nothing but .ptr; its own wrapper of foreign streams changed between versions 13 and 14.
    ptr: int


def _typed_arguments(kernel: Kernel, arguments: Sequence[Argument], device: torch.device) -> list[Packed]:
    # CuPy checks nothing: a wrong type here would read other memory than the kernel's author meant.
    if len(arguments) != len(kernel.parameters):
        raise TypeError(f"{kernel.instance} takes {len(kernel.parameters)} arguments, got {len(arguments)}")
    typed = []
    for position, (declared, argument) in enumerate(zip(kernel.parameters, arguments, strict=True)):
        packed = _pack(_parse_type(declared), argument, device)
        if packed is None:
            got = _describe(argument)
            raise TypeError(f"argument {position} of {kernel.instance} is a {declared} on {device}, got {got}")
        typed.append(packed)
    return typed


@dataclass(frozen=True)
class _Type:
    """A parameter's type: the numbers that it is made of, and how they lie in memory."""

    members: tuple["_Member", ...]
    layout: struct.Struct | None  # of a struct
    nullable: bool
    whole: np.dtype | None = None  # a struct as one item


@dataclass(frozen=True)
class _Member:
    pack: type[np.generic]
    pointee: torch.dtype | None
    nullable: bool


@functools.cache
def _parse_type(declared: str) -> _Type:
    name, nullable = declared.removesuffix("?"), declared.endswith("?")
    if name in _SCALARS:
        return _Type((_Member(_SCALARS[name], None, False),), None, False)
    if name.endswith("*"):
        pointee = _POINTERS[name.removeprefix("const ").removesuffix("*")]
        return _Type((_Member(np.uint64, pointee, nullable),), None, nullable)
    members = tuple(_parse_type(member).members[0] for member in compiler.struct_fields(name))
    codes = [np.dtype(member.pack).char for member in members]
    # Python's native alignment is that of C++; the last item, of which there are none, pads the end.
    layout = struct.Struct(f"@{''.join(codes)}0{max(codes, key=struct.calcsize)}")
    return _Type(members, layout, nullable, np.dtype((np.void, layout.size)))


def _pack(kind: _Type, argument: Argument, device: torch.device) -> Packed | None:
    """Return an argument's bytes as its type lies in memory, or None if it is of another type."""
    if kind.layout is None:
        number = _number(kind.members[0], argument, device)
        return None if number is None else kind.members[0].pack(number)
    if argument is None and kind.nullable:
        return np.zeros(1, kind.whole)
    if not (isinstance(argument, tuple) and len(argument) == len(kind.members)):
        return None
    numbers = [_number(member, each, device) for member, each in zip(kind.members, argument, strict=True)]
    if any(number is None for number in numbers):
        return None
    # CuPy passes an array of one item by value.
    return np.frombuffer(kind.layout.pack(*numbers), kind.whole)


def _number(member: _Member, argument: Argument, device: torch.device) -> float | None:
    if member.pointee is None:
        return argument if isinstance(argument, (int, float)) else None
    if isinstance(argument, Tensor):
        return argument.data_ptr() if argument.dtype is member.pointee and argument.device == device else None
    return 0 if argument is None and member.nullable else None


def _describe(argument: Argument) -> str:
    if isinstance(argument, tuple):
        return f"({', '.join(map(_describe, argument))})"
    return f"{argument.dtype} on {argument.device}" if isinstance(argument, Tensor) else repr(argument)


@functools.cache
def _loaded_function(kernel: Kernel, device_index: int) -> Callable[..., None]:
    from cupy.cuda import function

    major, minor = torch.cuda.get_device_capability(device_index)
    binary, name = compiler.compile_once(kernel, 10 * major + minor)
    module = function.Module()
    module.load(binary)
    return module.get_function(name)


# Blocks that "run at once" in tests: several, so that they see results of more than one block combined.
_BLOCKS_IN_TESTS = 3


def resident_blocks(kernel: Kernel, threads: int, device: torch.device, most: int | None = None) -> int:
    """Return how many blocks of ``threads`` threads of a kernel a device runs at once; fixed for a kind of device.

    With ``most``, as if a multiprocessor ran no more than that many.
    """
    if device.type == "cpu":
        return _BLOCKS_IN_TESTS if _cpu_launcher is not None else c_kernels.BLOCKS
    return _resident_blocks(kernel, threads, device.index, most)


@functools.cache
def _resident_blocks(kernel: Kernel, threads: int, device_index: int, most: int | None) -> int:
    from cupy.cuda import driver

    with torch.cuda.device(device_index):
        function = _loaded_function(kernel, device_index)
        per_multiprocessor = driver.occupancyMaxActiveBlocksPerMultiprocessor(function.ptr, threads, 0)
    per_multiprocessor = min(per_multiprocessor, most or per_multiprocessor)
    return per_multiprocessor * torch.cuda.get_device_properties(device_index).multi_processor_count
