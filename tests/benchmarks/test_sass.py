"""What a disassembler shows of the kernels, compiled for GPUs that are not here, is what benchmarks/sass.py states."""

import importlib.metadata
import shutil
from dataclasses import replace

import pytest
import torch

from benchmarks import sass
from benchmarks.sass import STATED, Code, Launched, bytes_in_flight, comparisons_in, figures, launched_kernels, losses
from gac.errors import InputError
from gac.ops import backend
from gac.ops.cuda import compiler

CHOSEN = [(80, 4, torch.bfloat16), (90, 6, torch.float16), (120, 4, torch.float16)]
OTHERS = [
    each
    for capability in sass.MULTIPROCESSORS
    for each in ((capability, T, dtype) for T in (4, 6) for dtype in (torch.float16, torch.bfloat16))
    if each not in CHOSEN
]


def skip_without_compiler(capability: int) -> None:
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC").cuda.nvrtc
    if capability not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not compile for compute capability {capability / 10}")


def test_every_kernel_is_stated():
    assert {launched.key for launched in launched_kernels(6, torch.float16)} == STATED.keys()


@pytest.fixture(autouse=True)
def _look_for_nvdisasm_again():
    sass.disassembler.cache_clear()
    yield
    sass.disassembler.cache_clear()


@pytest.mark.parametrize(
    ("capability", "T", "dtype"), [*CHOSEN, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)], ids=str
)
def test_no_kernel_has_lost_what_is_stated(capability, T, dtype):
    skip_without_compiler(capability)
    lost = {
        launched.kernel.instance: losses(launched, figures(launched.kernel, launched.threads, capability))
        for launched in launched_kernels(T, dtype)
    }
    assert {instance: lines for instance, lines in lost.items() if lines} == {}


# What is lost by each change of the sources, in the kernel that shows it.
CHANGES = {
    "one row at a time": (
        ("batch_statistics", "batch_moments_partials"),
        "constexpr int kMomentRowsInFlight = 8;",
        "constexpr int kMomentRowsInFlight = 1;",
        "bytes in flight",
    ),
    "narrow vectors": (
        ("lif", "lif_forward"),
        "kLimit = 16 / sizeof(Element)",
        "kLimit = 4 / sizeof(Element)",
        "accesses of [4",
    ),
    "too few registers": (
        ("norm_lif", "norm_lif_backward_input"),
        "__launch_bounds__(kThreads, 1)",
        "__launch_bounds__(kThreads, 16)",
        "accesses to local memory",
    ),
    "fused charge": (
        ("residual_lif_pool", "residual_lif_pool_backward_sums"),
        "kPlain ? __fadd_rn(leaked, x)",
        "kPlain ? decay * v + x",
        "depend on a fused multiply-add",
    ),
}


