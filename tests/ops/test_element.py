"""The conversions between float32 and the kernels' 16-bit elements."""

from pathlib import Path

import pytest
import torch

from cuda_on_cpu.launcher import KernelsOnCpu
from gac.ops.cuda import launch
from gac.ops.cuda.compiler import Kernel

SOURCE = """#include "element.cuh"
template <typename Element>
__global__ void convert(const float* x, Element* narrow, float* wide, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    narrow[i] = from_float<Element>(x[i]);
    wide[i] = to_float(narrow[i]);
}
"""


def edge_cases() -> torch.Tensor:
    """Every bfloat16, the ties between neighbours, the numbers just beside the ties, and some ordinary ones."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    bits = torch.cat([upper, upper + 0x7FFF, upper + 0x8000, upper + 0x8001, upper + 0xFFFF])
    bits = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    ties_of_half = (torch.arange(-4096, 4097) / 2048 + 1 / 4096) * 2.0**10
    return torch.cat([bits.view(torch.float32), ties_of_half, torch.randn(1000)])


@pytest.mark.parametrize("element", ["Float16", "BFloat16"])
def test_conversions_are_those_of_torch(element: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("compiled_kernels")  # skips where there is no compiler
    (tmp_path / "convert.cu").write_text(SOURCE)
    dtype = {"Float16": torch.float16, "BFloat16": torch.bfloat16}[element]
    kernel = Kernel("convert.cu", f"convert<{element}>", ("const float*", f"{element}*", "float*", "int"))
    x = edge_cases()
    narrow, wide = torch.zeros_like(x, dtype=dtype), torch.zeros_like(x)
    launch.set_cpu_launcher(KernelsOnCpu(tmp_path, kernel_folder=tmp_path))
    try:
        launch.launch(kernel, (-(-len(x) // 128),), (128,), (x, narrow, wide, len(x)))
    finally:
        launch.set_cpu_launcher(None)
    torch.testing.assert_close(narrow, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
