"""The CPU stand-in for CUDA finds the defects that it is there to find."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_on_cpu.launcher import ORDERS, KernelsOnCpu, sanitizer_environment
from gac.ops.cuda import launch
from gac.ops.cuda.compiler import Kernel

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

# Sums the block's input: each warp by shuffles, then the first thread over the warps.
BLOCK_SUM = """
__global__ void block_sum(const float* x, float* y) {
    __shared__ float partial[2];
    float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) y[blockIdx.x] = partial[0] + partial[1];
}
"""


def block_sum(folder: Path, source: str, order: str) -> torch.Tensor:
    (folder / "sum.cu").write_text(source)
    kernels = KernelsOnCpu(folder, kernel_folder=folder)
    kernels.order = order
    kernel = Kernel("sum.cu", "block_sum", ("const float*", "float*"))
    x, y = torch.arange(192.0), torch.full((3,), torch.nan)
    launch.set_cpu_launcher(kernels)
    try:
        launch.launch(kernel, (3,), (64,), (x, y))
    finally:
        launch.set_cpu_launcher(None)
    return y


EXPECTED = torch.arange(192.0).view(3, 64).sum(1)


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_and_shuffles(order: str, tmp_path: Path) -> None:
    assert torch.equal(block_sum(tmp_path, BLOCK_SUM, order), EXPECTED)


def test_shuffle_down_and_broadcast(tmp_path: Path) -> None:
    down = BLOCK_SUM.replace("__shfl_xor_sync", "__shfl_down_sync")
    assert torch.equal(block_sum(tmp_path, down, "shuffled"), EXPECTED)
    first_lane = BLOCK_SUM.replace("__shfl_xor_sync(0xffffffffu, sum, bits)", "__shfl_sync(0xffffffffu, sum, 0)")
    # Adding the first lane's value five times multiplies it by 32.
    assert block_sum(tmp_path, first_lane, "shuffled")[0] == 32.0 * (0 + 32)


def test_missing_barrier_shows_in_some_order(tmp_path: Path) -> None:
    broken = BLOCK_SUM.replace("    __syncthreads();\n", "")
    right = [torch.equal(block_sum(tmp_path, broken, order), EXPECTED) for order in ORDERS]
    assert not all(right)


def test_divergent_barriers_are_errors(tmp_path: Path) -> None:
    some_threads = BLOCK_SUM.replace("    __syncthreads();", "    if (threadIdx.x < 32) __syncthreads();")
    two_places = BLOCK_SUM.replace(
        "    __syncthreads();", "    if (threadIdx.x < 32) __syncthreads();\n    else\n        __syncthreads();"
    )
    half_a_warp = BLOCK_SUM.replace("    for (int", "    if (threadIdx.x % 32 < 16) return;\n    for (int")
    for broken in (some_threads, two_places, half_a_warp):
        with pytest.raises(RuntimeError, match=r"line \d+: a barrier that not all threads reach"):
            block_sum(tmp_path, broken, "ascending")


def test_wrong_shuffle_mask_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mask or the source lane"):
        block_sum(tmp_path, BLOCK_SUM.replace("0xffffffffu", "0xffffu"), "ascending")


def test_shared_memory_starts_as_nan_in_every_block(tmp_path: Path) -> None:
    broken = BLOCK_SUM.replace("threadIdx.x % 32 == 0", "threadIdx.x == 0 || (blockIdx.x == 0 && threadIdx.x == 32)")
    assert block_sum(tmp_path, broken, "ascending").isnan().tolist() == [False, True, True]


def test_declared_parameters_must_be_those_of_the_kernel(tmp_path: Path) -> None:
    for wrong in ("(const int* x", "(float* x", "(const float* x, int n"):
        with pytest.raises(RuntimeError, match="does not compile"):
            block_sum(tmp_path, BLOCK_SUM.replace("(const float* x", wrong), "ascending")


DEFECTS = {
    "heap-buffer-overflow": "y[i] = x[i + 1];",
    "misaligned address": "struct alignas(16) Pack { float lane[4]; };"
    " if (i == 0) y[0] = reinterpret_cast<const Pack*>(x + 1)->lane[0];",
}


def test_sanitizers_find_bad_accesses(tmp_path: Path) -> None:
    for number, defect in enumerate(DEFECTS.values()):
        (tmp_path / f"bad{number}.cu").write_text(
            "__global__ void bad(const float* x, float* y) { const int i = threadIdx.x; " + defect + " }\n"
        )
    # Each defect ends its process; a fork saves importing torch again.
    script = f"""
import os
import torch
from pathlib import Path
from cuda_on_cpu.launcher import KernelsOnCpu
from gac.ops.cuda import launch
from gac.ops.cuda.compiler import Kernel
folder = Path({str(tmp_path)!r})
launch.set_cpu_launcher(KernelsOnCpu(folder, sanitize=True, kernel_folder=folder))
for number in range({len(DEFECTS)}):
    child = os.fork()
    if child == 0:
        kernel = Kernel(f"bad{{number}}.cu", "bad", ("const float*", "float*"))
        launch.launch(kernel, (1,), (64,), (torch.ones(64), torch.ones(64)))
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0
"""
    environment = os.environ | sanitizer_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for finding in DEFECTS:
        assert finding in result.stderr
