"""The doctor reports on this installation, and distinguishes broken from missing."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from gac import doctor
from gac.ops import backend, c_kernels, event_conv
from gac.ops.catalogue import Layer
from gac.ops.cuda import compiler
from gac.ops.cuda.compiler import ELEMENTS


def test_this_installation_is_healthy() -> None:
    result = subprocess.run([sys.executable, "-m", "gac.doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"torch {torch.__version__}" in result.stdout
    assert "cpu: neurons run in " in result.stdout
    assert "FAIL" not in result.stdout
    if not torch.cuda.is_available():
        assert "no CUDA device" in result.stdout
    if backend.cupy_installed():
        assert "NVRTC compiles 11 kernels" in result.stdout


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_status:
        doctor.main(["--help"])
    assert exit_status.value.code == 0
    assert "Exit status 0: what is installed works" in capsys.readouterr().out


def run_sections(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *names: str) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "SECTIONS", {name: doctor.SECTIONS[name] for name in names})
    code, (output, errors) = doctor.main([]), capsys.readouterr()
    assert errors == ("error: something installed is broken: see FAIL above\n" if code else "")
    return code, output


def test_missing_cupy_is_not_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    status = backend.Status(False, "CuPy is not installed", "pip install cupy-cuda13x")
    monkeypatch.setattr(backend, "toolchain_status", lambda: status)
    monkeypatch.setattr(backend, "cupy_installed", lambda: False)
    code, output = run_sections(monkeypatch, capsys, "CUDA kernels")
    assert code == 0
    assert "CuPy is not installed; to get the CUDA kernels: pip install cupy-cuda13x" in output


def test_unusable_cupy_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    status = backend.Status(False, "CuPy cannot load NVRTC: no file", "pip install nvidia-cuda-nvrtc")
    monkeypatch.setattr(backend, "toolchain_status", lambda: status)
    monkeypatch.setattr(backend, "cupy_installed", lambda: True)
    code, output = run_sections(monkeypatch, capsys, "CUDA kernels")
    assert code == 1
    assert "FAIL CuPy cannot load NVRTC: no file; to get the CUDA kernels: pip install nvidia-cuda-nvrtc" in output


IN_C = "C kernels on the CPU"


@pytest.mark.c_compiler
def test_c_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    code, output = run_sections(monkeypatch, capsys, IN_C)
    assert code == 0
    assert "code by " in output
    assert "(allowed 2e-06)" in output
    exact = event_conv.reference
    monkeypatch.setattr(event_conv, "reference", lambda *arguments: 1.001 * exact(*arguments))
    code, output = run_sections(monkeypatch, capsys, IN_C)
    assert code == 1
    assert "FAIL" in output


def test_no_c_compiler_is_not_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    status = c_kernels.Status(False, "there is no C compiler (cc, gcc, clang): install gcc")
    monkeypatch.setattr(c_kernels, "status", lambda: status)
    code, output = run_sections(monkeypatch, capsys, IN_C)
    assert code == 0
    assert "none, so torch runs: there is no C compiler (cc, gcc, clang): install gcc" in output


def test_kernels_that_do_not_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    monkeypatch.setattr(compiler, "source_text", lambda file: "not CUDA")
    code, output = run_sections(monkeypatch, capsys, "CUDA kernels", "Devices")
    assert code == 1
    assert "FAIL RuntimeError: lif_forward<" in output
    assert "cpu: neurons run in " in output


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("preset", doctor.PRESETS)
@pytest.mark.parametrize("operation", doctor.CHECKED)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_comparison_accepts_the_kernels(operation: str, preset: str, dtype: torch.dtype) -> None:
    check = doctor.compare(operation, preset, dtype, torch.device("cpu"))
    assert check.ok, check.text
    assert "outputs differ" in check.text


@pytest.mark.parametrize("operation", doctor.CHECKED)
@pytest.mark.parametrize("factor", [1.0, 1.0 + 1e-3])
@pytest.mark.usefixtures("kernels_on_cpu")
def test_comparison_finds_wrong_outputs_and_gradients(
    operation: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = doctor.OPERATIONS[operation]

    def wrong(layer: Layer, function: Callable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *others, last = right.call(layer, function, *inputs)
        if layer.kernels:
            changed = torch.cat([1 - last[:1], last[1:]])
            last = changed if factor == 1.0 else last + (factor - 1.0) * (last - last.detach())
        return *others, last

    monkeypatch.setitem(doctor.OPERATIONS, operation, right._replace(call=wrong))
    check = doctor.compare(operation, "cifar", torch.float32, torch.device("cpu"))
    assert not check.ok
    assert (" 0 of " in check.text) == (factor != 1.0)


def test_another_accelerator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert "mps: neurons run in torch, which has not been tried there" in [check.text for check in doctor.backends()]


def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--gpu"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --gpu; --help lists all options\n"
