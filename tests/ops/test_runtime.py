"""Compilation, launch checks, and the choice of backend; without a GPU, except where marked."""

import logging
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ops.fused import CIFAR, DEFAULT, activations

from gac.errors import InputError
from gac.ops import lif, lif_pool, runtime

CUDA = torch.device("cuda", 0)
KERNEL = runtime.Kernel("lif.cu", "f", ("const float*", "Float16*?", "float", "int", "long long"))


@pytest.fixture
def fresh_status() -> Iterator[None]:
    """Forget what was found out about CuPy, before and after."""
    caches = (runtime.toolchain_status, runtime.cupy_status, runtime._log_choice)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


# --- Source and compilation


def test_headers_are_inlined_once_and_lines_keep_their_place(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text('#include "a.cuh"\n#include "b.cuh"\nint last;\n')
    (tmp_path / "a.cuh").write_text('#pragma once\n#include "b.cuh"\nint a;\n')
    (tmp_path / "b.cuh").write_text("#pragma once\nint b;\n")
    assert runtime.source_text("k.cu", (tmp_path,)).splitlines() == [
        '#line 1 "k.cu"',
        '#line 1 "a.cuh"',
        "",
        '#line 1 "b.cuh"',
        "",
        "int b;",
        '#line 3 "a.cuh"',
        "int a;",
        '#line 2 "k.cu"',
        "int last;",
    ]


def test_kernel_sources_need_no_header_of_cuda() -> None:
    for path in runtime.KERNEL_FOLDER.glob("*.cu*"):
        assert "#include <" not in path.read_text()
    assert "#include" not in runtime.source_text("lif.cu")


def test_compiler_errors_show_the_log() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    kernel = runtime.Kernel("lif.cu", "lif_forward<double, 1, true, 1, Reset::sideways>", ())
    with pytest.raises(RuntimeError, match=r"(?s)does not compile \(-arch=sm_90\).*sideways"):
        runtime.compile_kernel(kernel, 90)


def test_gpus_newer_than_nvrtc_get_ptx() -> None:
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC").cuda.nvrtc
    newest = max(nvrtc.getSupportedArchs())
    kernel = lif.forward_kernel(torch.float32, 4, 4, "Reset::hard")
    compiled = runtime.compile_kernel(kernel, newest + 1)
    assert f".target sm_{newest}".encode() in compiled.binary
    assert compiled.name.encode() in compiled.binary
    assert runtime.compile_kernel(kernel, 90).binary.startswith(b"\x7fELF")


def test_a_cubin_is_whole() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    binary = runtime.compile_kernel(runtime.Kernel("probe.cu", "probe", ("float*",)), 90).binary
    # In an ELF file one of two tables comes last.
    segments, sections, *_, segment_size, segment_count, section_size, section_count = struct.unpack_from(
        "<QQIHHHHH", binary, 32
    )
    assert len(binary) == max(segments + segment_size * segment_count, sections + section_size * section_count)


# --- Launch


@pytest.fixture
def launched() -> Iterator[list]:
    """What launch() hands on for tensors on the CPU."""
    calls: list = []
    runtime.set_cpu_launcher(lambda *call: calls.append(call))
    yield calls
    runtime.set_cpu_launcher(None)


def test_arguments_are_exactly_typed(launched: list) -> None:
    x = torch.zeros(3)
    runtime.launch(KERNEL, (2,), (32,), (x, None, 0.1, 7, 2**40))
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
        runtime.launch(KERNEL, (1,), (32,), arguments)
    with pytest.raises(TypeError, match="takes 5 arguments, got 4"):
        runtime.launch(KERNEL, (1,), (32,), arguments[:4])
    assert launched == []


def test_integers_must_fit(launched: list) -> None:
    with pytest.raises(OverflowError):
        runtime.launch(KERNEL, (1,), (32,), (torch.zeros(3), None, 0.5, 2**31, 8))
    assert launched == []


def test_the_cpu_has_no_launcher_in_production() -> None:
    with pytest.raises(RuntimeError, match="CUDA kernels cannot run on tensors on cpu"):
        runtime.launch(KERNEL, (1,), (32,), (torch.zeros(3), None, 0.5, 7, 8))


# --- Operators that have a derivative


def rates(x: torch.Tensor) -> torch.Tensor:
    return lif_pool.lif_pool(x, *CIFAR)


def rates_by_the_operator(x: torch.Tensor) -> torch.Tensor:
    """Return the same as a compiled graph would: by the operator and the Function that torch.library makes for it."""
    return torch.ops.gac.lif_pool(x, *lif.Constants.of(x.dtype, *CIFAR))


def test_one_derivative_for_both_ways_of_calling(device: str) -> None:
    results, nodes = [], []
    for function in (rates, rates_by_the_operator):
        x = activations(DEFAULT, device).requires_grad_()
        y = function(x)
        nodes.append(y.grad_fn.name())
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), x)])
    assert results[0][1].abs().max() > 0
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    # Not torch.library's, which takes a multiple of the time.
    assert nodes[0] == "lif_poolBackward" != nodes[1]


