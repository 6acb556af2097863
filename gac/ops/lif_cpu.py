"""The leaky integrate-and-fire neuron over T time steps on the CPU, in place where that is possible.

:func:`gac.ops.lif.reference` is the specification. It and SpikingJelly's execution make a dozen temporary frames in a
step, which costs more time than the arithmetic.
"""

import math
from collections.abc import Callable

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from gac.ops.neuron import LIFParameters


def lif_cpu(
    x_seq: Tensor,
    v: Tensor,
    neuron: LIFParameters,
) -> tuple[Tensor, Tensor]:
    """Run the neuron over T time steps; spikes and potentials are bit-equal to ``reference``.

    For the backward pass the membrane potentials before the resets are kept, T frames. There is no second derivative,
    and torch.func's transforms do not take the function.

    Args:
        x_seq: Input [T, B, ...] of any floating-point dtype.
        v: Membrane potential before the first step: [B, ...] in float32 (float64 for float64 input).
        neuron: Its surrogate is one that :func:`gac.ops.neuron.unsupported_reason` has nothing against.

    Returns:
        Spikes [T, B, ...] in the dtype of ``x_seq``, and the membrane potential after the last step [B, ...].
    """
    if torch.is_grad_enabled() and (x_seq.requires_grad or v.requires_grad):
        spikes, v, _ = _LIF.apply(x_seq, v, neuron)
        return spikes, v
    return _run(x_seq, v, neuron, torch.empty_like(v).expand(x_seq.shape))


def _run(x_seq: Tensor, v: Tensor, neuron: LIFParameters, h_seq: Tensor) -> tuple[Tensor, Tensor]:
    """Return spikes and final potential; leave the potentials before the resets in ``h_seq``."""
    spikes, v_next, one = torch.empty_like(x_seq), torch.empty_like(v), torch.ones((), dtype=v.dtype, device=v.device)
    for x, h, s in zip(x_seq, h_seq, spikes, strict=True):
        # Each of the reference's roundings, and no other.
        torch.mul(v, neuron.decay, out=h)
        h.add_(x if neuron.gain == 1.0 else neuron.gain * x.to(h.dtype))
        if neuron.bias != 0.0:
            h.add_(neuron.bias)
        torch.gt(h, neuron.v_threshold, out=s)
        if neuron.v_reset is None:
            v = torch.sub(h, s, alpha=neuron.v_threshold, out=v_next)
        else:
            v = torch.sub(one, s, out=v_next).mul_(h)
            if neuron.v_reset != 0.0:
                v.add_(s, alpha=neuron.v_reset)
    return spikes, v_next


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(x_seq: Tensor, v: Tensor, neuron: LIFParameters) -> tuple[Tensor, Tensor, Tensor]:
        h_seq = torch.empty_like(x_seq, dtype=v.dtype)
        return *_run(x_seq, v, neuron, h_seq), h_seq

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
        x_seq, _, ctx.neuron = inputs
        *_, h_seq = output
        ctx.dtype = x_seq.dtype
        ctx.save_for_backward(h_seq)
        ctx.mark_non_differentiable(h_seq)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_spikes: Tensor | None, grad_v: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        (h_seq,) = ctx.saved_tensors
        neuron: LIFParameters = ctx.neuron
        derivative, alpha = _DERIVATIVES[type(neuron.surrogate)], neuron.surrogate.alpha
        grad_x = torch.empty_like(h_seq, dtype=ctx.dtype)
        grad_v = torch.zeros_like(h_seq[0]) if grad_v is None else grad_v.clone()
        grad_s, grad_h, spiked = (torch.empty_like(grad_v, dtype=dtype) for dtype in (None, None, torch.bool))
        for t in reversed(range(len(h_seq))):
            h = h_seq[t]
            # Through the spike, to which the reset adds, ...
            grad_s.zero_() if grad_spikes is None else grad_s.copy_(grad_spikes[t])
            if not neuron.detach_reset:
                if neuron.v_reset is None:
                    grad_s.sub_(grad_v, alpha=neuron.v_threshold)
                else:
                    grad_s.addcmul_(grad_v, h, value=-1.0).add_(grad_v, alpha=neuron.v_reset)
            torch.sub(h, neuron.v_threshold, out=grad_h)
            derivative(grad_h, alpha).mul_(grad_s)
            # ... and past it.
            if neuron.v_reset is not None:
                grad_v.masked_fill_(torch.gt(h, neuron.v_threshold, out=spiked), 0.0)
            grad_h.add_(grad_v)
            torch.mul(grad_h, neuron.gain, out=grad_x[t])
            torch.mul(grad_h, neuron.decay, out=grad_v)
        return grad_x, grad_v, None


def _piecewise_quadratic(x: Tensor, alpha: float) -> Tensor:
    return x.abs_().mul_(-(alpha**2)).add_(alpha).clamp_(min=0.0)


def _rect(x: Tensor, alpha: float) -> Tensor:
    return torch.lt(x.abs_(), 0.5 / alpha, out=x).mul_(alpha)


def _sigmoid(x: Tensor, alpha: float) -> Tensor:
    x.mul_(alpha).sigmoid_()
    return x.addcmul_(x, x, value=-1.0).mul_(alpha)


def _atan(x: Tensor, alpha: float) -> Tensor:
    return x.mul_(math.pi / 2 * alpha).square_().add_(1.0).reciprocal_().mul_(alpha / 2)


# SpikingJelly's derivatives at x, in place of x.
_DERIVATIVES: dict[type, Callable[[Tensor, float], Tensor]] = {
    surrogate.PiecewiseQuadratic: _piecewise_quadratic,
    surrogate.Rect: _rect,
    surrogate.Sigmoid: _sigmoid,
    surrogate.ATan: _atan,
}
