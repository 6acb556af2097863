"""Launches through CuPy's own code, on a driver that runs kernels on the CPU; test_stand_in_driver.py starts this.

Results are compared to the bit with launches past CuPy, which the other tests compare with the references.
"""

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cuda_on_cpu import stand_in_driver
from cuda_on_cpu.launcher import KernelsOnCpu, parameters
from cuda_on_cpu.stand_in_driver import BLOCKS, CAPABILITIES, MULTIPROCESSORS, StandInDriver
from gac.ops import backend, batch_norm, lif
from gac.ops.cuda import compiler, launch
from gac.ops.cuda.compiler import KERNEL_FOLDER, Kernel
from ops import fused
from ops.test_fused_operators import leaves_of_network, run_network
from ops.test_lif import make_input, run

stand_in_driver.replace_context()

PROBE = Kernel("probe.cu", "probe", ("float*",))


@pytest.fixture(scope="session")
def compiled_kernels() -> KernelsOnCpu:
    """The kernels' builds of the session that started this process."""
    return KernelsOnCpu(Path(os.environ["GAC_TEST_KERNELS"]))


@pytest.fixture
def driver(kernels_on_cpu: KernelsOnCpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInDriver]:
    """A driver that has loaded nothing; operators on the CPU ask it for occupancy, and launch past it at first."""
    driver = StandInDriver(kernels_on_cpu, monkeypatch)
    monkeypatch.setattr(
        launch,
        "resident_blocks",
        lambda kernel, threads, device, most=None: launch._resident_blocks(kernel, threads, driver.device.index, most),
    )
    yield driver
    for cache in (launch._loaded_function, launch._resident_blocks, backend.cupy_status):
        cache.cache_clear()


def names_of_kernels() -> set[str]:
    sources = "".join(path.read_text() for path in KERNEL_FOLDER.glob("*.cu"))
    return set(re.findall(r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(", sources))


def every_operator() -> list[torch.Tensor]:
    running = torch.zeros(8), torch.ones(8)
    x = make_input((6, 2, 8, 4, 4), torch.float16, "channels_last", "cpu")
    answer = torch.zeros(1)
    launch.launch(PROBE, (1,), (1,), (answer,))
    return [
        *run_network(leaves_of_network("cpu"), running=running),
        *running,
        batch_norm.batch_moments(x),
        *run(lif.lif, x, 0.25, fused.CIFAR, with_grad_v=False),
        *run(lif.lif, x, x[0].float(), fused.CIFAR, with_grad_v=True),
        answer,
    ]


def test_every_kernel(driver: StandInDriver) -> None:
    expected = every_operator()
    launch.set_cpu_launcher(driver)
    results = every_operator()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    kernels = [kernel for kernel, _ in driver.launched]
    assert {kernel.instance.split("<")[0] for kernel in kernels} == names_of_kernels()
    # Nullable pointers are passed as null and as not null, and there are numbers of every type and structs.
    passed = []
    for kernel, packed in driver.launched:
        passed += zip(kernel.parameters, parameters(kernel, packed), strict=True)
    assert {any(value) for declared, value in passed if declared.endswith("?")} == {False, True}
    assert {"float", "int", "long long", "LIF", "Norm", "Norm?"} <= {declared for declared, _ in passed}


def test_every_device_gets_its_own_binary(driver: StandInDriver) -> None:
    x = make_input((6, 2, 8, 4, 4), torch.float16, "channels_last", "cpu")
    expected = lif.lif(x, 0.25, fused.CIFAR)
    launch.set_cpu_launcher(driver)
    for index in (0, 1, 2, 0):
        driver.device = torch.device("cuda", index)
        results = lif.lif(x, 0.25, fused.CIFAR)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert len(driver.launched) == 4


def test_a_binary_for_another_device_is_refused(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    launch.set_cpu_launcher(driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: CAPABILITIES[1])
    with pytest.raises(RuntimeError, match="CUDA_ERROR_NO_BINARY_FOR_GPU: this is no cubin for sm_90"):
        backend.probe(torch.device("cpu"))


def test_binaries_that_no_cache_has_kept(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAC_KERNEL_CACHE", "")
    launch.set_cpu_launcher(driver)
    for index in range(len(CAPABILITIES)):
        driver.device = torch.device("cuda", index)
        backend.probe(torch.device("cpu"))
    assert [kernel for kernel, _ in driver.launched] == [PROBE] * len(CAPABILITIES)


def test_occupancy(driver: StandInDriver) -> None:
    kernel = lif.forward_kernel(torch.float16, 6, 8, "Reset::hard, true")
    driver.device = torch.device("cuda", 1)
    for most, blocks in ((None, BLOCKS), (BLOCKS - 1, BLOCKS - 1), (BLOCKS + 1, BLOCKS)):
        assert launch._resident_blocks(kernel, 96, 1, most) == blocks * MULTIPROCESSORS
        assert driver.occupancy_asked == (driver.mangled_name(kernel), 96, 0)


def test_every_thread_has_a_context_of_each_device(driver: StandInDriver) -> None:
    launch.set_cpu_launcher(driver)

    def launch_on_both() -> None:
        for index in (0, 1, 0):
            driver.device = torch.device("cuda", index)
            backend.probe(torch.device("cpu"))

    launch_on_both()
    thread = threading.Thread(target=launch_on_both)
    thread.start()
    thread.join()
    here = threading.get_ident()
    assert len(driver.launched) == 6
    assert [(thread == here, index) for thread, index in driver.contexts] == [
        (True, 0),
        (True, 1),
        (False, 0),
        (False, 1),
    ]


def test_a_kernel_that_is_not_there(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    binary, name = compiler.compile_once(PROBE, 90)
    launch.set_cpu_launcher(driver)
    monkeypatch.setattr(compiler, "compile_once", lambda *_: (binary, f"{name}x"))
    with pytest.raises(RuntimeError, match=f"CUDA_ERROR_NOT_FOUND: the module has no kernel {name}x"):
        backend.probe(torch.device("cpu"))


@pytest.fixture
def found(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> StandInDriver:
    """A driver whose GPUs torch and CuPy have found; torch.zeros puts tensors for them on the CPU."""
    import cupy

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cupy.cuda, "is_available", lambda: True)
    launch.set_cpu_launcher(driver)
    return driver


def test_a_device_that_runs_kernels(found: StandInDriver) -> None:
    status = backend.cupy_status(found.device)
    assert status.ok
    assert status == backend.toolchain_status()
    assert [kernel for kernel, _ in found.launched] == [PROBE]


def test_a_device_that_does_not(found: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: CAPABILITIES[1])
    assert not backend.cupy_status(found.device).ok
    assert backend.cupy_status(found.device).reason == (
        "a kernel does not run on cuda:0: CUDA_ERROR_NO_BINARY_FOR_GPU: this is no cubin for sm_90"
    )
    assert found.launched == []