@pytest.mark.parametrize("function", [rates, rates_by_the_operator])
def test_a_second_derivative_is_refused_only_where_it_is_taken(function: Callable, device: str) -> None:
    x = activations(DEFAULT, device).requires_grad_()
    gradients = [torch.autograd.grad(function(x).sum(), x, create_graph=graph)[0] for graph in (False, True)]
    assert torch.equal(*gradients)
    with pytest.raises(NotImplementedError, match="gac::lif_pool has no second derivative"):
        gradients[1].sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_without_grad_mode(mode: Callable, device: str) -> None:
    x = activations(DEFAULT, device).requires_grad_()
    expected = rates(x)
    with mode():
        y = rates(x)
    assert expected.requires_grad
    assert not y.requires_grad
    assert torch.equal(y, expected)


def test_a_compiler_sees_the_operator(device: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph

    x = activations(DEFAULT, device).requires_grad_()
    y = torch.compile(rates, fullgraph=True, backend=backend)(x)
    assert torch.equal(y, rates(x))
    (graph,) = graphs
    assert graph.graph.find_nodes(op="call_function", target=torch.ops.gac.lif_pool.default)


# --- Status of CuPy: what is missing is played, the rest is the real installation


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, version: str = "13.0") -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("fresh_status")
class TestStatus:
    def test_cpu(self) -> None:
        status = runtime.cupy_status(torch.device("cpu"))
        assert not status.ok
        assert "need a CUDA device" in status.reason

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_device(self) -> None:
        pytest.importorskip("cupy", reason="CuPy is not installed")
        assert runtime.toolchain_status().ok
        assert runtime.cupy_status(CUDA) == runtime.CupyStatus(
            False, "torch finds no CUDA device", "check the GPU and its driver with nvidia-smi"
        )

    def test_torch_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "built without CUDA" in runtime.cupy_status(CUDA).reason

    @pytest.mark.parametrize("version", ["12.8", "13.0"])
    def test_cupy_missing(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_cuda(monkeypatch, version)
        monkeypatch.setattr(runtime, "cupy_installed", lambda: False)
        assert runtime.cupy_status(CUDA) == runtime.CupyStatus(
            False, "CuPy is not installed", f"pip install cupy-cuda{version[:2]}x"
        )

    @pytest.mark.parametrize("kind", ["ImportError", "AttributeError"])
    def test_cupy_broken(self, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        pretend_cuda(monkeypatch)
        (tmp_path / "cupy.py").write_text(f"raise {kind}('\\n=====\\nFailed to import CuPy.\\nBecause.')")
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.split(".")[0] == "cupy"]:
            monkeypatch.delitem(sys.modules, name)
        assert runtime.cupy_status(CUDA).reason == "CuPy cannot be imported: Failed to import CuPy."

    def test_cupy_for_another_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        driver = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.driver
        ours = driver.get_build_version() // 1000
        pretend_cuda(monkeypatch, f"{ours - 1}.1")
        status = runtime.cupy_status(CUDA)
        assert f"is built for CUDA {ours}, torch for CUDA {ours - 1}" in status.reason
        assert status.hint == f"pip uninstall cupy-cuda{ours}x && pip install cupy-cuda{ours - 1}x"

    def test_nvrtc_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = pytest.importorskip("cupy", reason="CuPy is not installed").cuda

        def missing() -> None:
            raise RuntimeError("Failure finding libnvrtc.so\nSearched everywhere")

        pretend_cuda(monkeypatch)
        monkeypatch.setattr(cuda, "nvrtc", SimpleNamespace(getVersion=missing))
        assert runtime.cupy_status(CUDA) == runtime.CupyStatus(
            False, "CuPy cannot load NVRTC: Failure finding libnvrtc.so", "pip install nvidia-cuda-nvrtc"
        )

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("cupy", reason="CuPy is not installed")
        pretend_cuda(monkeypatch, torch.version.cuda)
        assert runtime.cupy_status(CUDA).reason == "CuPy cannot use the CUDA driver"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_kernels_do_not_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = pytest.importorskip("cupy", reason="CuPy is not installed").cuda
        pretend_cuda(monkeypatch, torch.version.cuda)
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        # torch itself then fails to make a tensor there, as it does with a broken driver.
        status = runtime.cupy_status(CUDA)
        assert not status.ok
        assert status.reason.startswith("a kernel does not run on cuda")
        assert "gac.doctor" in status.hint


def test_the_probe_runs_where_kernels_do(kernels_on_cpu: object, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.probe(torch.device("cpu"))
    monkeypatch.setattr(runtime, "launch", lambda *_: None)
    with pytest.raises(RuntimeError, match="left no result"):
        runtime.probe(torch.device("cpu"))


def test_a_gpu_older_than_nvrtc_supports_is_named() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    with pytest.raises(RuntimeError, match=r"not 3\.5"):
        runtime.compile_kernel(runtime.Kernel("probe.cu", "probe", ("float*",)), 35)


# --- Choice of backend


@pytest.mark.usefixtures("fresh_status")
class TestChoice:
    def test_on_the_cpu(self) -> None:
        x = torch.zeros(3)
        assert runtime.choose_backend("auto", x) == "torch"
        assert runtime.choose_backend("torch", x) == "torch"
        with pytest.raises(
            InputError, match=r"^backend 'cupy' cannot run: the CUDA kernels need a CUDA device, .*cpu;"
        ):
            runtime.choose_backend("cupy", x)

    def test_unknown_name(self) -> None:
        with pytest.raises(InputError, match="must be auto, cupy or torch, got 'triton'"):
            runtime.choose_backend("triton", torch.zeros(3))

    def test_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_cuda(monkeypatch, "12.8")
        monkeypatch.setattr(runtime, "cupy_installed", lambda: False)
        x = SimpleNamespace(device=CUDA, dtype=torch.float32)
        assert runtime.choose_backend("auto", x) == "torch"
        with pytest.raises(InputError, match="CuPy is not installed; pip install cupy-cuda12x, or use"):
            runtime.choose_backend("cupy", x)

    def test_dtypes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "cupy_status", lambda device: runtime.CupyStatus(True, "CuPy works"))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert runtime.choose_backend("auto", SimpleNamespace(device=CUDA, dtype=dtype)) == "cupy"
        double = SimpleNamespace(device=CUDA, dtype=torch.float64)
        assert runtime.choose_backend("auto", double) == "torch"
        with pytest.raises(InputError, match=r"the tensor is torch\.float64; use backend='auto' or 'torch'"):
            runtime.choose_backend("cupy", double)

    def test_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "gac"):
            for _ in range(3):
                runtime.choose_backend("auto", torch.zeros(3))
        (record,) = caplog.records
        assert record.name == "gac"
        assert record.getMessage() == (
            "LIF backend on cpu: torch (the CUDA kernels need a CUDA device, the tensor is on cpu)"
        )

    @pytest.mark.gpu
    def test_on_a_gpu(self) -> None:
        assert runtime.choose_backend("auto", torch.zeros(3, device="cuda")) == "cupy"
