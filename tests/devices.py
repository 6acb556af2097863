"""Where tests of the kernels run them."""

import pytest

KERNELS = ("cpu", pytest.param("c", marks=pytest.mark.c_kernels), pytest.param("cuda", marks=pytest.mark.gpu))
"""The CUDA kernels' source compiled for the CPU, their C versions, and the kernels on the GPU."""
