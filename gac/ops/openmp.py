"""The OpenMP runtime whose threads torch uses, for C code that shares them."""

import ctypes
import functools
import sys

import torch

# Calls a function in each of a team's threads and waits for all: what compilers make of "#pragma omp parallel" for
# GNU's runtime, and for LLVM's and Intel's, which have it too.
_ENTRY = "GOMP_parallel"


@functools.cache
def parallel_function() -> int | None:
    """Return the address of GOMP_parallel in torch's own OpenMP runtime, or None where it cannot be had.

    Threads of another runtime, or of our own, would compete with torch's, which spin for a while when they are done.
    Torch loads its runtime for the whole process (RTLD_GLOBAL); this is None on Windows, and where torch has threads of
    another kind.
    """
    if sys.platform == "win32" or "OpenMP" not in torch.__config__.parallel_info():
        return None
    process = ctypes.CDLL(None)
    try:
        entry, threads = getattr(process, _ENTRY), process.omp_get_max_threads
    except AttributeError:
        return None
    # Torch asks its runtime for this number. If the answers differ, what was found is a runtime beside it.
    return ctypes.cast(entry, ctypes.c_void_p).value if threads() == torch.get_num_threads() else None
