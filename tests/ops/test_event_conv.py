"""Convolutions over spikes by events: float64 is the truth, F.conv2d the specification."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cuda_on_cpu.launcher import run_under_sanitizers
from gac.ops import c_compiler, c_kernels, event_conv, openmp
from gac.ops.event_conv import event_conv2d
from ops.c_libraries import (
    SANITIZERS,
    TARGETS,
    forget_kernels,
    run_under_thread_sanitizer,
    sanitize_if_asked,
    use_target,
)

# What -march=native is replaced by: the same source for other CPUs, of which this one can run what it has.
# N, C, H, W, K, kernel, stride, padding
CASES = {
    "block": (2, 128, 8, 8, 64, 3, 1, 1),
    "two of each": (2, 256, 5, 6, 128, 3, 1, 1),
    "tails": (2, 130, 7, 5, 100, 3, 1, 1),
    "few channels": (3, 5, 9, 6, 7, 3, 1, 1),
    "stride 2": (2, 20, 9, 8, 33, 3, 2, 1),
    "no padding": (2, 12, 7, 6, 24, 3, 1, 0),
    "shortcut": (2, 16, 8, 7, 40, 1, 2, 0),
    "1 x 1": (2, 150, 4, 4, 70, 1, 1, 0),
    "1 x 1 padded": (2, 9, 4, 5, 12, 1, 1, 1),
    "one pixel": (1, 1, 1, 1, 1, 3, 1, 1),
    "padding only": (2, 3, 1, 1, 4, 1, 2, 1),
    "wide": (1, 3, 2, 300, 9, 3, 1, 1),
    "5 x 5": (2, 6, 8, 8, 10, 5, 3, 2),
    "many pixels": (40, 2, 16, 16, 3, 3, 1, 1),
}
DEFAULT_DENSITY, DEFAULT_PAYS = event_conv.MAX_DENSITY, event_conv._pays
DEFAULT_GRADIENT_DENSITY = event_conv.MAX_GRADIENT_DENSITY
LAYOUTS = ("contiguous", "channels_last", "weight_channels_last", "strided")


pytestmark = pytest.mark.c_compiler


@pytest.fixture(autouse=True)
def by_events(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let events be used at any size and density, in memory that is poisoned before it is written."""
    sanitize_if_asked(monkeypatch)
    assert c_kernels.status().ok, c_kernels.status().reason
    monkeypatch.setattr(event_conv, "MAX_DENSITY", 1e6)
    monkeypatch.setattr(event_conv, "MAX_GRADIENT_DENSITY", 1e6)
    monkeypatch.setattr(event_conv, "_pays", lambda *_: True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
    forget_kernels()


@pytest.fixture
def no_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a dense convolution, or its weight gradient, runs in place of events."""
    monkeypatch.setattr(event_conv, "reference", lambda *_: pytest.fail("the dense convolution ran"))
    dense = event_conv._dense_gradients

    def only_of_the_input(*arguments) -> tuple:
        assert arguments[-1] == (True, False), "the dense weight gradient ran"
        return dense(*arguments)

    monkeypatch.setattr(event_conv, "_dense_gradients", only_of_the_input)


def make(case: str, density: float = 0.3, layout: str = "contiguous") -> tuple[Tensor, Tensor, int, int]:
    N, C, H, W, K, kernel, stride, padding = CASES[case]
    torch.manual_seed(0)
    spikes, weight = (torch.rand(N, C, H, W) < density).float(), torch.randn(K, C, kernel, kernel)
    if layout in ("channels_last", "weight_channels_last"):
        weight = weight.to(memory_format=torch.channels_last)
    if layout == "channels_last":
        spikes = spikes.to(memory_format=torch.channels_last)
    if layout == "strided":
        spikes, weight = (
            torch.stack([spikes, spikes + 7], dim=-1)[..., 0],
            weight.transpose(0, 1).clone().transpose(0, 1),
        )
    return spikes, weight, stride, padding


def run(function, spikes: Tensor, weight: Tensor, *sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, input gradient and weight gradient for a fixed gradient of the output."""
    spikes, weight = spikes.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(spikes, weight, *sizes)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, (spikes, weight), gradient)


