"""Launches kernels: on a CUDA device by CuPy, on torch's current stream; on the CPU their C versions.

Memory is torch's.
"""

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gac.ops import c_kernels
from gac.ops.cuda import compiler
from gac.ops.cuda.compiler import Kernel

_SCALARS = {"float": "f", "int": "i", "long long": "q"}

Argument = Tensor | float | None | tuple["Argument", ...]
"""What a kernel is launched with; a tuple is a struct."""
Packed = ctypes.Array
"""Memory that begins with the addresses of the parameters in it: the array that CUDA's driver and C kernels take."""

# Called with kernel, grid, block and packed arguments for tensors on the CPU in place of the C kernels.
# Tests set it, to run the CUDA kernels' source compiled for the CPU, and benchmarks.sass and benchmarks.host.
CpuLauncher = Callable[[Kernel, tuple[int, ...], tuple[int, ...], Packed], None]
_cpu_launcher: CpuLauncher | None = None


def set_cpu_launcher(launcher: CpuLauncher | None) -> None:
    """Let ``launcher`` run the kernels for tensors on the CPU, None the C kernels. For tests and benchmarks."""
    global _cpu_launcher
    _cpu_launcher = launcher


def launch(kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Argument]) -> None:
    """Launch a kernel on torch's current stream of the tensors' device, or run its C version on the CPU.

    Compiles the kernel at its first launch on a device; that launch cannot be inside a CUDA graph capture.

    Raises:
        TypeError: If number, types, dtypes or devices of the arguments are not what the kernel declares.
        OverflowError: If a number is too large for its type.
        InputError: On the CPU, for a kernel of another dtype than float32, and without a C compiler.
        RuntimeError: For tensors on a device that has no launcher.
    """
    first = arguments[0]
    if not isinstance(first, Tensor):
        first = next(argument for argument in arguments if isinstance(argument, Tensor))
    device = first.device
    packed = _packer(kernel).pack(arguments, device)
    if device.type == "cuda":
        _launch_on_cuda(kernel, device, grid, block, packed)
    elif device.type == "cpu":
        (_cpu_launcher or c_kernels.launch)(kernel, grid, block, packed)
    else:
        raise RuntimeError(f"the kernels cannot run on tensors on {device}")


def _launch_on_cuda(
    kernel: Kernel, device: torch.device, grid: tuple[int, ...], block: tuple[int, ...], packed: Packed
) -> None:
    index = device.index
    with torch.cuda.device(index):
        function, launch_kernel = _loaded_function(kernel, index)
        _make_context_current(index)
        stream = torch._C._cuda_getCurrentRawStream(index)
        sizes = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        launch_kernel(function.ptr, *sizes[0], *sizes[1], 0, stream, ctypes.addressof(packed), 0)


class _Contexts(threading.local):
    def __init__(self) -> None:
        self.devices: set[int] = set()


_contexts = _Contexts()


def _make_context_current(device_index: int) -> None:
    """Make a device's context current in this thread, where nothing that torch did may have needed it yet.

    The driver, unlike CUDA's runtime, does not do so by itself. ``torch.cuda.device`` did where another was current.
    """
    if device_index not in _contexts.devices:
        from cupy.cuda import runtime

        runtime.setDevice(device_index)
        _contexts.devices.add(device_index)


