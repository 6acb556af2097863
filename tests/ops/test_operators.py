"""Operators that have a derivative, called directly and in compiled graphs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import surrogate

from gac.ops import lif_pool
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
