"""Arguments of kernels are checked and typed before a launch."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cuda_on_cpu.launcher import KernelsOnCpu, parameters
from gac.ops.cuda import compiler, launch
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
    ((kernel, grid, block, packed),) = launched
    assert (kernel, grid, block) == (KERNEL, (2,), (32,))
    values = zip(("P", "P", "f", "i", "q"), parameters(kernel, packed), strict=True)
    assert [struct.unpack_from(code, value)[0] for code, value in values] == [
        x.data_ptr(),
        0,
        np.float32(0.1),
        7,
        2**40,
    ]


def test_every_number_arrives_as_it_is(launched: list) -> None:
    for number in (-0.0, float("nan"), float("inf"), -1e-45):
        launch.launch(KERNEL, (1,), (32,), (torch.zeros(3), None, number, -7, -(2**40)))
        packed = parameters(KERNEL, launched.pop()[3])
        assert packed[2] == struct.pack("f", number)
        assert [struct.unpack_from(code, value)[0] for code, value in zip("iq", packed[3:], strict=True)] == [
            -7,
            -(2**40),
        ]


def test_launches_share_no_memory(launched: list) -> None:
    for number in (1.0, 2.0):
        launch.launch(KERNEL, (1,), (32,), (torch.zeros(3), None, number, 7, 8))
    assert [struct.unpack_from("f", parameters(KERNEL, call[3])[2])[0] for call in launched] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, None, "argument 0 of f is a const float\\* on cpu, got None"),
        (0, torch.zeros(3).half(), "argument 0 of f is a const float\\* on cpu, got torch.float16 on cpu"),
        (1, torch.zeros(3, dtype=torch.bfloat16), "argument 1 of f is a Float16\\*\\?"),
        (1, torch.zeros(3, dtype=torch.float16, device="meta"), "got torch.float16 on meta"),
        (2, torch.zeros(3), "argument 2 of f is a float"),
        (3, None, "argument 3 of f is a int"),
        (3, 7.5, "argument 3 of f is a int on cpu, got 7.5"),
        (0, torch.zeros(3, dtype=torch.complex64).conj().imag, "waits for a negation"),
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
    with pytest.raises(OverflowError, match="a number is too large for f"):
        launch.launch(KERNEL, (1,), (32,), (torch.zeros(3), None, 0.5, 2**31, 8))
    assert launched == []


@pytest.fixture
def with_structs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder with a kernel that writes the members of a struct, which C++ pads twice, to its output."""
    (tmp_path / "mixed.cuh").write_text("""
struct Mixed {
    float a;  // four bytes of padding follow
    const float* b;
    int c;
    long long d;

    float sum() const { return 0.0f; }
};
""")
    (tmp_path / "mixed.cu").write_text("""
#include "mixed.cuh"
__global__ void mixed(float* out, Mixed first, Mixed NULLABLE second, float last) {
    out[0] = first.a; out[1] = *first.b; out[2] = first.c; out[3] = first.d;
    out[4] = second.b == nullptr; out[5] = second.a; out[6] = last;
}
""")
    monkeypatch.setattr(compiler, "KERNEL_FOLDER", tmp_path)
    for cache in (compiler.signature, compiler.struct_fields, compiler.make_kernel, launch._packer):
        cache.cache_clear()
    yield tmp_path
    for cache in (compiler.signature, compiler.struct_fields, compiler.make_kernel, launch._packer):
        cache.cache_clear()


def test_structs_arrive_as_they_were_packed(with_structs: Path) -> None:
    (with_structs / "run.cu").write_text('#define NULLABLE\n#include "mixed.cu"\n')
    declared = compiler.make_kernel("mixed.cu", "mixed")
    assert declared.parameters == ("float*", "Mixed", "Mixed?", "float")
    kernel = Kernel("run.cu", "mixed", declared.parameters)
    launch.set_cpu_launcher(KernelsOnCpu(with_structs, kernel_folder=with_structs))
    try:
        out, b = torch.zeros(7), torch.tensor([2.0])
        launch.launch(kernel, (1,), (1,), (out, (0.5, b, -3, 2**20), None, 7.0))
    finally:
        launch.set_cpu_launcher(None)
    assert out.tolist() == [0.5, 2.0, -3.0, 2.0**20, 1.0, 0.0, 7.0]


@pytest.mark.parametrize(
    "struct",
    [None, 0.5, (0.5, None, 1, 2), (0.5, torch.zeros(1).half(), 1, 2), (torch.zeros(1), torch.zeros(1), 1, 2), (0.5,)],
    ids=["none", "number", "null", "dtype", "tensor", "length"],
)
def test_wrong_structs_are_refused(struct: object, with_structs: Path, launched: list) -> None:
    kernel = compiler.make_kernel("mixed.cu", "mixed")
    with pytest.raises(TypeError, match="argument 1 of mixed is a Mixed on cpu, got "):
        launch.launch(kernel, (1,), (1,), (torch.zeros(7), struct, None, 7.0))
    assert launched == []


@pytest.mark.parametrize(("status", "raised"), [(2, torch.OutOfMemoryError), (999, RuntimeError)])
def test_no_memory_to_load_a_kernel_is_out_of_memory(
    status: int, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.function
    error = RuntimeError("what the driver says")
    error.status = status

    class Module:
        def load(self, binary: bytes) -> None:
            raise error

    monkeypatch.setattr(function, "Module", Module)
    monkeypatch.setattr(compiler, "compile_once", lambda *_: (b"", "probe"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with pytest.raises(raised) as found:
        launch._loaded_function(Kernel("probe.cu", "probe", ("float*",)), 0)
    assert type(found.value) is raised
    # Asked again, it is tried again.
    assert launch._loaded_function.cache_info().currsize == 0
