"""Kernels are loaded and launched by CuPy itself (through_cupy.py), which no other test without a GPU lets it do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_on_cpu import stand_in_driver
from cuda_on_cpu.launcher import HERE, KernelsOnCpu


def test_through_cupy(compiled_kernels: KernelsOnCpu, tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    environment = os.environ | stand_in_driver.environment(compiled_kernels)
    environment |= {"GAC_TEST_KERNELS": str(compiled_kernels._folder), "GAC_KERNEL_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "through_cupy.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[:3000]
