"""Whether the CUDA kernels can run, and the choice of backend; without a GPU, except where marked."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gac.errors import InputError
from gac.ops import backend, c_kernels
from gac.ops.cuda import launch

CUDA = torch.device("cuda", 0)


@pytest.fixture
def fresh_status() -> Iterator[None]:
    """Forget what was found out about CuPy, before and after."""
    caches = (backend.toolchain_status, backend.cupy_status, backend._log_choice)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


# --- Status of CuPy: what is missing is played, the rest is the real installation


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, version: str = "13.0") -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("fresh_status")
class TestStatus:
    def test_cpu(self) -> None:
        status = backend.cupy_status(torch.device("cpu"))
        assert not status.ok
        assert "need a CUDA device" in status.reason

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_device(self) -> None:
        pytest.importorskip("cupy", reason="CuPy is not installed")
        assert backend.toolchain_status().ok
        assert backend.cupy_status(CUDA) == backend.Status(
            False, "torch finds no CUDA device", "check the GPU and its driver with nvidia-smi"
        )

    def test_torch_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "built without CUDA" in backend.cupy_status(CUDA).reason

    @pytest.mark.parametrize("version", ["12.8", "13.0"])
    def test_cupy_missing(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_cuda(monkeypatch, version)
        monkeypatch.setattr(backend, "cupy_installed", lambda: False)
        assert backend.cupy_status(CUDA) == backend.Status(
            False, "CuPy is not installed", f"pip install cupy-cuda{version[:2]}x"
        )

    @pytest.mark.parametrize("kind", ["ImportError", "AttributeError"])
    def test_cupy_broken(self, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        pretend_cuda(monkeypatch)
        (tmp_path / "cupy.py").write_text(f"raise {kind}('\\n=====\\nFailed to import CuPy.\\nBecause.')")
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.split(".")[0] == "cupy"]:
            monkeypatch.delitem(sys.modules, name)
        assert backend.cupy_status(CUDA).reason == "CuPy cannot be imported: Failed to import CuPy."

    def test_cupy_for_another_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        driver = pytest.importorskip("cupy", reason="CuPy is not installed").cuda.driver
        ours = driver.get_build_version() // 1000
        pretend_cuda(monkeypatch, f"{ours - 1}.1")
        status = backend.cupy_status(CUDA)
        assert f"is built for CUDA {ours}, torch for CUDA {ours - 1}" in status.reason
        assert status.hint == f"pip uninstall cupy-cuda{ours}x && pip install cupy-cuda{ours - 1}x"

    def test_nvrtc_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = pytest.importorskip("cupy", reason="CuPy is not installed").cuda

        def missing() -> None:
            raise RuntimeError("Failure finding libnvrtc.so\nSearched everywhere")

        pretend_cuda(monkeypatch)
        monkeypatch.setattr(cuda, "nvrtc", SimpleNamespace(getVersion=missing))
        assert backend.cupy_status(CUDA) == backend.Status(
            False, "CuPy cannot load NVRTC: Failure finding libnvrtc.so", "pip install nvidia-cuda-nvrtc"
        )

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("cupy", reason="CuPy is not installed")
        pretend_cuda(monkeypatch, torch.version.cuda)
        assert backend.cupy_status(CUDA).reason == "CuPy cannot use the CUDA driver"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_kernels_do_not_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = pytest.importorskip("cupy", reason="CuPy is not installed").cuda
        pretend_cuda(monkeypatch, torch.version.cuda)
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        # torch itself then fails to make a tensor there, as it does with a broken driver.
        status = backend.cupy_status(CUDA)
        assert not status.ok
        assert status.reason.startswith("a kernel does not run on cuda")
        assert "gac.doctor" in status.hint

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_memory_says_nothing_of_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(device: torch.device) -> None:
            raise torch.OutOfMemoryError

        cuda = pytest.importorskip("cupy", reason="CuPy is not installed").cuda
        pretend_cuda(monkeypatch, torch.version.cuda)
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(backend, "probe", fails)
        with pytest.raises(torch.OutOfMemoryError):
            backend.cupy_status(CUDA)
        # Asked again, it is tried again.
        monkeypatch.setattr(backend, "probe", lambda device: None)
        assert backend.cupy_status(CUDA).ok


def test_the_probe_runs_where_kernels_do(kernels_on_cpu: object, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.probe(torch.device("cpu"))
    monkeypatch.setattr(launch, "launch", lambda *_: None)
    with pytest.raises(RuntimeError, match="left no result"):
        backend.probe(torch.device("cpu"))


# --- Choice of backend


@pytest.mark.usefixtures("fresh_status")
class TestChoice:
    @pytest.mark.c_compiler
    def test_on_the_cpu(self) -> None:
        x = torch.zeros(3)
        assert backend.choose_backend("auto", x) == "c"
        assert backend.choose_backend("c", x) == "c"
        assert backend.choose_backend("torch", x) == "torch"
        assert backend.choose_backend("auto", x.double()) == "torch"
        with pytest.raises(InputError, match=r"^backend 'c' cannot run: the C kernels take torch\.float32,"):
            backend.choose_backend("c", x.double())
        with pytest.raises(
            InputError, match=r"^backend 'cupy' cannot run: the CUDA kernels need a CUDA device, .*cpu;"
        ):
            backend.choose_backend("cupy", x)

    def test_unknown_name(self) -> None:
        with pytest.raises(InputError, match="must be auto, cupy, c or torch, got 'triton'"):
            backend.choose_backend("triton", torch.zeros(3))

    def test_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pretend_cuda(monkeypatch, "12.8")
        monkeypatch.setattr(backend, "cupy_installed", lambda: False)
        x = SimpleNamespace(device=CUDA, dtype=torch.float32)
        assert backend.choose_backend("auto", x) == "torch"
        with pytest.raises(InputError, match="CuPy is not installed; pip install cupy-cuda12x, or use"):
            backend.choose_backend("cupy", x)

    def test_dtypes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "cupy_status", lambda device: backend.Status(True, "CuPy works"))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert backend.choose_backend("auto", SimpleNamespace(device=CUDA, dtype=dtype)) == "cupy"
        double = SimpleNamespace(device=CUDA, dtype=torch.float64)
        assert backend.choose_backend("auto", double) == "torch"
        with pytest.raises(InputError, match=r"the tensor is torch\.float64; use backend='auto' or 'torch'"):
            backend.choose_backend("cupy", double)

    @pytest.mark.c_compiler
    def test_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "gac"):
            for _ in range(3):
                backend.choose_backend("auto", torch.zeros(3))
        (record,) = caplog.records
        assert record.name == "gac"
        assert record.getMessage() == f"LIF backend on cpu: c ({c_kernels.status().reason})"

    def test_the_c_kernels_need_the_cpu(self) -> None:
        with pytest.raises(InputError, match="the C kernels need the CPU, the tensor is on cuda; use backend='auto'"):
            backend.choose_backend("c", SimpleNamespace(device=CUDA, dtype=torch.float32))

    def test_without_a_compiler_torch_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(c_kernels, "status", lambda: backend.Status(False, "there is no C compiler: install gcc"))
        assert backend.choose_backend("auto", torch.zeros(3)) == "torch"
        with pytest.raises(InputError, match="backend 'c' cannot run: there is no C compiler: install gcc; use"):
            backend.choose_backend("c", torch.zeros(3))

    def test_a_gpu_without_the_kernels_is_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        pretend_cuda(monkeypatch)
        monkeypatch.setattr(backend, "cupy_installed", lambda: False)
        with caplog.at_level(logging.INFO, "gac"):
            for _ in range(3):
                backend.choose_backend("auto", SimpleNamespace(device=CUDA, dtype=torch.float32))
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        text = "LIF backend on cuda: torch (CuPy is not installed); pip install cupy-cuda13x"
        assert record.getMessage() == text

    @pytest.mark.parametrize(
        ("x", "unsupported", "reason"),
        [
            (SimpleNamespace(device=CUDA, dtype=torch.float64), None, "the CUDA kernels take torch.float32, "),
            (SimpleNamespace(device=CUDA, dtype=torch.float32), "the LIF kernels need a surrogate", "the LIF kernels "),
        ],
        ids=["dtype", "surrogate"],
    )
    def test_what_the_kernels_do_not_have_is_a_warning_too(
        self,
        x: SimpleNamespace,
        unsupported: str | None,
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(backend, "cupy_status", lambda device: backend.Status(True, "CuPy works"))
        with caplog.at_level(logging.INFO, "gac"):
            for _ in range(3):
                assert backend.choose_backend("auto", x, unsupported) == "torch"
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"LIF backend on cuda: torch ({reason}")
        assert backend.explain_backend("auto", x, unsupported)[1].startswith(reason)

    def test_torch_on_a_gpu_is_no_warning_if_it_was_asked_for(self, caplog: pytest.LogCaptureFixture) -> None:
        x = SimpleNamespace(device=CUDA, dtype=torch.float32)
        with caplog.at_level(logging.INFO, "gac"):
            assert backend.choose_backend("torch", x) == "torch"
        assert [(each.levelno, each.getMessage()) for each in caplog.records] == [
            (logging.INFO, "LIF backend on cuda: torch (as asked for)")
        ]
        assert backend.explain_backend("torch", x) == ("torch", "as asked for")

    def test_an_explanation_has_the_remedy_and_is_not_logged(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        pretend_cuda(monkeypatch)
        monkeypatch.setattr(backend, "cupy_installed", lambda: False)
        with caplog.at_level(logging.INFO, "gac"):
            found = backend.explain_backend("auto", SimpleNamespace(device=CUDA, dtype=torch.float32))
        assert found == ("torch", "CuPy is not installed; pip install cupy-cuda13x")
        assert not caplog.records

    def test_no_memory_is_raised_by_the_choice_and_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(device: torch.device) -> None:
            raise torch.OutOfMemoryError

        x = SimpleNamespace(device=CUDA, dtype=torch.float32)
        monkeypatch.setattr(backend, "toolchain_status", lambda: backend.Status(True, "CuPy works"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
        monkeypatch.setattr(backend, "probe", fails)
        for requested in ("auto", "cupy"):
            with pytest.raises(torch.OutOfMemoryError):
                backend.choose_backend(requested, x)
        monkeypatch.setattr(backend, "probe", lambda device: None)
        assert backend.choose_backend("auto", x) == "cupy"

    @pytest.mark.gpu
    def test_on_a_gpu(self) -> None:
        assert backend.choose_backend("auto", torch.zeros(3, device="cuda")) == "cupy"
