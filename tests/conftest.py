"""Fixtures that several test files share."""

import os
import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from cuda_on_cpu.launcher import KernelsOnCpu
from devices import KERNELS
from gac.ops import backend, c_compiler
from gac.ops.cuda import launch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run PyTorch in one thread: for work this small, distributing it takes longer than doing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelsOnCpu:
    """The CUDA kernels compiled by g++, each once per session, by whichever of pytest-xdist's processes is first."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed; it compiles the CUDA kernels for the CPU")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "kernels").mkdir(exist_ok=True)
    return KernelsOnCpu(folder / "kernels", sanitize="GAC_TEST_SANITIZE" in os.environ)


@pytest.fixture
def kernels_on_cpu(compiled_kernels: KernelsOnCpu, uninitialised_memory_is_nan: None) -> Iterator[KernelsOnCpu]:
    """Let the CUDA kernels run on CPU tensors."""
    compiled_kernels.order = "shuffled"
    launch.set_cpu_launcher(compiled_kernels)
    yield compiled_kernels
    launch.set_cpu_launcher(None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked gpu without a CUDA device or CuPy; with both, a kernel that does not run fails them.

    Likewise those marked c_compiler or c_kernels without a compiler; a source that does not compile fails them.
    """
    if item.get_closest_marker("c_compiler") is not None or item.get_closest_marker("c_kernels") is not None:
        try:
            c_compiler.find_compiler()
        except c_compiler.NotCompiled as error:
            pytest.skip(str(error))
    if item.get_closest_marker("gpu") is not None:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not backend.cupy_installed():
            pytest.skip("CuPy is not installed")
    if item.get_closest_marker("several_gpus") is not None and torch.cuda.device_count() < 2:
        pytest.skip("no second CUDA device")


@pytest.fixture(autouse=True)
def repeatable_convolutions() -> Iterator[None]:
    """Let a GPU's convolutions be float32 and the same each time: TF32 rounds enough to decide spikes."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Let memory that torch.empty returns be NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=KERNELS)
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run: see ``KERNELS``."""
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("kernels_on_cpu" if request.param == "cpu" else "uninitialised_memory_is_nan")
    return "cpu"


@pytest.fixture
def half(request: pytest.FixtureRequest, device: str) -> str:
    """fp16, but fp32 for the C kernels."""
    return "fp32" if request.node.callspec.params["device"] == "c" else "fp16"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out half precision for the C kernels, which do not have it."""
    items[:] = [item for item in items if not _is_half_precision_in_c(item)]


def _is_half_precision_in_c(item: pytest.Item) -> bool:
    parameters = getattr(item, "callspec", SimpleNamespace(params={})).params
    values = str([str(value) for value in parameters.values()])
    return parameters.get("device") == "c" and any(name in values for name in ("fp16", "bf16", "float16"))


@pytest.fixture
def neurons_on_kernels(kernels_on_cpu: KernelsOnCpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let neurons choose the CUDA kernels for tensors on the CPU."""
    backend._log_choice.cache_clear()
    monkeypatch.setattr(backend, "cupy_status", lambda device: backend.Status(True, "compiled for the CPU"))
    yield
    backend._log_choice.cache_clear()
