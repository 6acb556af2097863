"""What the tests of the C kernels share: their libraries, made for other CPUs or with sanitizers."""

import os

import pytest
import torch

from gac.ops import c_compiler, c_kernels, event_conv

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
