"""An operation beside its float64 reference on the same inputs: spikes, other outputs and gradients."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Operation = Callable[..., Mapping[str, Tensor]]
"""Takes tensors and returns outputs by name; "spikes" are compared by the share that differs, others by rounding."""

# Membranes so close to the threshold that the precision of what comes before it decides about the spike.
CHANGED_SPIKES_LIMIT = 1e-6
# Entries that may be off by more than rounding: a changed spike changes its neuron's gradient at up to 16 time steps,
# and so does rounding across a jump of the surrogate gradient (Rect has two).
EXEMPT = 16 * CHANGED_SPIKES_LIMIT
# Rounding of outputs and gradients, as a root mean square relative to the reference's.
ROUNDING_LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Difference:
    """How far an operation is from its reference in one quantity, and how far it may be."""

    quantity: str
    difference: float
    limit: float

    @property
    def within(self) -> bool:
        """Whether the limit holds; it never does for NaN."""
        return self.difference <= self.limit


def compare(operation: Operation, reference: Operation, inputs: Mapping[str, Tensor]) -> list[Difference]:
    """Compare an operation with its reference, which gets the same inputs in float64.

    A neuron that has a changed spike is left out of the other comparisons, in which its later times and its gradient
    differ as well. The limits are those of the first input's dtype.

    Args:
        operation: What to check.
        reference: The float64 specification, with outputs of the same names and shapes.
        inputs: By name; those that require gradients get them, from random gradients of the differentiable outputs.
    """
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    wanted, got = reference(*exact.values()), operation(*inputs.values())
    grad_outputs = {name: torch.randn_like(output) for name, output in got.items() if output.requires_grad}
    wanted = {**wanted, **_gradients(wanted, exact, {name: grad.double() for name, grad in grad_outputs.items()})}
    got = {**got, **_gradients(got, inputs, grad_outputs)}

    found = []
    changed: Tensor | None = None
    if "spikes" in wanted:
        differs = got.pop("spikes").double() != wanted.pop("spikes")
        changed = differs.any(0)
        # A single unlucky spike in a small tensor proves nothing.
        limit = max(CHANGED_SPIKES_LIMIT, 1 / differs.numel())
        found.append(Difference("share of changed spikes", differs.double().mean().item(), limit))
    limit = ROUNDING_LIMITS[next(iter(inputs.values())).dtype]
    return found + [
        Difference(name, _difference(got[name].detach().double(), wanted[name].detach(), changed), limit)
        for name in wanted
    ]


def _gradients(
    outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor], grad_outputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    wanted = {name: x for name, x in inputs.items() if x.requires_grad}
    if not grad_outputs:
        return {}
    grads = torch.autograd.grad(
        [outputs[name] for name in grad_outputs], list(wanted.values()), list(grad_outputs.values())
    )
    return {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}


def _difference(got: Tensor, wanted: Tensor, changed: Tensor | None) -> float:
    if changed is not None and wanted.shape[-changed.ndim :] == changed.shape:
        got, wanted = got * ~changed, wanted * ~changed
    return relative_rms(got, wanted)


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    """Return the root mean square of the difference relative to that of ``wanted``; 0 where both are zero.

    The largest differences do not count, as many as EXEMPT has of all entries.
    """
    error, size = (got - wanted).square(), wanted.square().sum()
    exempt = error.flatten().topk(int(EXEMPT * error.numel())).values.sum()
    error = (error.sum() - exempt).clamp(min=0)
    return 0.0 if error == size == 0 else (error / size).sqrt().item()


def worst(differences: Iterable[float]) -> float:
    """Return the largest, NaN if there is one, which ``max`` would lose."""
    return torch.tensor(list(differences)).max().item()