def assert_exact_but_for_summation(spikes: Tensor, weight: Tensor, stride: int, padding: int) -> None:
    """Compare with float64: the error is at most terms * 2**-24 * the sum of the terms' absolute values."""

    def convolution(spikes: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(spikes, weight, stride=stride, padding=padding)

    out, grad_spikes, grad_weight = run(event_conv2d, spikes, weight, stride, padding)
    exact = run(convolution, spikes.double(), weight.double())
    ones = torch.ones_like(weight, dtype=torch.float64)
    terms, sums = convolution(spikes.double(), ones), convolution(spikes.double(), weight.double().abs())
    assert ((out - exact[0]).abs() <= terms * 2.0**-24 * sums).all()

    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    leaf = ones.clone().requires_grad_()
    (terms,) = torch.autograd.grad(convolution(spikes.double(), leaf), leaf, torch.ones_like(gradient))
    (sums,) = torch.autograd.grad(convolution(spikes.double(), leaf), leaf, gradient.abs())
    assert ((grad_weight - exact[2]).abs() <= terms * 2.0**-24 * sums).all()
    torch.testing.assert_close(grad_spikes, exact[1].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("no_dense")
@pytest.mark.c_kernels
def test_equals_the_specification(case: str, layout: str) -> None:
    assert_exact_but_for_summation(*make(case, layout=layout))


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
@pytest.mark.usefixtures("no_dense")
@pytest.mark.c_kernels
def test_silence_few_spikes_and_spikes_everywhere(density: float) -> None:
    spikes, *others = make("tails", density)
    assert spikes.mean() == density or 0 < spikes.mean() < 0.02
    assert_exact_but_for_summation(spikes, *others)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["block", "tails", "shortcut"])
@pytest.mark.usefixtures("no_dense")
def test_memory_order_is_that_of_the_specification(case: str, layout: str) -> None:
    spikes, weight, stride, padding = make(case, layout=layout)
    dense = F.conv2d(spikes, weight, stride=stride, padding=padding)
    assert event_conv2d(spikes, weight, stride, padding).stride() == dense.stride()
    *_, grad_weight = run(event_conv2d, spikes, weight, stride, padding)
    if layout != "strided":
        assert grad_weight.stride() == weight.stride()


@pytest.mark.parametrize("case", ["two of each", "tails", "many pixels"])
@pytest.mark.usefixtures("no_dense")
@pytest.mark.c_kernels
def test_threads_do_not_change_a_bit(case: str) -> None:
    arguments, before = make(case), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(event_conv2d, *arguments))
    finally:
        torch.set_num_threads(before)
    for out, _, grad_weight in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad_weight, results[0][2])


