"""The neuron as one argument: what follows from its constants, and its way through an operator's flat arguments."""

import math

import pytest
import torch
from spikingjelly.activation_based import surrogate

from gac.errors import InputError
from gac.ops.neuron import LIFParameters, unsupported_reason
from ops.fused import NEURONS

ATAN = surrogate.ATan()


def test_charge() -> None:
    def charge(*constants: object) -> tuple[float, float, float]:
        neuron = LIFParameters(*constants, ATAN)
        return neuron.decay, neuron.gain, neuron.bias

    assert charge(2.0, False, 1.0, 0.0, False) == (0.5, 1.0, 0.0)
    assert charge(4 / 3, False, 0.5, 0.0, True)[0] == 0.25
    assert charge(4.0, True, 1.0, -1.0, False) == (0.75, 0.25, -0.25)
    assert charge(2.0, False, 1.0, None, False)[2] == 0.0


@pytest.mark.parametrize("tau", [1.0, 0.5, math.nan, math.inf, "2"])
def test_a_time_constant_that_does_not_decay_is_refused(tau: float) -> None:
    with pytest.raises(InputError, match="tau must be a number > 1"):
        LIFParameters(tau, False, 1.0, 0.0, False, ATAN)


@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)
def test_comes_back_from_flat_arguments(neuron: LIFParameters) -> None:
    found = LIFParameters.unflatten(*neuron.flatten())
    assert found.flatten() == neuron.flatten()
    assert type(found.surrogate) is type(neuron.surrogate)
    assert LIFParameters.unflatten(*neuron.flatten()) is found
    x = torch.linspace(-1, 1, 9, requires_grad=True)
    gradients = [torch.autograd.grad(each.surrogate(x).sum(), x)[0] for each in (found, neuron)]
    assert torch.equal(*gradients)


class _OwnGradient(surrogate.ATan):
    pass


def test_unsupported_surrogates() -> None:
    for kind in (surrogate.PiecewiseQuadratic, surrogate.Rect, surrogate.Sigmoid, surrogate.ATan):
        assert unsupported_reason(kind(alpha=2)) is None
        assert "spiking=True" in unsupported_reason(kind(spiking=False))
        for alpha in (torch.tensor(1.0), 0.0, -1.0, float("inf")):
            assert "positive number" in unsupported_reason(kind(alpha=alpha))
    for other in (surrogate.Erf(), _OwnGradient()):
        assert type(other).__name__ in unsupported_reason(other)
