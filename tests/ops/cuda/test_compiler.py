"""Kernel sources, and their compilation by NVRTC; without a GPU."""

import struct
from pathlib import Path

import pytest
import torch

from gac.ops import lif
from gac.ops.cuda import compiler
from gac.ops.cuda.compiler import KERNEL_FOLDER, Kernel


def test_headers_are_inlined_once_and_lines_keep_their_place(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text('#include "a.cuh"\n#include "b.cuh"\nint last;\n')
    (tmp_path / "a.cuh").write_text('#pragma once\n#include "b.cuh"\nint a;\n')
    (tmp_path / "b.cuh").write_text("#pragma once\nint b;\n")
    assert compiler.source_text("k.cu", (tmp_path,)).splitlines() == [
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
    for path in KERNEL_FOLDER.glob("*.cu*"):
        assert "#include <" not in path.read_text()
    assert "#include" not in compiler.source_text("lif.cu")


def test_signatures_are_read_from_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text("""
template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) first(
    const Element* __restrict__ x, const float* __restrict__ NULLABLE y, float* NULLABLE z,
    Element* spikes, long long rows,
    float scale, int channels) {}
__global__ void first_of_two(float* answer) {}
""")
    monkeypatch.setattr(compiler, "KERNEL_FOLDER", tmp_path)
    half = compiler.make_kernel("k.cu", "first", torch.float16, 4, True, "Reset::hard, false")
    assert half.instance == "first<Float16, 4, true, Reset::hard, false>"
    types = ("const Float16*", "const float*?", "float*?", "Float16*", "long long", "float", "int")
    assert half.parameters == types
    assert compiler.make_kernel("k.cu", "first", torch.float32, 1).parameters[0] == "const float*"
    assert compiler.make_kernel("k.cu", "first_of_two") == Kernel("k.cu", "first_of_two", ("float*",))


def test_one_and_true_are_different_arguments() -> None:
    instances = [compiler.make_kernel("lif.cu", "lif_forward", torch.float32, one).instance for one in (1, True)]
    assert instances == ["lif_forward<float, 1>", "lif_forward<float, true>"]


def test_compiler_errors_show_the_log() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    kernel = Kernel("lif.cu", "lif_forward<double, 1, true, 1, Reset::sideways, true>", ())
    with pytest.raises(RuntimeError, match=r"(?s)does not compile \(-arch=sm_90\).*sideways"):
        compiler.compile_kernel(kernel, 90)


def test_gpus_newer_than_nvrtc_get_ptx() -> None:
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC").cuda.nvrtc
    newest = max(nvrtc.getSupportedArchs())
    kernel = lif.forward_kernel(torch.float32, 4, 4, "Reset::hard, true")
    compiled = compiler.compile_kernel(kernel, newest + 1)
    assert f".target sm_{newest}".encode() in compiled.binary
    assert compiled.name.encode() in compiled.binary
    assert compiler.compile_kernel(kernel, 90).binary.startswith(b"\x7fELF")


def test_a_cubin_is_whole() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    binary = compiler.compile_kernel(Kernel("probe.cu", "probe", ("float*",)), 90).binary
    # In an ELF file one of two tables comes last.
    segments, sections, *_, segment_size, segment_count, section_size, section_count = struct.unpack_from(
        "<QQIHHHHH", binary, 32
    )
    assert len(binary) == max(segments + segment_size * segment_count, sections + section_size * section_count)


def test_a_gpu_older_than_nvrtc_supports_is_named() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    with pytest.raises(RuntimeError, match=r"not 3\.5"):
        compiler.compile_kernel(Kernel("probe.cu", "probe", ("float*",)), 35)
