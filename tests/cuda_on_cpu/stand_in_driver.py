"""Lets CuPy load and launch kernels without a GPU: stand_in_driver.cpp, and what gac asks of others than it.

For a process of its own, started with ``environment()``, that calls ``replace_context()`` before it imports CuPy.
"""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from cuda_on_cpu.launcher import HERE, Dim3, KernelsOnCpu
from gac.ops.cuda import compiler, launch
from gac.ops.cuda.compiler import Kernel
from gac.ops.cuda.launch import Packed

# Two GPUs that need different binaries, and one that is newer than NVRTC.
CAPABILITIES = ((9, 0), (8, 0), (20, 0))
MULTIPROCESSORS = 2
BLOCKS = 5  # that a multiprocessor runs at once
NO_DEVICE = -1


def environment(kernels: KernelsOnCpu) -> dict[str, str]:
    """Return the environment variables of a process in which the stand-in is the driver."""
    source = (HERE / "stand_in_driver.cpp").read_text()
    # Whoever then opens a library of this name gets the one that is loaded already, real driver or not.
    library = kernels.compile(source, "the stand-in driver", "-Wl,-soname,libcuda.so.1")
    return {"LD_PRELOAD": str(library)}


_PYTHON_FUNCTION = b"PyObject *(void)"


@ctypes.PYFUNCTYPE(ctypes.py_object)
def _ensure_context() -> None:
    """Do nothing: the context is that of ``torch.cuda.device``."""


def replace_context() -> None:
    """Take from CuPy the call that lets the CUDA runtime create a context.

    The runtime is inside CuPy's binary and works only with NVIDIA's driver. CuPy's other modules take the function
    from a table when they are imported; one of another type than this would fail there.
    """
    from cupy_backends.cuda.api import runtime as cuda_runtime

    if "cupy" in sys.modules or "_ensure_context" not in cuda_runtime.__pyx_capi__:
        raise RuntimeError("CuPy is imported already, or makes its context in another way than it used to")
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    pointer = ctypes.cast(_ensure_context, ctypes.c_void_p)
    cuda_runtime.__pyx_capi__["_ensure_context"] = new_capsule(pointer, _PYTHON_FUNCTION, None)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", Dim3),
        ("block", Dim3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int),
    )


class _Occupancy(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("threads", ctypes.c_int), ("shared_bytes", ctypes.c_size_t))


class StandInDriver:
    """A CPU launcher that takes the way of a launch on a CUDA device, and checks what arrives at the driver.

    Args:
        kernels: Has the kernels' builds for the CPU.
        monkeypatch: Replaces what ``gac.ops.cuda.launch`` calls of torch.cuda.
    """

    def __init__(self, kernels: KernelsOnCpu, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = torch.device("cuda", 0)
        self.launched: list[tuple[Kernel, Packed]] = []
        self._kernels = kernels
        self._library = ctypes.CDLL("libcuda.so.1")
        self._current_device = ctypes.c_int.in_dll(self._library, "stand_in_device")
        self._launches = ctypes.c_int.in_dll(self._library, "stand_in_launches")
        capabilities = (ctypes.c_int * len(CAPABILITIES)).in_dll(self._library, "stand_in_capabilities")
        capabilities[:] = [10 * major + minor for major, minor in CAPABILITIES]
        ctypes.c_int.in_dll(self._library, "stand_in_blocks").value = BLOCKS
        properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
        monkeypatch.setattr(torch.cuda, "device", self._make_current)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", _stream)
        # The threads and devices whose context CUDA's runtime was asked to make current.
        self.contexts: list[tuple[int, int]] = []
        from cupy.cuda import runtime

        monkeypatch.setattr(runtime, "setDevice", self._make_context)
        monkeypatch.setattr(launch, "_contexts", launch._Contexts())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: CAPABILITIES[index])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    def __call__(self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], packed: Packed) -> None:
        """Launch a kernel through CuPy on ``device``."""
        self._library.stand_in_run(self.mangled_name(kernel).encode(), self._kernels.function(kernel))
        before = self._launches.value
        launch._launch_on_cuda(kernel, self.device, grid, block, packed)
        assert self._launches.value == before + 1
        arrived = _Launch.in_dll(self._library, "stand_in_last_launch")
        assert [(size.x, size.y, size.z) for size in (arrived.grid, arrived.block)] == [
            (*size, 1, 1)[:3] for size in (grid, block)
        ]
        assert arrived.shared_bytes == 0
        assert (arrived.device, arrived.stream) == (self.device.index, _stream(self.device.index))
        assert self._current_device.value == NO_DEVICE
        self.launched.append((kernel, packed))

    def mangled_name(self, kernel: Kernel) -> str:
        """Return a kernel's name in the binaries for ``device``."""
        major, minor = CAPABILITIES[self.device.index]
        return compiler.compile_once(kernel, 10 * major + minor)[1]

    @property
    def occupancy_asked(self) -> tuple[str, int, int]:
        """The kernel's mangled name, threads and bytes of shared memory that occupancy was last asked for."""
        asked = _Occupancy.in_dll(self._library, "stand_in_last_occupancy")
        return asked.name.decode(), asked.threads, asked.shared_bytes

    def _make_context(self, device_index: int) -> None:
        assert self._current_device.value == device_index
        self.contexts.append((threading.get_ident(), device_index))

    @contextmanager
    def _make_current(self, device: torch.device | int) -> Iterator[None]:
        before = self._current_device.value
        self._current_device.value = device if isinstance(device, int) else device.index
        try:
            yield
        finally:
            self._current_device.value = before


def _stream(device_index: int) -> int:
    # More than 32 bits, as addresses have.
    return 0x7F00_0000_1000 + device_index
