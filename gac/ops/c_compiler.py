"""The system's C compiler, which makes libraries of the C sources in ``kernels/`` for this CPU at first use."""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from gac.ops import kernel_cache
from gac.ops.kernel_source import KERNEL_FOLDER, source_text

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared")
"""No -ffast-math, no fused multiply-add: the order of sums and every rounding are part of the results."""

_NAMES = ("cc", "gcc", "clang")
_REMEDY = "install gcc or clang, or set CC to a C compiler"
_SECONDS = 300


class NotCompiled(Exception):
    """There is no library; the message is one line with the cause and what to do."""


@dataclass(frozen=True)
class Library:
    """A compiled library and what made it, in words."""

    functions: ctypes.CDLL
    compiler: str


_loaded: dict[tuple[str, tuple[str, ...]], Library | NotCompiled] = {}
_lock = threading.Lock()


def load_library(file: str) -> Library:
    """Return the library of a C source in ``kernels/``: loaded before, from the disk, or compiled now.

    On the disk it is kept under its source, flags, compiler version and the CPU's features
    (:mod:`gac.ops.kernel_cache`), so that a library made for another CPU is not found.

    Raises:
        NotCompiled: Without a compiler that works, and where the library cannot be loaded; what it was the first time
            is not tried again.
    """
    with _lock:
        if (library := _loaded.get((file, FLAGS))) is None:
            try:
                library = _make_library(file)
            except NotCompiled as error:
                library = error
            _loaded[file, FLAGS] = library
    if isinstance(library, NotCompiled):
        raise NotCompiled(*library.args)
    return library


def find_compiler() -> list[str]:
    """Return the command of the C compiler: that of $CC, or the first there is. Raises NotCompiled if there is none."""
    if chosen := shlex.split(os.environ.get("CC", "")):
        if shutil.which(chosen[0]) is None:
            raise NotCompiled(f"CC names {chosen[0]}, which is not there: {_REMEDY}")
        return chosen
    for name in _NAMES:
        if (path := shutil.which(name)) is not None:
            return [path]
    raise NotCompiled(f"there is no C compiler ({', '.join(_NAMES)}): {_REMEDY}")


def _make_library(file: str) -> Library:
    command = find_compiler()
    # The macros that a compiler defines for these flags are its version and, by -march=native, the CPU's features.
    macros = _run([*command, *FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    key = kernel_cache.key_of(source_text(file, (KERNEL_FOLDER,)), *FLAGS, *command, macros.decode())
    description = _run([*command, "--version"]).decode().splitlines()[0]
    kept = kernel_cache.load(key)
    if kept is not None:
        try:
            return Library(_load(kept), description)
        except OSError:
            pass  # such as one that needs a C library which this machine no longer has
    with tempfile.TemporaryDirectory(prefix="gac-") as folder:
        output = Path(folder) / "library.so"
        _run([*command, *FLAGS, "-o", str(output), str(KERNEL_FOLDER / file)])
        binary = output.read_bytes()
    try:
        functions = _load(binary)
    except OSError as error:
        raise NotCompiled(
            f"the compiled {file} cannot be loaded: {error}; if {tempfile.gettempdir()} forbids it, set TMPDIR to"
            " another folder"
        ) from error
    kernel_cache.store(key, binary)
    return Library(functions, description)


def _load(binary: bytes) -> ctypes.CDLL:
    # Not the cache's file: what is loaded is what was checked, whatever is written there meanwhile.
    with tempfile.TemporaryDirectory(prefix="gac-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "library.so"
        path.write_bytes(binary)
        return ctypes.CDLL(str(path))


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=_SECONDS
        ).stdout
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        log = next((line for line in lines if "error: " in line), lines[-1] if lines else "no message")
        reason = f"ended with status {error.returncode}: {log}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"failed: {error}"
    raise NotCompiled(f"the C compiler {command[0]} {reason}; {_REMEDY}")
