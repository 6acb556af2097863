"""The CPU launcher that tests put in place of CUDA: compiles a kernel with g++ and calls it."""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Literal

from gac.ops.cuda import compiler
from gac.ops.cuda.compiler import KERNEL_FOLDER, Kernel
from gac.ops.cuda.launch import Packed

HERE = Path(__file__).parent
ORDERS = ("ascending", "descending", "shuffled")

_POISON = r"\1 cuda_on_cpu::poison_once_per_block(&\2, sizeof(\2));"


def sanitizer_environment() -> dict[str, str]:
    """Return the environment variables of a Python process that runs kernels compiled with ``sanitize``."""
    # The sanitizer wants to be first, and the C++ library right behind it: it wraps functions of that.
    find = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    libraries = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in find]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def run_under_sanitizers(tests: str, chosen: str) -> str:
    """Run tests of a file again, with every access of the kernels checked for bounds and alignment; return the output.

    Args:
        tests: The file.
        chosen: Which of its tests, as pytest's -k takes it.
    """
    environment = os.environ | sanitizer_environment() | {"GAC_TEST_SANITIZE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, "-k", chosen]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def parameters(kernel: Kernel, packed: Packed) -> list[bytes]:
    """Return the memory of each of a kernel's packed parameters, with the padding behind it."""
    count = len(kernel.parameters)
    addresses = [*(ctypes.c_void_p * count).from_buffer(packed), ctypes.addressof(packed) + len(packed)]
    return [ctypes.string_at(start, end - start) for start, end in pairwise(addresses)]


class Dim3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class KernelsOnCpu:
    """Compiles each kernel at its first launch and runs its threads in one of three orders.

    Args:
        folder: Where the compiled libraries go.
        sanitize: Compile with the address and undefined-behaviour sanitizers; only in a process that was started
            with ``sanitizer_environment()``.
        kernel_folder: Where to look for kernel sources before the package's own.
    """

    def __init__(self, folder: Path, sanitize: bool = False, kernel_folder: Path = KERNEL_FOLDER) -> None:
        self.order: Literal["ascending", "descending", "shuffled"] = "shuffled"
        self._folder = folder
        self._kernel_folder = kernel_folder
        self._flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fno-gnu-unique", "-Wno-unknown-pragmas"]
        if sanitize:
            self._flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        self._functions: dict[Kernel, ctypes._CFuncPtr] = {}
        # The scheduler runs one launch at a time.
        self._lock = threading.Lock()
        self._scheduler = self.compile((HERE / "cuda_on_cpu.cpp").read_text(), "the scheduler")

    def __call__(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        packed: Packed,
    ) -> None:
        """Run a kernel; raises RuntimeError for a compiler error or a barrier that not all threads reach."""
        run = self.function(kernel)
        sizes = (Dim3(*(*size, 1, 1)[:3]) for size in (grid, block))
        with self._lock:
            error = run(*sizes, ORDERS.index(self.order), packed)
        if error is not None:
            raise RuntimeError(f"{kernel.instance}: {error.decode()}")

    def function(self, kernel: Kernel) -> ctypes._CFuncPtr:
        """Return a kernel's function ``run`` (see ``_translation_unit``), compiling it at the first call."""
        if kernel not in self._functions:
            library = self.compile(self._translation_unit(kernel), kernel.instance, str(self._scheduler))
            self._functions[kernel] = ctypes.CDLL(str(library)).run
            self._functions[kernel].restype = ctypes.c_char_p
        return self._functions[kernel]

    def compile(self, text: str, name: str, *link: str) -> Path:
        """Return a shared library made of C++ text, compiled if no process of the session has done so.

        Args:
            text: The source.
            name: What it is, for the error message.
            link: Libraries and options for the linker.
        """
        digest = hashlib.sha256("\0".join([text, *self._flags]).encode()).hexdigest()[:16]
        output = self._folder / f"{digest}.so"
        if not output.exists():
            command = ["g++", *self._flags, f"-I{HERE}", "-x", "c++", "-", "-x", "none", *link]
            # The compiler itself need not run under the sanitizers.
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            # Another process may be compiling the same.
            unfinished = output.with_suffix(f".{os.getpid()}")
            command += ["-o", str(unfinished)]
            process = subprocess.run(command, input=text, text=True, capture_output=True, env=environment)
            if process.returncode != 0:
                raise RuntimeError(f"{name} does not compile:\n{process.stderr}")
            os.replace(unfinished, output)
        return output

    def _translation_unit(self, kernel: Kernel) -> str:
        types = [declared.rstrip("?") for declared in kernel.parameters]
        values = ", ".join(f"*static_cast<{kind}*>(arguments[{i}])" for i, kind in enumerate(types))
        return f"""#include "cuda_on_cpu.h"
{_poison_shared_memory(compiler.source_text(kernel.file, (HERE, self._kernel_folder, KERNEL_FOLDER)))}
// Compiles only if the parameters that Python declares are exactly the kernel's.
constexpr void (*kernel)({", ".join(types)}) = {kernel.instance};

static void call_kernel(void** arguments) {{ kernel({values}); }}

extern "C" const char* run(dim3 grid, dim3 block, cuda_on_cpu::Order order, void** arguments) {{
    return cuda_on_cpu::launch(grid, block, order, call_kernel, arguments);
}}
"""


def _poison_shared_memory(source: str) -> str:
    poisoned, count = re.subn(r"(__shared__ [\w:<>, ]+? (\w+)(?:\[[^\]]*\])*;)", _POISON, source)
    if count != source.count("__shared__"):
        raise RuntimeError("a __shared__ declaration is not of the form '__shared__ type name[size];'")
    return poisoned
