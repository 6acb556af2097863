"""The kernels on the CPU: whether their C versions can run, and running those of the fused operations.

``kernels/fused.c`` has a function for each CUDA kernel, under its name and with its arguments, and
``kernels/event_conv.c`` the convolutions over spikes; the system's compiler makes libraries of them.
"""

import ctypes
import functools
import logging
import re
from dataclasses import dataclass

import numpy as np
import torch

from gac.errors import InputError
from gac.ops import c_compiler, openmp
from gac.ops.cuda.compiler import Kernel
from gac.ops.kernel_source import KERNEL_FOLDER

_log = logging.getLogger("gac")

_SURROGATES = ("PiecewiseQuadratic", "Rect", "Sigmoid", "ATan")  # numbered like this in kernels/fused.c

BLOCKS = 64
"""Blocks that a reduction has on the CPU, for any number of threads: they decide the order of its sums."""


@dataclass(frozen=True)
class Status:
    """Whether kernels can run; what runs them, or what is missing and how to get it, a line each."""

    ok: bool
    reason: str
    hint: str | None = None


@functools.cache
def status() -> Status:
    """Return whether the C kernels run here; compiles them at the first call, and logs once that they do not."""
    try:
        libraries = [c_compiler.load_library(file) for file in ("event_conv.c", "fused.c")]
    except c_compiler.NotCompiled as error:
        _log.warning("the CPU runs without C kernels, so neurons and convolutions over spikes are torch's: %s", error)
        return Status(False, str(error))
    instructions = libraries[0].functions.instructions
    instructions.restype = ctypes.c_char_p
    threads = "torch's threads" if openmp.parallel_function() else "one thread, as torch's OpenMP runtime is not found"
    return Status(True, f"{instructions().decode()} code by {libraries[0].compiler}; {threads}")


class Team(ctypes.Structure):
    """``Team`` of ``kernels/team.h``."""

    _fields_ = (("parallel", ctypes.c_void_p), ("threads", ctypes.c_int64))


def team() -> Team:
    """Return torch's threads for a kernel to run in; one thread where its OpenMP runtime is not found."""
    return Team(openmp.parallel_function(), torch.get_num_threads())


class _Launch(ctypes.Structure):
    _fields_ = (
        ("team", Team),
        *((name, ctypes.c_int64) for name in ("blocks", "quantities", "steps", "soft", "detached", "surrogate")),
        *((name, ctypes.c_int64) for name in ("norm_shortcut", "with_spikes")),
    )


def launch(
    kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], arguments: list[np.generic | np.ndarray]
) -> None:
    """Run a kernel's C version; ``grid`` says how many blocks of rows there are, ``block`` means nothing here.

    Raises:
        InputError: For a kernel of another dtype than float32, and without a C compiler.
    """
    function, variant = _function(kernel)
    values = [np.asarray(argument) for argument in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
    function(_Launch(team(), grid[0], grid[1] if len(grid) > 1 else 1, *variant), addresses)


@functools.cache
def _function(kernel: Kernel) -> tuple[ctypes._CFuncPtr, tuple[int, ...]]:
    """Return a kernel's C function and what its template's arguments come to (the last fields of ``Launch``)."""
    if not (found := status()).ok:
        raise InputError(f"the kernels cannot run on the CPU: {found.reason}; or use backend='torch'")
    name, _, arguments = kernel.instance.removesuffix(">").partition("<")
    template = dict(zip(_template_parameters(kernel.file, name), arguments.split(", "), strict=True))
    if template.get("Element", "float") != "float":
        raise InputError("on the CPU the kernels take float32 tensors; use backend='torch' for other dtypes")
    variant = (
        int(template.get("kSteps", 1)),
        template.get("kReset") == "Reset::soft",
        template.get("kDetached") == "true",
        _SURROGATES.index(template["Surrogate"]) if "Surrogate" in template else 0,
        template.get("kNormShortcut") == "true",
        template.get("kSpikes") == "true",
    )
    function = getattr(c_compiler.load_library("fused.c").functions, name)
    function.restype, function.argtypes = None, (ctypes.POINTER(_Launch), ctypes.c_void_p)
    return function, variant


def _template_parameters(file: str, name: str) -> tuple[str, ...]:
    source = (KERNEL_FOLDER / file).read_text()
    found = re.search(rf"template <([^<>]*)>\n__global__ void (?:__launch_bounds__\([^()]*\) )?{name}\(", source)
    return tuple(each.split()[-1] for each in found[1].split(",")) if found else ("",)
