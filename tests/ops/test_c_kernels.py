"""The C versions of the fused operations' kernels; what they compute is tested with the CUDA ones (fixture device)."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cuda_on_cpu.launcher import run_under_sanitizers
from gac.errors import InputError
from gac.ops import c_compiler, c_kernels, lif, norm_lif
from gac.ops.kernel_source import KERNEL_FOLDER
from ops import fused
from ops.c_libraries import TARGETS, forget_kernels, run_under_thread_sanitizer, sanitize_if_asked, use_target
from ops.fused import NEURONS
from ops.fused_network import leaves_of_network, run_network

pytestmark = pytest.mark.c_compiler


@pytest.fixture(autouse=True)
def fresh_libraries(monkeypatch: pytest.MonkeyPatch, uninitialised_memory_is_nan: None) -> Iterator[None]:
    """Compile the kernels as each test wants them."""
    sanitize_if_asked(monkeypatch)
    yield
    forget_kernels()


def results(neuron: str = "cifar", C: int = 8) -> list[torch.Tensor]:
    """Return what a network of all operations gives, on more rows than there are blocks, and the neuron alone."""
    network = run_network(leaves_of_network("cpu", B=7, C=C), neuron=NEURONS[neuron])
    x, v = torch.randn(21, 700, generator=torch.Generator().manual_seed(0)), torch.full((700,), 0.3)
    alone, gradients = fused.run(
        lambda x, v: lif.lif(x, v, NEURONS[neuron]), [x, v], [torch.ones_like(x), torch.ones_like(v)]
    )
    fused.assert_has_spikes_and_silence(network[0])
    return [*network, *alone, *gradients]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.c_kernels
def test_every_cuda_kernel_has_a_c_version() -> None:
    declaration = re.compile(r"__global__ void (?:__launch_bounds__\([^()]*\) )?(\w+)\(")
    names = {name for path in KERNEL_FOLDER.glob("*.cu") for name in declaration.findall(path.read_text())}
    library = c_compiler.load_library("fused.c").functions
    assert {name for name in names if not hasattr(library, name)} == {"probe"}


@pytest.mark.c_kernels
def test_threads_do_not_change_a_bit() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert_same(each, found[0])


@pytest.mark.parametrize("target", ["AVX", "baseline"])
@pytest.mark.parametrize("neuron", NEURONS)
def test_vectors_do_not_change_a_bit(neuron: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = results(neuron)
    use_target(target, monkeypatch)
    assert_same(results(neuron), expected)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_compilers_do_not_change_a_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    expected = [results(neuron) for neuron in NEURONS]
    monkeypatch.setenv("CC", name)
    monkeypatch.setattr(c_compiler, "_loaded", {})
    forget_kernels()
    assert c_kernels.status().ok, c_kernels.status().reason
    for neuron, wanted in zip(NEURONS, expected, strict=True):
        assert_same(results(neuron), wanted)


@pytest.mark.parametrize("C", [3, 520])
@pytest.mark.parametrize("target", TARGETS)
def test_all_accesses_are_in_bounds(target: str, C: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_target(target, monkeypatch)
    assert all(result.isfinite().all() for result in results(C=C))


@pytest.mark.skipif("GAC_TEST_SANITIZE" in os.environ, reason="runs under the sanitizers")
def test_kernels_under_sanitizers() -> None:
    output = run_under_sanitizers(__file__, "in_bounds")
    assert " passed" in output
    assert "failed" not in output


RACES = """
int main(void) {
    const int64_t rows = 300;
    const int32_t channels = 24;
    const Launch launch = {.team = {parallel, 4}, .blocks = 64, .quantities = 2, .steps = 3};
    float *y = calloc(3 * rows * channels, 4), *spikes = malloc(3 * rows * channels * 4);
    float *of_channels = calloc(channels, 4), *partials = malloc(64 * 2 * channels * 4);
    Norm norm = {of_channels, of_channels, of_channels, of_channels};
    LIF lif = {0.5f, 1.0f, 0.0f, 1.0f, 0.0f, 1.0f, 1.0f};
    norm_lif_forward(&launch, (void*[]){&y, &norm, &lif, &spikes, (void*)&rows, (void*)&channels});
    norm_lif_backward_sums(
        &launch, (void*[]){&spikes, &y, &norm, &lif, &partials, (void*)&rows, (void*)&channels});
    return 0;
}
"""


def test_the_thread_sanitizer_sees_races(tmp_path: Path) -> None:
    race = """
static int sum;
static void add(void* job) { sum++; }
int main(void) { parallel(add, 0, 4, 0); return 0; }
"""
    assert "data race" in run_under_thread_sanitizer(tmp_path, "fused.c", race)


def test_threads_do_not_race(tmp_path: Path) -> None:
    assert "data race" not in run_under_thread_sanitizer(tmp_path, "fused.c", RACES)


def test_other_dtypes_are_refused() -> None:
    y = torch.zeros(2, 1, 8, 2, 2).half()
    normalization = fused.fixed_statistics(y, torch.ones(8), torch.zeros(8))
    with pytest.raises(InputError, match="on the CPU the kernels take float32 tensors; use backend='torch'"):
        norm_lif.norm_lif(y, normalization, NEURONS["cifar"])


def test_without_a_compiler_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise c_compiler.NotCompiled("there is no C compiler: install gcc")

    monkeypatch.setattr(c_compiler, "load_library", missing)
    with pytest.raises(InputError, match="cannot run on the CPU: there is no C compiler: install gcc; or use backend"):
        lif.lif(torch.zeros(2, 3), 0.0, NEURONS["cifar"])
