"""The doctor reports on this installation, and tells broken from missing."""

import subprocess
import sys

import pytest
import torch

from gac import doctor
from gac.ops import lif, runtime


def test_this_installation_is_healthy() -> None:
    result = subprocess.run([sys.executable, "-m", "gac.doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"torch {torch.__version__}" in result.stdout
    assert "cpu: neurons run in torch" in result.stdout
    assert "FAIL" not in result.stdout
    if not torch.cuda.is_available():
        assert "no CUDA device" in result.stdout
    if runtime.cupy_installed():
        assert "NVRTC compiles 12 LIF kernels" in result.stdout


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_status:
        doctor.main(["--help"])
    assert exit_status.value.code == 0
    assert "Exit status 0: what is installed works" in capsys.readouterr().out


def run_sections(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *names: str) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "SECTIONS", {name: doctor.SECTIONS[name] for name in names})
    return doctor.main([]), capsys.readouterr().out


def test_missing_cupy_is_not_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    status = runtime.CupyStatus(False, "CuPy is not installed", "pip install cupy-cuda13x")
    monkeypatch.setattr(runtime, "toolchain_status", lambda: status)
    monkeypatch.setattr(runtime, "cupy_installed", lambda: False)
    code, output = run_sections(monkeypatch, capsys, "CUDA kernels")
    assert code == 0
    assert "CuPy is not installed; to get the CUDA kernels: pip install cupy-cuda13x" in output


def test_unusable_cupy_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    status = runtime.CupyStatus(False, "CuPy cannot load NVRTC: no file", "pip install nvidia-cuda-nvrtc")
    monkeypatch.setattr(runtime, "toolchain_status", lambda: status)
    monkeypatch.setattr(runtime, "cupy_installed", lambda: True)
    code, output = run_sections(monkeypatch, capsys, "CUDA kernels")
    assert code == 1
    assert "FAIL CuPy cannot load NVRTC: no file; to get the CUDA kernels: pip install nvidia-cuda-nvrtc" in output


def test_kernels_that_do_not_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    monkeypatch.setattr(runtime, "source_text", lambda file: "not CUDA")
    code, output = run_sections(monkeypatch, capsys, "CUDA kernels", "Devices")
    assert code == 1
    assert "FAIL RuntimeError: lif_forward<" in output
    assert "cpu: neurons run in torch" in output


@pytest.mark.parametrize("dtype", runtime.KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("preset", doctor.NEURONS)
@pytest.mark.usefixtures("kernels_on_cpu")
def test_comparison_accepts_the_kernels(preset: str, dtype: torch.dtype) -> None:
    check = doctor.compare(preset, doctor.NEURONS[preset], dtype, torch.device("cpu"))
    assert check.ok, check.text
    assert "0 of 196608 spikes differ" in check.text


def test_comparison_finds_wrong_spikes_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_spikes(x_seq, v, parameters, surrogate_function):
        spikes, v = lif.reference(x_seq, v, parameters, surrogate_function)
        return torch.cat([1 - spikes[:1], spikes[1:]]), v

    def wrong_gradient(x_seq, v, parameters, surrogate_function):
        spikes, v = lif.reference(x_seq, v, parameters, surrogate_function)
        return spikes + 0.001 * (x_seq - x_seq.detach()), v

    for wrong in (wrong_spikes, wrong_gradient):
        monkeypatch.setattr(lif, "lif", wrong)
        assert not doctor.compare("cifar", doctor.NEURONS["cifar"], torch.float32, torch.device("cpu")).ok
