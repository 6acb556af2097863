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


def test_compiler_errors_show_the_log() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    kernel = Kernel("lif.cu", "lif_forward<double, 1, true, 1, Reset::sideways>", ())
    with pytest.raises(RuntimeError, match=r"(?s)does not compile \(-arch=sm_90\).*sideways"):
        compiler.compile_kernel(kernel, 90)


def test_gpus_newer_than_nvrtc_get_ptx() -> None:
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC").cuda.nvrtc
    newest = max(nvrtc.getSupportedArchs())
    kernel = lif.forward_kernel(torch.float32, 4, 4, "Reset::hard")
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