@pytest.mark.parametrize(("key", "old", "new", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_loss_is_found(key, old, new, expected, monkeypatch):
    skip_without_compiler(90)
    monkeypatch.setenv("GAC_KERNEL_CACHE", "")
    source = compiler.source_text

    def changed(file: str) -> str:
        assert old in source(file)
        return source(file).replace(old, new)

    monkeypatch.setattr(compiler, "source_text", changed)
    launched = next(each for each in launched_kernels(6, torch.float16) if each.key == key)
    found = figures.__wrapped__(launched.kernel, launched.threads, 90)
    assert any(expected in line for line in losses(launched, found))


def test_too_few_blocks_are_found():
    launched = launched_kernels(6, torch.float16)[0]
    stated = STATED[launched.key]
    found = sass.Figures(255, 2, stated.in_flight, frozenset(stated.accesses), 1, 1, 0, 1, 0)
    assert losses(launched, found) == [f"255 registers let 2 blocks run, not {stated.blocks}"]
    assert losses(launched, replace(found, blocks=stated.blocks)) == []
    assert losses(launched, replace(found, blocks=stated.blocks, comparisons=0)) == [
        "no comparison decides about a spike"
    ]


def code(*lines: str) -> Code:
    numbered = (line if line.startswith(".L") else f"        /*{i:04x}*/   {line} ;" for i, line in enumerate(lines))
    return Code.parse("\n".join(numbered))


def test_loads_are_in_flight_until_one_is_needed():
    loads = ["LDG.E.128 R4, [R2.64]", "@P0 LDG.E.64.CONSTANT R8, desc[UR4][R2.64+0x10]", "LDG.E.U16 R10, [R2.64]"]
    assert bytes_in_flight(loads) == 16 + 8 + 2
    assert bytes_in_flight([loads[0], "FADD R1, R7, R0", *loads[1:]]) == 16
    assert bytes_in_flight([loads[0], "FADD R1, R8, R0", *loads[1:]]) == 16 + 8 + 2


def test_the_longest_loop():
    loop = [".L_x_1:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_1)"]
    end = ["EXIT", ".L_x_9:", "BRA `(.L_x_9)"]
    assert code("MOV R1, R2", *loop, *end).longest_loop() == loop[1:]
    assert code("MOV R1, R2", *end).longest_loop() == ["MOV R1, R2", "EXIT", "BRA `(.L_x_9)"]


COMPARED = "FSETP.GT.AND P1, PT, R1, c[0x0][0x190], PT"


@pytest.mark.parametrize(
    ("lines", "fused"),
    [
        (["FMUL R1, R2, R3", COMPARED], 0),
        (["FFMA R1, R2, R3, R4", COMPARED], 1),
        (["FFMA R0, R2, R3, R4", "FADD R1, R0, R5", "FSET.BF.GT.AND R9, R1, UR13, PT"], 1),
        # Half of a pair, as sm_100 computes them.
        (["FFMA2 R0, R2.F32x2.HI_LO, R4.F32x2.HI_LO, R6.F32x2.HI_LO", COMPARED], 1),
        # A load, and a constant, which is written as a product of zeros.
        (["FFMA R1, R2, R3, R4", "LDG.E R1, [R2.64]", COMPARED], 0),
        (["HFMA2.MMA R1, -RZ, RZ, 1.875, 0", COMPARED], 0),
        (["HFMA2 R1, R2, R3, R4", COMPARED], 1),
        (["FFMA R1, R2, R3, R4", "@P0 FADD R1, R5, R6", COMPARED], 1),
        # On one of two ways only; and on a way that never leads there.
        (["@P0 BRA `(.L_x_1)", "FFMA R1, R2, R3, R4", ".L_x_1:", COMPARED], 1),
        (["@P0 BRA `(.L_x_1)", "FFMA R1, R2, R3, R4", "EXIT", ".L_x_1:", COMPARED], 0),
        # In the next iteration of a loop.
        ([".L_x_1:", COMPARED, "FFMA R1, R2, R3, R4", "@P0 BRA `(.L_x_1)"], 1),
    ],
)
def test_a_fused_multiply_add_is_followed_to_the_comparison(lines, fused):
    assert comparisons_in(code(*lines, "EXIT")) == (1, fused)


def test_a_test_for_nan_is_no_comparison():
    lines = ["FFMA R1, R2, R3, R4", "FSETP.GTU.FTZ.AND P1, PT, |R1|, +INF , PT", "FSETP.NEU.AND P1, PT, R1, R1, PT"]
    assert comparisons_in(code(*lines, "EXIT")) == (0, 0)


def test_command(monkeypatch, capsys):
    skip_without_compiler(90)
    kernels: list[Launched] = launched_kernels(6, torch.float16)[:2]
    monkeypatch.setattr(sass, "launched_kernels", lambda T, dtype: kernels)
    options = ["--capabilities", "90", "--time-steps", "6", "--dtype", "float16"]
    assert sass.main(options) == 0
    titles, rule, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert titles.count("|") == rule.count("|") == rows[0].count("|")
    assert [row.split(" | ")[1] for row in rows] == ["`lif_forward`", "`lif_backward`"]
    monkeypatch.setitem(STATED, kernels[0].key, STATED[kernels[0].key]._replace(in_flight=1024))
    assert sass.main(options) == 1
    assert "bytes in flight, not 1024" in capsys.readouterr().err


def test_what_is_missing_is_one_line(monkeypatch, capsys):
    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(
        backend, "toolchain_status", lambda: backend.Status(False, "CuPy is not installed", "install it")
    )
    assert sass.main([]) == 2
    assert capsys.readouterr().err == "error: the kernels cannot be compiled: CuPy is not installed; install it\n"
    monkeypatch.setattr(backend, "toolchain_status", lambda: backend.Status(True, "CuPy"))
    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sass.main([]) == 2
    assert capsys.readouterr().err == "error: nvdisasm is not installed; pip install nvidia-cuda-nvdisasm\n"


def test_ptx_is_not_taken_for_a_binary(monkeypatch):
    monkeypatch.setattr(compiler, "compile_once", lambda kernel, capability: (b"// PTX", "name"))
    with pytest.raises(InputError, match="this NVRTC makes no binaries for sm_120"):
        sass.disassemble(launched_kernels(6, torch.float16)[0].kernel, 120)
