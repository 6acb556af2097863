"""The CPU's loop against the reference: spikes and potentials bit for bit, gradients within rounding."""

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from gac.ops import lif
from gac.ops.lif_cpu import lif_cpu
from gac.ops.neuron import LIFParameters
from ops.test_lif import GRADIENT_TOLERANCE, PRESETS, make_input, run

NEURONS = {
    **PRESETS,
    "soft": LIFParameters(3.0, True, 0.6, None, False, surrogate.Sigmoid(alpha=4.0)),
    "soft-detached": LIFParameters(2.0, False, 0.75, None, True, surrogate.ATan(alpha=2.0)),
    "hard-nonzero": LIFParameters(1.7, False, 0.9, -0.3, False, surrogate.PiecewiseQuadratic(alpha=1.5)),
    "hard-decayed": LIFParameters(5.0, True, 0.2, 0.1, True, surrogate.Rect(alpha=0.5)),
}
TOLERANCE = {torch.float64: 1e-14, **GRADIENT_TOLERANCE}


def assert_equal_reference(x: Tensor, v: Tensor, neuron: LIFParameters, with_grad_v: bool = True) -> None:
    expected = run(lif.reference, x, v, neuron, with_grad_v)
    got = run(lif_cpu, x, v, neuron, with_grad_v)
    assert 0.02 < expected[0].float().mean() < 0.98, "the case should have spikes and silence"
    for output, reference_output in zip(got[:2], expected[:2], strict=True):
        assert output.dtype == reference_output.dtype
        assert torch.equal(output, reference_output)
    for gradient, reference_gradient in zip(got[2:], expected[2:], strict=True):
        scale, tolerance = reference_gradient.abs().max().item(), TOLERANCE[x.dtype]
        assert scale > 0
        torch.testing.assert_close(gradient, reference_gradient, rtol=tolerance, atol=tolerance * scale)
    with torch.no_grad():
        for output, expected_output in zip(lif_cpu(x, v, neuron), got[:2], strict=True):
            assert torch.equal(output, expected_output)


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", [1, 2, 6, 20])
def test_equals_the_reference(T: int, dtype: torch.dtype, neuron: str) -> None:
    x = make_input((T, 3, 4, 5, 6), dtype, "contiguous", "cpu", seed=T)
    v = torch.randn(3, 4, 5, 6).to(torch.float64 if dtype == torch.float64 else torch.float32)
    for with_grad_v in (True, False):
        assert_equal_reference(x, v, NEURONS[neuron], with_grad_v)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_keeps_the_memory_order(layout: str) -> None:
    x = make_input((4, 3, 8, 5, 6), torch.float32, layout, "cpu")
    assert_equal_reference(x, torch.zeros_like(x[0]), PRESETS["cifar"])
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    spikes, v = lif_cpu(leaf, torch.zeros_like(leaf[0]), PRESETS["cifar"])
    (gradient,) = torch.autograd.grad(spikes.sum(), leaf)
    assert spikes.stride() == gradient.stride() == x.stride()
    assert v.stride() == torch.zeros_like(x[0]).stride()


def test_one_frame_repeated_by_a_view() -> None:
    x = make_input((1, 3, 4, 5, 6), torch.float32, "contiguous", "cpu").expand(6, 3, 4, 5, 6)
    assert_equal_reference(x, torch.zeros(3, 4, 5, 6), PRESETS["imagenet"])


def test_gradient_of_the_final_potential_alone() -> None:
    x = make_input((4, 3, 8), torch.float32, "contiguous", "cpu")
    gradients = []
    for function in (lif.reference, lif_cpu):
        leaf = x.clone().requires_grad_()
        _, v = function(leaf, torch.zeros(3, 8), PRESETS["cifar"])
        gradients.append(torch.autograd.grad(v.square().sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("neuron", ["cifar", "soft"])
def test_values_that_are_not_finite_stay_what_they_are_in_the_reference(neuron: str, value: float) -> None:
    x = make_input((4, 3, 8), torch.float32, "contiguous", "cpu")
    x[1, 2, 3] = value
    for output, expected in zip(
        lif_cpu(x, torch.zeros(3, 8), NEURONS[neuron]), lif.reference(x, 0.0, NEURONS[neuron]), strict=True
    ):
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


def test_incoming_tensors_are_not_changed() -> None:
    x = make_input((4, 3, 8), torch.float32, "contiguous", "cpu").requires_grad_()
    start = torch.randn(3, 8, requires_grad=True)
    spikes, v = lif_cpu(x, start, NEURONS["hard-nonzero"])
    given = [torch.randn_like(spikes), torch.randn_like(v)]
    before = [tensor.clone() for tensor in (x, start, spikes, v, *given)]
    torch.autograd.grad((spikes, v), (x, start), given)
    for tensor, old in zip((x, start, spikes, v, *given), before, strict=True):
        assert torch.equal(tensor, old)


def test_keeps_one_sequence_for_the_backward_pass() -> None:
    x = torch.randn(6, 3, 8, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lif_cpu(x, torch.zeros(3, 8), PRESETS["cifar"])
    assert sum(tensor.numel() for tensor in kept) == x.numel()


def test_no_second_derivative() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(4, 3, requires_grad=True)
    spikes, _ = lif_cpu(x, torch.zeros(3), PRESETS["cifar"])
    (gradient,) = torch.autograd.grad((weight * spikes).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
