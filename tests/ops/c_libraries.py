"""What the tests of the C kernels share: their libraries, made for other CPUs or with sanitizers."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from gac.ops import c_compiler, c_kernels, event_conv
from gac.ops.kernel_source import KERNEL_FOLDER

SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TARGETS = {"native": "-march=native", "AVX": "-march=x86-64-v3", "baseline": "-march=x86-64"}


def forget_kernels() -> None:
    """Let libraries be looked for again."""
    c_kernels.status.cache_clear()
    c_kernels._function.cache_clear()
    event_conv._kernels.cache_clear()


def sanitize_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile with sanitizers in a process that cuda_on_cpu.launcher.run_under_sanitizers started."""
    if "GAC_TEST_SANITIZE" in os.environ:
        monkeypatch.setattr(c_compiler, "FLAGS", (*c_compiler.FLAGS, *SANITIZERS))
    forget_kernels()


def use_target(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the kernels as for another CPU, if this one can run that."""
    name = os.uname().machine
    if target != "native" and name != "x86_64":
        pytest.skip(f"{name} is no x86 CPU")
    if target == "AVX" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the CPU has no AVX2")
    flags = [TARGETS[target] if flag == "-march=native" else flag for flag in c_compiler.FLAGS]
    monkeypatch.setattr(c_compiler, "FLAGS", tuple(flags))
    forget_kernels()
    assert c_kernels.status().ok, c_kernels.status().reason
    assert target in ("native", c_kernels.status().reason.split()[0])


_THREADS = """
#include <pthread.h>
#include <stdlib.h>
static void (*work)(void*);
static void* thread(void* job) { work(job); return 0; }
static void parallel(void (*function)(void*), void* job, unsigned threads, unsigned flags) {
    pthread_t others[3];
    work = function;
    for (unsigned i = 0; i < threads - 1; i++) pthread_create(&others[i], 0, thread, job);
    function(job);
    for (unsigned i = 0; i < threads - 1; i++) pthread_join(others[i], 0);
}
"""


def run_under_thread_sanitizer(folder: Path, file: str, main: str) -> str:
    """Run a C program with a source of kernels before it, and with ``parallel`` for a team of four; return its report.

    It must end with status 0. Its threads are pthreads: the sanitizer does not know those of OpenMP runtimes.
    """
    program = folder / "program.c"
    program.write_text(f'#include "{KERNEL_FOLDER / file}"\n{_THREADS}{main}')
    flags = ["-O1", "-g", "-fsanitize=thread", "-pthread", "-std=gnu11"]
    command = [*c_compiler.find_compiler(), *flags, "-o", str(folder / "program"), str(program), "-lm"]
    subprocess.run(command, check=True)
    result = subprocess.run([folder / "program"], capture_output=True, text=True)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this compiler's thread sanitizer does not run on this operating system's kernel")
    # That of data races is 66.
    assert result.returncode in (0, 66), result.stderr
    return result.stderr
