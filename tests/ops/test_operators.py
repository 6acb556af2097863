"""Operators that have a derivative, called directly and in compiled graphs."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from spikingjelly.activation_based import surrogate

from gac.ops import lif_pool, operators
from ops.fused import CIFAR, DEFAULT, activations


def rates(x: torch.Tensor) -> torch.Tensor:
    return lif_pool.lif_pool(x, CIFAR)


def rates_by_the_operator(x: torch.Tensor) -> torch.Tensor:
    """Return the same as a compiled graph would: by the operator and the Function that torch.library makes for it."""
    return torch.ops.gac.lif_pool(x, *CIFAR.flatten())


def test_one_derivative_for_both_ways_of_calling(device: str) -> None:
    results, nodes = [], []
    for function in (rates, rates_by_the_operator):
        x = activations(DEFAULT, device).requires_grad_()
        y = function(x)
        nodes.append(y.grad_fn.name())
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), x)])
    assert results[0][1].abs().max() > 0
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    # Not torch.library's, which takes a multiple of the time.
    assert nodes[0] == "lif_poolBackward" != nodes[1]


@pytest.mark.parametrize("function", [rates, rates_by_the_operator])
def test_a_second_derivative_is_refused_only_where_it_is_taken(function: Callable, device: str) -> None:
    x = activations(DEFAULT, device).requires_grad_()
    gradients = [torch.autograd.grad(function(x).sum(), x, create_graph=graph)[0] for graph in (False, True)]
    assert torch.equal(*gradients)
    with pytest.raises(NotImplementedError, match="gac::lif_pool has no second derivative"):
        gradients[1].sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_without_grad_mode(mode: Callable, device: str) -> None:
    x = activations(DEFAULT, device).requires_grad_()
    expected = rates(x)
    with mode():
        y = rates(x)
    assert expected.requires_grad
    assert not y.requires_grad
    assert torch.equal(y, expected)


def test_a_compiler_sees_the_operator(device: str) -> None:
    graphs = []

    def compile_backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph

    x = activations(DEFAULT, device).requires_grad_()
    y = torch.compile(rates, fullgraph=True, backend=compile_backend)(x)
    assert torch.equal(y, rates(x))
    (graph,) = graphs
    assert graph.graph.find_nodes(op="call_function", target=torch.ops.gac.lif_pool.default)


def test_the_backward_pass_has_the_surrogate_of_the_forward_pass(device: str) -> None:
    gradients = []
    for later in (4.0, 8.0):
        neuron = replace(CIFAR, surrogate=surrogate.Sigmoid(alpha=4.0))
        x = activations(DEFAULT, device).requires_grad_()
        y = lif_pool.lif_pool(x, neuron)
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
        found = rates(negated)
        assert torch.equal(found, rates(negated.clone()))
        assert not torch.equal(found, rates(x.imag))


@pytest.mark.parametrize("grad", [False, True])
def test_subclasses_profilers_and_tensors_without_memory_get_the_operator(grad: bool, device: str) -> None:
    x = torch.randn(3, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.set_grad_enabled(grad):
        expected = rates(x)
        _Wrapped.seen.clear()
        assert torch.equal(rates(_Wrapped(x)), expected)
        assert "gac.lif_pool.default" in _Wrapped.seen
        assert rates(x.to("meta")).shape == expected.shape
        with torch.profiler.profile() as profiler:
            rates(x)
        assert "gac::lif_pool" in {event.name for event in profiler.events()}


@torch.no_grad()
def test_a_subclass_in_any_place_gets_the_operator(device: str) -> None:
    x = torch.randn(3, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    gradient = torch.ones(3, 2, 8, device=device)
    expected = operators.call("gac::lif_pool_backward", gradient, x, CIFAR)
    _Wrapped.seen.clear()
    assert torch.equal(operators.call("gac::lif_pool_backward", gradient, _Wrapped(x), CIFAR), expected)
    assert _Wrapped.seen == ["gac.lif_pool_backward.default"]
