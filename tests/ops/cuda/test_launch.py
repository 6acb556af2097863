"""Arguments of kernels are checked and typed before a launch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gac.ops.cuda import launch
from gac.ops.cuda.compiler import Kernel

KERNEL = Kernel("lif.cu", "f", ("const float*", "Float16*?", "float", "int", "long long"))


@pytest.fixture
def launched() -> Iterator[list]:
    """What launch() hands on for tensors on the CPU."""
    calls: list = []
    launch.set_cpu_launcher(lambda *call: calls.append(call))
    yield calls
    launch.set_cpu_launcher(None)


def test_arguments_are_exactly_typed(launched: list) -> None:
    x = torch.zeros(3)
    launch.launch(KERNEL, (2,), (32,), (x, None, 0.1, 7, 2**40))
    ((kernel, grid, block, arguments),) = launched
    assert (kernel, grid, block) == (KERNEL, (2,), (32,))
    assert arguments == [x.data_ptr(), 0, np.float32(0.1), 7, 2**40]
    assert [type(a) for a in arguments] == [np.uint64, np.uint64, np.float32, np.int32, np.int64]


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, None, "argument 0 of f is a const float\\* on cpu, got None"),
        (0, torch.zeros(3).half(), "argument 0 of f is a const float\\* on cpu, got torch.float16 on cpu"),
        (1, torch.zeros(3, dtype=torch.bfloat16), "argument 1 of f is a Float16\\*\\?"),
        (1, torch.zeros(3, dtype=torch.float16, device="meta"), "got torch.float16 on meta"),
        (2, torch.zeros(3), "argument 2 of f is a float"),
        (3, None, "argument 3 of f is a int"),
        (0, 1234, "argument 0 of f is a const float\\*"),
    ],
)
def test_wrong_arguments_are_refused(position: int, wrong: object, message: str, launched: list) -> None:
    arguments: list = [torch.zeros(3), torch.zeros(3).half(), 0.5, 7, 8]
    arguments[position] = wrong
    if position == 0:
        arguments[1] = torch.zeros(3).half()
    with pytest.raises(TypeError, match=message):
        launch.launch(KERNEL, (1,), (32,), arguments)
    with pytest.raises(TypeError, match="takes 5 arguments, got 4"):
        launch.launch(KERNEL, (1,), (32,), arguments[:4])
    assert launched == []


def test_integers_must_fit(launched: list) -> None:
    with pytest.raises(OverflowError):
        launch.launch(KERNEL, (1,), (32,), (torch.zeros(3), None, 0.5, 2**31, 8))
    assert launched == []


def test_the_cpu_has_no_launcher_in_production() -> None:
    with pytest.raises(RuntimeError, match="CUDA kernels cannot run on tensors on cpu"):
        launch.launch(KERNEL, (1,), (32,), (torch.zeros(3), None, 0.5, 7, 8))