class _Packer:
    """Checks a kernel's arguments and writes them as its parameters lie in memory; made once for a kernel.

    A wrong type would let the kernel read other memory than its author meant, and neither the driver nor C checks.
    ``pack`` is compiled Python of its own for each kernel: a loop over types takes twice as long, at every launch.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        layout, offsets, body, values = f"@{len(kernel.parameters)}P", [], [], []
        for position, declared in enumerate(kernel.parameters):
            name, nullable = declared.removesuffix("?"), declared.endswith("?")
            is_struct = not (name in _SCALARS or name.endswith("*"))
            members = compiler.struct_fields(name) if is_struct else (name,)
            codes = [_SCALARS.get(member, "P") for member in members]
            # Python's native alignment is that of C++; an item of which there are none begins or pads a struct.
            align = f"0{max(codes, key=struct.calcsize)}"
            layout += align
            offsets.append(struct.calcsize(layout))
            layout += "".join(codes) + align
            names = [f"v{len(values) + i}" for i in range(len(members))]
            values += names
            body += [f"at = {position}", *_checks(f"a{position}", names, members, is_struct, nullable)]
        self._layout = struct.Struct(layout)
        arguments = "".join(f"a{i}, " for i in range(len(kernel.parameters)))
        source = "\n".join(
            (
                "def pack(arguments, device):",
                f"    if len(arguments) != {len(kernel.parameters)}: raise count(arguments)",
                f"    {arguments}= arguments",
                "    try:",
                *(f"        {line}" for line in body),
                # New memory for every launch: several threads may launch a kernel at once.
                "        memory = Memory()",
                "        start = addressof(memory)",
                f"        write(memory, 0, {', '.join([f'start + {at}' for at in offsets] + values)})",
                "    except error as wrong: raise overflow(wrong) from wrong",
                "    except (AttributeError, TypeError, ValueError): raise refused(arguments, device, at) from None",
                "    return memory",
            )
        )
        scope = _DTYPES | {
            "Memory": ctypes.c_char * self._layout.size,
            "addressof": ctypes.addressof,
            "write": self._layout.pack_into,
            "Number": (int, float),
            "error": struct.error,
            "count": self._count,
            "overflow": self._overflow,
            "refused": self._refused,
        }
        exec(source, scope)
        self.pack: Callable[[Sequence[Argument], torch.device], Packed] = scope["pack"]

    def _count(self, arguments: Sequence[Argument]) -> TypeError:
        count = len(self._kernel.parameters)
        return TypeError(f"{self._kernel.instance} takes {count} arguments, got {len(arguments)}")

    def _overflow(self, wrong: struct.error) -> OverflowError:
        return OverflowError(f"a number is too large for {self._kernel.instance}: {wrong}")

    def _refused(self, arguments: Sequence[Argument], device: torch.device, position: int) -> TypeError:
        declared = f"a {self._kernel.parameters[position]} on {device}"
        got = _describe(arguments[position])
        return TypeError(f"argument {position} of {self._kernel.instance} is {declared}, got {got}")


_DTYPES = {f"dtype_{element}": dtype for dtype, element in compiler.ELEMENTS.items()} | {"dtype_long_long": torch.int64}


def _checks(argument: str, names: list[str], members: Sequence[str], is_struct: bool, nullable: bool) -> list[str]:
    """Return the lines that check an argument and give its members' values the names; what is wrong raises."""
    allowed, memory = [f"isinstance({argument}, tuple)"] if is_struct else [], []
    for name, member in zip(names, members, strict=True):
        if member in _SCALARS:
            allowed.append(f"isinstance({name}, {'Number' if member == 'float' else 'int'})")
        else:
            # A tensor that waits for a negation has other values than its memory.
            dtype = f"dtype_{member.removeprefix('const ').removesuffix('*').replace(' ', '_')}"
            allowed.append(f"{name}.dtype is {dtype} and {name}.device == device and not {name}.is_neg()")
            memory.append(f"{name} = {name}.data_ptr()")
    lines = [f"{', '.join(names)}{',' * is_struct} = {argument}", f"if not ({' and '.join(allowed)}): raise TypeError"]
    lines += memory
    if not nullable:
        return lines
    return [f"if {argument} is None: {' = '.join(names)} = 0", "else:", *(f"    {line}" for line in lines)]


_packer = functools.cache(_Packer)


def _describe(argument: Argument) -> str:
    if isinstance(argument, tuple):
        return f"({', '.join(map(_describe, argument))})"
    if not isinstance(argument, Tensor):
        return repr(argument)
    return f"{argument.dtype} on {argument.device}{' that waits for a negation' if argument.is_neg() else ''}"


_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY in cuda.h


@functools.cache
def _loaded_function(kernel: Kernel, device_index: int) -> tuple[Any, Callable[..., None]]:
    """Return a kernel as CuPy loads it (its ``ptr`` is the driver's handle), and the driver's function to launch it.

    Raises torch.OutOfMemoryError if the device has no memory left for it.
    """
    from cupy.cuda import driver, function

    major, minor = torch.cuda.get_device_capability(device_index)
    binary, name = compiler.compile_once(kernel, 10 * major + minor)
    module = function.Module()
    try:
        module.load(binary)
    except RuntimeError as error:
        # CuPy's error for the driver has its number.
        if getattr(error, "status", None) == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"cuda:{device_index} has no memory left to load a kernel") from error
        raise
    return module.get_function(name), driver.launchKernel


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
        function, _ = _loaded_function(kernel, device_index)
        _make_context_current(device_index)
        per_multiprocessor = driver.occupancyMaxActiveBlocksPerMultiprocessor(function.ptr, threads, 0)
    per_multiprocessor = min(per_multiprocessor, most or per_multiprocessor)
    return per_multiprocessor * torch.cuda.get_device_properties(device_index).multi_processor_count
