"""The leaky integrate-and-fire neuron as the operations take it: one argument, its surrogate gradient included."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from spikingjelly.activation_based import surrogate
from spikingjelly.activation_based.surrogate import SurrogateFunctionBase

from gac.errors import InputError
from gac.ops.cuda.compiler import ELEMENTS

Surrogate = Literal["triangle", "rectangle", "sigmoid", "atan", "piecewise_exp", "soft_sign", "super_spike", "erf"]
SURROGATES: dict[Surrogate, type[SurrogateFunctionBase]] = {
    "triangle": surrogate.PiecewiseQuadratic,
    "rectangle": surrogate.Rect,
    "sigmoid": surrogate.Sigmoid,
    "atan": surrogate.ATan,
    "piecewise_exp": surrogate.PiecewiseExp,
    "soft_sign": surrogate.SoftSign,
    "super_spike": surrogate.SuperSpike,
    "erf": surrogate.Erf,
}
"""SpikingJelly's surrogates by the names that a network takes; each has one constant, alpha."""

_KERNEL_SURROGATES = {
    kind.__name__: kind for kind in (surrogate.PiecewiseQuadratic, surrogate.Rect, surrogate.Sigmoid, surrogate.ATan)
}


def compiled_constant(number: float | None) -> float | None:
    """Return ``number`` as it is; torch.compile takes it as a constant, and compiles again when it has changed.

    Left to itself the compiler makes a variable of each attribute that differs between two neurons of a process.
    """
    if number is None or not torch.compiler.is_compiling():
        return number
    # Not imported above: it takes a fifth of a second, and a compiler has loaded it.
    return torch.fx.experimental.symbolic_shapes.guard_scalar(number)


@dataclass(frozen=True)
class LIFParameters:
    """The neuron's constants, under SpikingJelly's names; the charge is h_t = decay v_{t-1} + gain x_t + bias.

    It fires on h_t > v_threshold (strict, as the paper's code; SpikingJelly fires on >=). After a spike
    v_t = v_reset (hard reset), or v_t = h_t - v_threshold where v_reset is None (soft reset).

    Args:
        tau: Membrane time constant in time steps, > 1.
        decay_input: Divide the input by tau as well.
        v_threshold: Threshold of the membrane potential.
        v_reset: Potential after a spike, or None for the soft reset.
        detach_reset: Treat the spike inside the reset as a constant in the backward pass.
        surrogate: SpikingJelly surrogate, whose gradient stands for that of the step function.

    Raises:
        InputError: For tau <= 1.
    """

    tau: float
    decay_input: bool
    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    surrogate: SurrogateFunctionBase

    SCHEMA = (
        "float tau, bool decay_input, float v_threshold, float? v_reset, bool detach_reset, str surrogate, float alpha"
    )

    def __post_init__(self) -> None:
        if not (isinstance(self.tau, (int, float)) and math.isfinite(self.tau) and self.tau > 1):
            raise InputError(
                f"tau must be a number > 1 (time steps), got {self.tau!r}; a decay d of the potential is"
                " tau = 1 / (1 - d)"
            )

    @property
    def decay(self) -> float:
        """The factor of the membrane potential."""
        return 1.0 - 1.0 / self.tau

    @property
    def gain(self) -> float:
        """The factor of the input."""
        return 1.0 / self.tau if self.decay_input else 1.0

    @property
    def bias(self) -> float:
        """What each time step adds: the leak is towards the reset potential."""
        return self.v_start / self.tau

    @property
    def v_start(self) -> float:
        """The potential that a neuron starts from."""
        return self.v_reset or 0.0

    # --- For operators, whose arguments are tensors, numbers and strings

    def flatten(self) -> tuple[float | bool | str | None, ...]:
        """Return the arguments that ``SCHEMA`` names."""
        kind, alpha = type(self.surrogate).__name__, float(compiled_constant(self.surrogate.alpha))
        return self.tau, self.decay_input, self.v_threshold, self.v_reset, self.detach_reset, kind, alpha

    is_own = False
    """Whether :meth:`unflatten` made it, so that nobody else holds its surrogate and changes it."""

    @staticmethod
    @lru_cache
    def unflatten(*arguments: float | bool | str | None) -> "LIFParameters":
        """Return the neuron that the arguments are of; its surrogate is one that the kernels have."""
        *constants, kind, alpha = arguments
        neuron = LIFParameters(*constants, _KERNEL_SURROGATES[kind](alpha=alpha))
        neuron.__dict__["is_own"] = True
        return neuron

    # --- For kernels

    def check_kernels(self, dtype: torch.dtype) -> None:
        """Raise InputError unless there are kernels of this neuron for input of a dtype."""
        if dtype not in ELEMENTS:
            raise InputError(
                f"the LIF kernels take float32, float16 or bfloat16 input, got {dtype}; use backend='torch'"
            )
        reason = unsupported_reason(self.surrogate)
        if reason is not None:
            raise InputError(f"{reason}; use another surrogate or backend='torch'")

    @cached_property
    def struct(self) -> tuple[float, ...]:
        """The neuron as kernels take it: ``LIF`` of ``kernels/lif.cuh``, with the constants of ``surrogate.cuh``.

        Of what :meth:`unflatten` gives, whose surrogate nobody else holds and changes.
        """
        alpha = self.surrogate.alpha
        surrogate_constants = {
            surrogate.PiecewiseQuadratic: (alpha, alpha**2),
            surrogate.Rect: (alpha, 0.5 / alpha),
            surrogate.Sigmoid: (alpha, 0.0),
            surrogate.ATan: (alpha / 2, math.pi * (alpha / 2)),
        }[type(self.surrogate)]
        return self.decay, self.gain, self.bias, self.v_threshold, self.v_start, *surrogate_constants

    @cached_property
    def forward_template(self) -> str:
        """Template arguments of forward kernels."""
        plain_charge = self.gain == 1.0 and self.bias == 0.0
        return f"Reset::{'soft' if self.v_reset is None else 'hard'}, {str(plain_charge).lower()}"

    @cached_property
    def backward_template(self) -> str:
        """Template arguments of backward kernels."""
        return f"{self.forward_template}, {str(self.detach_reset).lower()}, {type(self.surrogate).__name__}"


def unsupported_reason(function: SurrogateFunctionBase) -> str | None:
    """Return why the kernels do not have this surrogate function, in one line, or None if they do."""
    # Exact types: a subclass may have another gradient.
    if type(function) not in _KERNEL_SURROGATES.values():
        names = ", ".join(_KERNEL_SURROGATES)
        return f"the LIF kernels have the surrogates {names}, not {type(function).__name__}"
    if not function.spiking:
        return "the LIF kernels need a surrogate with spiking=True"
    alpha = compiled_constant(function.alpha)
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0):
        return f"the LIF kernels need a surrogate whose alpha is a positive number, got {alpha!r}"
    return None