@pytest.mark.parametrize("target", ["AVX", "baseline"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("no_dense")
def test_vectors_do_not_change_a_bit(case: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(case)
    expected = run(event_conv2d, *arguments)
    use_target(target, monkeypatch)
    for result, here in zip(run(event_conv2d, *arguments), expected, strict=True):
        assert torch.equal(result, here)


@pytest.mark.parametrize("name", ["gcc", "clang"])
@pytest.mark.usefixtures("no_dense")
def test_compilers_do_not_change_a_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    expected = [event_conv2d(*make(case)) for case in CASES]
    monkeypatch.setenv("CC", name)
    monkeypatch.setattr(c_compiler, "_loaded", {})
    forget_kernels()
    assert c_kernels.status().ok, c_kernels.status().reason
    for case, result in zip(CASES, expected, strict=True):
        assert torch.equal(event_conv2d(*make(case)), result)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("no_dense")
def test_all_accesses_are_in_bounds(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_target(target, monkeypatch)
    for case in CASES:
        assert_exact_but_for_summation(*make(case))


@pytest.mark.skipif("GAC_TEST_SANITIZE" in os.environ, reason="runs under the sanitizers")
def test_kernels_under_sanitizers() -> None:
    output = run_under_sanitizers(__file__, "in_bounds")
    assert " passed" in output
    assert "failed" not in output


def test_the_sanitizers_see_the_kernels(tmp_path: Path) -> None:
    program = tmp_path / "program.c"
    program.write_text(f"""
#include "{c_compiler.KERNEL_FOLDER / "event_conv.c"}"
#include <stdlib.h>
int main(void) {{
    const Shape shape = {{1, 4, 2, 2, 4, 1, 1, 1, 0, 2, 2}};
    const Team team = {{0, 1}};
    list_events(&shape, &team, calloc(16, sizeof(float)), malloc(16), malloc(3));
}}
""")
    command = [*c_compiler.find_compiler(), *SANITIZERS, "-std=gnu11", "-o", str(tmp_path / "program"), str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([tmp_path / "program"], capture_output=True, text=True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "in list_pixels" in result.stderr


RACES = """
int main(void) {
    const Shape shape = {6, 150, 12, 12, 70, 3, 3, 1, 1, 12, 12};
    const Team team = {parallel, 4};
    float *spikes = calloc(6 * 144 * 150, 4), *weight = calloc(70 * 150 * 9, 4), *out = malloc(6 * 144 * 70 * 4);
    float *packed = malloc(packed_size(&shape) * 4), *planes = malloc(6 * 144 * 70 * 4);
    unsigned char *count = malloc(list_count(&shape)), *index = malloc(list_count(&shape) * list_stride(&shape));
    for (int i = 0; i < 6 * 144 * 150; i += 7) spikes[i] = 1;
    const int64_t events = list_events(&shape, &team, spikes, index, count);
    if (events != (6 * 144 * 150 + 6) / 7 || !pack(&shape, &team, weight, 9, 1, packed)) return 2;
    convolve(&shape, &team, index, count, packed, out);
    transpose(&team, 6, 144, 70, out, planes);
    return !weight_gradient(&shape, &team, index, count, out, packed, weight, 9, 1);
}
"""


def test_threads_do_not_race(tmp_path: Path) -> None:
    assert "data race" not in run_under_thread_sanitizer(tmp_path, "event_conv.c", RACES)


# --- Where the dense convolution has to run


@pytest.fixture
def dense_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where lists of spikes are made."""
    monkeypatch.setattr(event_conv, "_forward", lambda *_: pytest.fail("events"))


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, 1e-45, float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_other_values_than_spikes_are_convolved_densely(value: float, layout: str) -> None:
    spikes, weight, stride, padding = make("tails", 0.1, layout)
    spikes[1, 129, 6, 4] = value
    for result, expected in zip(
        run(event_conv2d, spikes, weight, stride, padding),
        run(lambda x, w: F.conv2d(x, w, padding=1), spikes, weight),
        strict=True,
    ):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-4, equal_nan=True)


@pytest.mark.usefixtures("no_dense")
def test_a_negative_zero_is_no_spike() -> None:
    spikes, *others = make("few channels")
    for result, expected in zip(
        run(event_conv2d, torch.where(spikes == 0, -0.0, spikes), *others),
        run(event_conv2d, spikes, *others),
        strict=True,
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_zero_times_infinity_is_not_lost(value: float) -> None:
    spikes, weight, stride, padding = make("few channels", 0.1)
    broken = weight.clone()
    broken[3, 2, 1, 1] = value
    expected = F.conv2d(spikes, broken, stride=stride, padding=padding)
    assert not expected.isfinite().all()
    torch.testing.assert_close(
        event_conv2d(spikes, broken, stride, padding), expected, rtol=0, atol=1e-5, equal_nan=True
    )
    grad_weights = []
    for function in (event_conv2d, event_conv.reference):
        leaf = weight.clone().requires_grad_()
        out = function(spikes, leaf, stride, padding)
        gradient = torch.ones_like(out)
        gradient[2, 3, 1, 4] = value
        grad_weights.append(torch.autograd.grad(out, leaf, gradient)[0])
    torch.testing.assert_close(*grad_weights, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("density", "channels", "kernel", "stride", "layout", "by_events"),
    [
        (0.05, 64, 3, 1, "contiguous_format", True),
        (0.05, 64, 1, 2, "channels_last", True),
        (0.45, 64, 3, 1, "channels_last", True),
        (0.6, 64, 3, 1, "contiguous_format", False),
        (0.6, 64, 1, 2, "channels_last", False),
        (0.05, 63, 3, 1, "channels_last", False),
        (0.05, 64, 1, 2, "contiguous_format", False),
    ],
)
def test_events_are_used_where_they_are_faster(
    density: float,
    channels: int,
    kernel: int,
    stride: int,
    layout: str,
    by_events: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_conv, "MAX_DENSITY", DEFAULT_DENSITY)
    monkeypatch.setattr(event_conv, "_pays", DEFAULT_PAYS)
    dense: list[Tensor] = []
    monkeypatch.setattr(
        event_conv, "reference", lambda x, w, s, p: dense.append(x) or F.conv2d(x, w, stride=s, padding=p)
    )
    spikes = (torch.rand(2, channels, 8, 8) < density).float().to(memory_format=getattr(torch, layout))
    event_conv2d(spikes, torch.randn(64, channels, kernel, kernel), stride)
    assert len(dense) == (0 if by_events else 1)


def test_with_many_spikes_only_the_weight_gradient_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    spikes, weight, *sizes = make("two of each", density=0.45)
    by_events = run(event_conv2d, spikes, weight, *sizes)
    monkeypatch.setattr(event_conv, "MAX_GRADIENT_DENSITY", DEFAULT_GRADIENT_DENSITY)
    monkeypatch.setattr(event_conv, "_weight_gradient", lambda *_: pytest.fail("the weight gradient was by events"))
    monkeypatch.setattr(event_conv, "reference", lambda *_: pytest.fail("the convolution was dense"))
    found = run(event_conv2d, spikes, weight, *sizes)
    assert torch.equal(found[0], by_events[0])
    torch.testing.assert_close(found[2], by_events[2], rtol=1e-4, atol=1e-4)


def test_the_dense_weight_gradient_of_a_shortcut_is_in_the_order_that_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_conv, "_pays", DEFAULT_PAYS)
    seen, dense = [], event_conv._dense_gradients

    def recorded(gradient: Tensor, spikes: Tensor, weight: Tensor, *others) -> tuple:
        if others[-1] == (False, True):
            seen.extend([gradient.stride(), spikes.stride(), weight.stride()])
        return dense(gradient, spikes, weight, *others)

    monkeypatch.setattr(event_conv, "_dense_gradients", recorded)
    spikes, weight, *sizes = make("shortcut", layout="channels_last")
    *_, grad_weight = run(event_conv2d, spikes, weight, *sizes)
    *_, expected = run(event_conv.reference, spikes.double().contiguous(), weight.double().contiguous(), *sizes)
    torch.testing.assert_close(grad_weight, expected.float())
    assert seen == [(640, 16, 4, 1), (896, 56, 7, 1), (16, 1, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("dense_only")
def test_other_dtypes(dtype: torch.dtype) -> None:
    spikes, weight, *sizes = make("stride 2")
    spikes, weight = spikes.to(dtype), weight.to(dtype)
    assert torch.equal(event_conv2d(spikes, weight, *sizes), event_conv.reference(spikes, weight, *sizes))


def test_under_autocast_what_is_dense_has_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    spikes, weight, *sizes = make("stride 2")
    exact = run(event_conv2d, spikes, weight, *sizes)
    with torch.autocast("cpu", torch.bfloat16):
        out, grad_spikes, grad_weight = run(event_conv2d, spikes, weight, *sizes)
        dense = event_conv.reference(spikes, weight, *sizes)
        monkeypatch.setattr(event_conv, "_pays", lambda *_: False)
        out_of_dense = event_conv2d(spikes, weight, *sizes)
    assert torch.equal(out, exact[0])
    assert torch.equal(grad_weight, exact[2])
    # Rounded to eight bits of a float32 number's 24.
    assert grad_spikes.dtype == torch.float32
    assert 1e-4 < (grad_spikes - exact[1]).norm() / exact[1].norm() < 1e-2
    assert dense.dtype == torch.bfloat16
    assert torch.equal(out_of_dense, dense.float())


@pytest.mark.usefixtures("dense_only")
def test_what_watches_operations_sees_the_specification() -> None:
    spikes, weight, stride, padding = make("stride 2")
    dense = F.conv2d(spikes, weight, stride=stride, padding=padding)
    with FlopCounterMode(display=False) as counter:
        event_conv2d(spikes, weight, stride, padding)
    assert counter.get_total_flops() == 2 * dense.numel() * 20 * 9

    class Layer(torch.nn.Module):
        def forward(self, spikes: Tensor, weight: Tensor) -> Tensor:
            return event_conv2d(spikes, weight, stride, padding)

    traced = torch.jit.trace(Layer(), (spikes, weight), check_trace=False)
    assert "aten::_convolution" in str(traced.inlined_graph)
    exported = torch.export.export(Layer(), (spikes, weight))
    assert torch.ops.aten.conv2d.default in [node.target for node in exported.graph.nodes]
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(
        Layer(), backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True, dynamic=False
    )
    assert torch.equal(compiled(spikes, weight), dense)
    assert "conv2d" in graphs[0].code

    class Logged(Tensor):
        pass

    for arguments in ((spikes.as_subclass(Logged), weight), (spikes, weight.as_subclass(Logged))):
        assert type(event_conv2d(*arguments, stride, padding)) is Logged
    batched = torch.vmap(lambda w: event_conv2d(spikes, w, stride, padding))(torch.stack([weight, weight]))
    torch.testing.assert_close(batched[1], dense)
    (grad,) = torch.func.grad(lambda w: event_conv2d(spikes, w, stride, padding).sum(), argnums=(0,))(weight)
    assert grad.shape == weight.shape


@pytest.mark.parametrize(
    ("spikes", "weight", "sizes"),
    [
        (torch.ones(2, 3, 4, 4), torch.ones(2, 4, 1, 1), (1, 0)),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 5, 5), (1, 0)),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 1, 1), (0, 0)),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 1, 1), (1, -1)),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 1, 1), (1, 0)),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 1, 1).double(), (1, 0)),
    ],
    ids=["channels", "kernel", "stride", "padding", "rank", "dtypes"],
)
def test_what_conv2d_refuses_is_refused_in_its_words(spikes: Tensor, weight: Tensor, sizes: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError) as expected:
        event_conv.reference(spikes, weight, *sizes)
    with pytest.raises(RuntimeError) as error:
        event_conv2d(spikes, weight, *sizes)
    assert str(error.value).splitlines()[0] == str(expected.value).splitlines()[0]


def test_an_empty_batch() -> None:
    out, grad_spikes, grad_weight = run(event_conv2d, torch.ones(0, 3, 8, 8), torch.ones(4, 3, 3, 3), 2, 1)
    assert out.shape == (0, 4, 4, 4)
    assert grad_spikes.shape == (0, 3, 8, 8)
    assert torch.equal(grad_weight, torch.zeros(4, 3, 3, 3))


def test_without_a_compiler_it_is_dense_which_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(_: str) -> None:
        raise c_compiler.NotCompiled("there is no C compiler: install gcc")

    monkeypatch.setattr(c_compiler, "load_library", missing)
    forget_kernels()
    spikes, weight, *sizes = make("stride 2")
    with caplog.at_level(logging.WARNING, "gac"):
        for _ in range(2):
            assert torch.equal(event_conv2d(spikes, weight, *sizes), event_conv.reference(spikes, weight, *sizes))
    assert caplog.messages == [
        "the CPU runs without C kernels, so neurons and convolutions over spikes are torch's: "
        "there is no C compiler: install gcc"
    ]


# --- Autograd


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["spikes", "weight"])
def test_only_what_is_wanted(wanted: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    spikes, weight, *sizes = make("tails")
    both = run(event_conv2d, spikes, weight, *sizes)
    unwanted = "_weight_gradient" if wanted[0] else "_dense_gradients"
    monkeypatch.setattr(event_conv, unwanted, lambda *_: pytest.fail("computed for nobody"))
    spikes.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    out = event_conv2d(spikes, weight, *sizes)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (result,) = torch.autograd.grad(out, spikes if wanted[0] else weight, gradient)
    assert torch.equal(result, both[1] if wanted[0] else both[2])


def test_nothing_is_kept_without_gradients() -> None:
    spikes, weight, *sizes = make("tails")
    weight.requires_grad_()
    with torch.no_grad():
        assert not event_conv2d(spikes, weight, *sizes).requires_grad
    assert event_conv2d(spikes, weight.detach(), *sizes).grad_fn is None


def test_a_gradient_that_is_a_view() -> None:
    spikes, weight, *sizes = make("tails")
    weight.requires_grad_()
    (expanded,) = torch.autograd.grad(event_conv2d(spikes, weight, *sizes).sum(), weight)
    out = event_conv2d(spikes, weight, *sizes)
    (whole,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    assert torch.equal(expanded, whole)


def test_no_second_derivative() -> None:
    spikes, weight, *sizes = make("few channels")
    weight.requires_grad_()
    out = event_conv2d(spikes, weight, *sizes)
    (gradient,) = torch.autograd.grad(out, weight, torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_spikes_that_change_before_the_backward_pass_are_an_error() -> None:
    spikes, weight, *sizes = make("few channels")
    out = event_conv2d(spikes, weight.requires_grad_(), *sizes)
    spikes.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_incoming_tensors_are_not_changed() -> None:
    given = make("tails")
    before = [tensor.clone() for tensor in given[:2]]
    run(event_conv2d, *given)
    for tensor, old in zip(given[:2], before, strict=True):
        assert torch.equal(tensor, old)


# --- Threads


def test_python_threads_at_once() -> None:
    cases = [make(case) for case in CASES]
    expected = [event_conv2d(*case) for case in cases]
    results: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        results[number] = [event_conv2d(*case) for case in cases]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for outputs in results.values():
        for out, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(out, wanted)


@pytest.mark.usefixtures("no_dense")
def test_without_torchs_openmp_one_thread_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make("tails")
    out, _, grad_weight = run(event_conv2d, *arguments)
    monkeypatch.setattr(openmp, "parallel_function", lambda: None)
    forget_kernels()
    assert c_kernels.status().reason.endswith("one thread, as torch's OpenMP runtime is not found")
    alone = run(event_conv2d, *arguments)
    assert torch.equal(alone[0], out)
    assert torch.equal(alone[2], grad_weight)


def test_one_thread_of_many_has_to_have_less_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_conv, "MAX_DENSITY", 0.4)
    monkeypatch.setattr(event_conv, "MAX_GRADIENT_DENSITY", 0.4)
    monkeypatch.setattr(openmp, "parallel_function", lambda: None)
    spikes, weight = (torch.rand(2, 64, 8, 8) < 0.15).float(), torch.ones(8, 64, 1, 1)
    monkeypatch.setattr(event_conv.os, "cpu_count", lambda: 2)
    assert event_conv._forward(spikes, weight, 1, 0)[1] is not None
    monkeypatch.setattr(event_conv.os, "cpu_count", lambda: 4)
    assert event_conv._forward(spikes, weight, 1, 0)[1] is None


@pytest.mark.skipif(openmp.parallel_function() is None, reason="torch's OpenMP runtime is not found")
def test_threads_are_torchs_own() -> None:
    program = """
import os, threading, ctypes, torch
from gac.ops import openmp
torch.set_num_threads(3)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
torch.randn(10**6).exp_()
before = set(os.listdir("/proc/self/task"))
seen, barrier = set(), threading.Barrier(3)
@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def work(_):
    barrier.wait(60)
    seen.add(str(threading.get_native_id()))
parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
parallel(openmp.parallel_function())(ctypes.cast(work, ctypes.c_void_p), None, 3, 0)
assert len(seen) == 3 and seen <= before, (seen, before)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_another_openmp_runtime_is_not_taken_for_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp.torch, "get_num_threads", lambda: 1000)
    assert openmp.parallel_function.__wrapped__() is None
    monkeypatch.setattr(openmp.torch.__config__, "parallel_info", lambda: "ATen parallel backend: native thread pool")
    assert openmp.parallel_function.__wrapped__() is None


def test_the_gil_is_released() -> None:
    assert isinstance(event_conv._kernels(), ctypes.CDLL)
    assert not isinstance(event_conv._kernels(), ctypes.PyDLL)
