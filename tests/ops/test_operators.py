"""Operators that have a derivative, called directly and in compiled graphs."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from spikingjelly.activation_based import surrogate

from gac.ops import norm_lif, operators
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.neuron import LIFParameters
from ops.fused import CIFAR, DEFAULT, activations, dyadic_parameters, fixed_statistics


def normalization(x: torch.Tensor) -> BatchNormTransform:
    return fixed_statistics(x, *dyadic_parameters(x.shape[2], x.device))


def spikes(x: torch.Tensor, neuron: LIFParameters = CIFAR) -> torch.Tensor:
    return norm_lif.norm_lif(x, normalization(x), neuron)


def spikes_by_the_operator(x: torch.Tensor) -> torch.Tensor:
    """Return the same as a compiled graph would: by the operator and the Function that torch.library makes for it."""
    return torch.ops.gac.norm_lif(x, *normalization(x).tensors, False, False, *CIFAR.flatten())


def test_one_derivative_for_both_ways_of_calling(device: str) -> None:
    results, nodes = [], []
    for function in (spikes, spikes_by_the_operator):
        x = activations(DEFAULT, device).requires_grad_()
        y = function(x)
        nodes.append(y.grad_fn.name())
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), x)])
    assert results[0][1].abs().max() > 0
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    # Not torch.library's, which takes a multiple of the time.
    assert nodes[0] == "norm_lifBackward" != nodes[1]


@pytest.mark.parametrize("function", [spikes, spikes_by_the_operator])
def test_a_second_derivative_is_refused_only_where_it_is_taken(function: Callable, device: str) -> None:
    x = activations(DEFAULT, device).requires_grad_()
    gradients = [torch.autograd.grad(function(x).sum(), x, create_graph=graph)[0] for graph in (False, True)]
    assert torch.equal(*gradients)
    with pytest.raises(NotImplementedError, match="gac::norm_lif has no second derivative"):
        gradients[1].sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_without_grad_mode(mode: Callable, device: str) -> None:
    x = activations(DEFAULT, device).requires_grad_()
    expected = spikes(x)
    with mode():
        y = spikes(x)
    assert expected.requires_grad
    assert not y.requires_grad
    assert torch.equal(y, expected)


def test_a_compiler_sees_the_operator(device: str) -> None:
    graphs = []

    def compile_backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph

    x = activations(DEFAULT, device).requires_grad_()
    y = torch.compile(spikes, fullgraph=True, backend=compile_backend)(x)
    assert torch.equal(y, spikes(x))
    (graph,) = graphs
    assert graph.graph.find_nodes(op="call_function", target=torch.ops.gac.norm_lif.default)


def test_the_backward_pass_has_the_surrogate_of_the_forward_pass(device: str) -> None:
    gradients = []
    for later in (4.0, 8.0):
        neuron = replace(CIFAR, surrogate=surrogate.Sigmoid(alpha=4.0))
        x = activations(DEFAULT, device).requires_grad_()
        y = spikes(x, neuron)
        neuron.surrogate.alpha = later
        gradients.append(torch.autograd.grad(y.sum(), x)[0])
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


class _Wrapped(torch.Tensor):
    """A tensor without memory of its own around another, of which every operation is recorded."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "_Wrapped":
        options = {"dtype": inner.dtype, "device": inner.device, "strides": inner.stride()}
        wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        cls.seen.append(str(function))
        return function(*(each.inner if isinstance(each, cls) else each for each in arguments), **(options or {}))


def test_a_negation_that_waits_is_not_overlooked(device: str) -> None:
    x = torch.randn(3, 2, 8, 4, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).to(device)
    negated = x.conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        found = spikes(negated)
        assert torch.equal(found, spikes(negated.clone()))
        assert not torch.equal(found, spikes(x.imag))


@pytest.mark.parametrize("grad", [False, True])
def test_subclasses_profilers_and_tensors_without_memory_get_the_operator(grad: bool, device: str) -> None:
    x = torch.randn(3, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.set_grad_enabled(grad):
        expected = spikes(x)
        _Wrapped.seen.clear()
        assert torch.equal(spikes(_Wrapped(x)), expected)
        assert "gac.norm_lif.default" in _Wrapped.seen
        assert spikes(x.to("meta")).shape == expected.shape
        with torch.profiler.profile() as profiler:
            spikes(x)
        assert "gac::norm_lif" in {event.name for event in profiler.events()}


@torch.no_grad()
def test_a_subclass_in_any_place_gets_the_operator(device: str) -> None:
    x = torch.randn(3, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    gradient, tensors = torch.ones_like(x), normalization(x).tensors
    expected = operators.call("gac::norm_lif_backward_sums", gradient, x, *tensors, CIFAR)
    _Wrapped.seen.clear()
    assert torch.equal(operators.call("gac::norm_lif_backward_sums", gradient, _Wrapped(x), *tensors, CIFAR), expected)
    assert _Wrapped.seen == ["gac.norm_lif_backward_sums.default"]
