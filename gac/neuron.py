"""The leaky integrate-and-fire neuron of the networks and the paper's two presets."""

import math
from copy import deepcopy
from dataclasses import replace
from numbers import Real
from typing import Literal, get_args

import numpy as np
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from gac.errors import InputError, did_you_mean
from gac.ops import backend, lif, lif_cpu
from gac.ops.backend import Choice
from gac.ops.neuron import SURROGATES, LIFParameters, Surrogate, compiled_constant, unsupported_reason
from gac.ops.watchers import constant_when_compiled, refuse_symbolic, watched

Backend = Literal["auto", "cupy", "c", "torch"]
HALF_PRECISION = (torch.float16, torch.bfloat16)

# SpikingJelly runs these in one fused operation. Their gradient is continuous, so that evaluating it one
# float32 step beside the threshold (see LIFNode._multi_step_torch) changes nothing that rounding does not.
_FUSED_IN_SPIKINGJELLY = (
    surrogate.Sigmoid,
    surrogate.ATan,
    surrogate.PiecewiseQuadratic,
    surrogate.PiecewiseExp,
    surrogate.SoftSign,
    surrogate.SuperSpike,
    surrogate.Erf,
)


# Under torch.compile a constant of the graph, which reading a tensor on the host would break in two.
@constant_when_compiled
def _next_float32(number: float) -> float:
    return float(np.nextafter(np.float32(number), np.float32(np.inf)))


PRESETS = {
    # h_t = 0.5 v_{t-1} + x_t; s_t = [h_t > 1]; v_t = (1 - s_t) h_t; ds/dh = max(0, 1 - |h - 1|)
    "cifar": LIFParameters(
        tau=2.0,
        decay_input=False,
        v_threshold=1.0,
        v_reset=0.0,
        detach_reset=False,
        surrogate=surrogate.PiecewiseQuadratic(alpha=1.0),
    ),
    # h_t = 0.25 v_{t-1} + x_t; s_t = [h_t > 0.5]; v_t = (1 - s_t) h_t, reset detached; ds/dh = [|h - 0.5| < 0.5]
    "imagenet": LIFParameters(
        tau=4 / 3,
        decay_input=False,
        v_threshold=0.5,
        v_reset=0.0,
        detach_reset=True,
        surrogate=surrogate.Rect(alpha=1.0),
    ),
}
"""The paper's neurons; source: the authors' code (the paper's appendix differs)."""

SURROGATE_SPELLINGS = {name: name for name in SURROGATES} | {kind.__name__: name for name, kind in SURROGATES.items()}
"""The names, and SpikingJelly's own for them, to suggest one for what was written."""


def make_parameters(
    neuron: str | LIFParameters,
    *,
    tau: float | None = None,
    v_threshold: float | None = None,
    surrogate: Surrogate | None = None,
    detach_reset: bool | None = None,
) -> LIFParameters:
    """Return a neuron's constants: those of ``neuron``, one of ``PRESETS`` or all constants, where others are None.

    Args:
        neuron: Name of a preset, or the constants.
        tau: Membrane time constant in time steps, > 1, as SpikingJelly's: the potential keeps 1 - 1/tau of itself.
        v_threshold: Threshold of the membrane potential, > 0.
        surrogate: One of ``SURROGATES``, with SpikingJelly's default alpha.
        detach_reset: Treat the reset as constant in the backward pass.

    Raises:
        InputError: For an unknown name, and for values out of range.
    """
    if not isinstance(neuron, LIFParameters):
        if neuron not in PRESETS:
            raise InputError(f"neuron must be one of {', '.join(PRESETS)}, got {neuron!r}")
        neuron = PRESETS[neuron]
    changed: dict[str, object] = {} if tau is None else {"tau": _plain(tau)}
    if v_threshold is not None:
        changed["v_threshold"] = threshold = _plain(v_threshold)
        if not (isinstance(threshold, float) and 0 < np.float32(threshold) < np.inf):
            raise InputError(f"v_threshold must be a number > 0, got {v_threshold!r}")
    if surrogate is not None:
        if surrogate not in SURROGATES:
            close = did_you_mean(str(surrogate), SURROGATE_SPELLINGS)
            raise InputError(f"surrogate must be one of {', '.join(SURROGATES)}{close}, got {surrogate!r}")
        changed["surrogate"] = SURROGATES[surrogate]()
    if detach_reset is not None:
        if not isinstance(detach_reset, bool):
            raise InputError(f"detach_reset must be True or False, got {detach_reset!r}")
        changed["detach_reset"] = detach_reset
    return replace(neuron, **changed)


def check_step_mode(name: str, layer: nn.Module, step_mode: str) -> None:
    """Raise InputError if a neuron layer is in the other step mode, in which it takes time steps for images or back."""
    if getattr(layer, "step_mode", step_mode) != step_mode:
        raise InputError(
            f"{name} is in step mode {layer.step_mode!r}, the network in {step_mode!r}: use"
            f" functional.set_step_mode(network, {step_mode!r})"
        )


def _plain(value: object) -> object:
    """Return a number of any library's type as Python's, and anything else as it is."""
    # A tensor that learns would not as a number.
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 and not getattr(value, "requires_grad", False):
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _finite(name: str, value: object, or_infinite: bool = False) -> float:
    number = _plain(value)
    if or_infinite and isinstance(number, float) and number == math.inf:
        return number
    if not (isinstance(number, float) and abs(number) <= torch.finfo(torch.float32).max):
        raise InputError(f"{name} must be a finite number, got {value!r}")
    return number


class LIFNode(neuron.LIFNode):
    """SpikingJelly's leaky integrate-and-fire neuron with a strict threshold, a float32 membrane and fast kernels.

    h_t = v_{t-1} - (v_{t-1} - v_reset) / tau + x_t, s_t = [h_t > v_threshold], then v_t = v_reset where s_t = 1
    (hard reset) or v_t = h_t - v_threshold s_t (soft reset, ``v_reset=None``).

    Two deliberate deviations from the parent: it fires on h > v_threshold as the paper's code does
    (SpikingJelly: >=), in every backend and dtype; and the membrane potential is float32 (float64 for float64
    input) whatever the input's dtype, under autocast too. Spikes have the input's dtype. Three defaults are not the
    parent's either: decay_input (there True), surrogate_function (there a sigmoid) and step_mode (there "s").

    Input and output: [T, ...] in step mode "m", [...] in step mode "s".

    A neuron keeps its potential in ``v`` from one call to the next, as SpikingJelly's do, and ``functional.reset_net``
    clears it. The networks of this package set ``keeps_state`` (an attribute) to False for theirs: a call in step mode
    "m" is then a sequence of its own, which starts from the potential of a reset neuron and neither reads nor writes
    ``v``, so that several threads may call the network at once. What ``store_v_seq`` asks for is kept all the same.

    Args:
        tau: Membrane time constant in time steps, > 1; the potential keeps 1 - 1/tau of itself each step.
        decay_input: Divide the input by tau as well.
        v_threshold: Threshold of the membrane potential; with the hard reset it may be infinite, for a layer that only
            integrates.
        v_reset: Potential after a spike, or None for the soft reset.
        surrogate_function: SpikingJelly surrogate whose gradient stands for that of the step function; by default
            the triangle max(0, 1 - |h - v_threshold|).
        detach_reset: Treat the reset as constant in the backward pass.
        step_mode: "m" for sequences, "s" for single time steps.
        store_v_seq: Keep the membrane potential of every time step in ``v_seq`` (runs step by step).
        backend: "cupy" (this package's CUDA kernels), "c" (their C versions on the CPU, in float32), "torch" (on a CUDA
            device SpikingJelly's own multi-step execution; where that cannot fire strictly, the step-by-step reference;
            on the CPU, for the surrogates that the kernels have, a loop in place) or "auto" (the kernels where they
            work, with CuPy on a CUDA device and with a C compiler on the CPU, else torch).

    Raises:
        InputError: For tau <= 1, values of another type or not finite, or an unknown backend; in forward, for backend
            "cupy" or "c" where it cannot run.
    """

    keeps_state = True

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = False,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: surrogate.SurrogateFunctionBase | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
        store_v_seq: bool = False,
        backend: Backend = "auto",
    ) -> None:
        tau, surrogate_function = _plain(tau), surrogate_function or surrogate.PiecewiseQuadratic(alpha=1.0)
        # SpikingJelly asserts without a message, or takes what gives no spikes.
        LIFParameters(tau, decay_input, v_threshold, v_reset, detach_reset, surrogate_function)
        flags = {"decay_input": decay_input, "detach_reset": detach_reset, "store_v_seq": store_v_seq}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise InputError(f"{name} must be True or False, got {value!r}")
        if isinstance(surrogate_function, type) or not callable(surrogate_function):
            raise InputError(
                "surrogate_function must be one of SpikingJelly's, such as surrogate.ATan(), got"
                f" {surrogate_function!r}"
            )
        super().__init__(
            tau=tau,
            decay_input=decay_input,
            # One that integrates and never fires; the soft reset would subtract infinity times 0.
            v_threshold=_finite("v_threshold", v_threshold, or_infinite=v_reset is not None),
            v_reset=None if v_reset is None else _finite("v_reset", v_reset),
            surrogate_function=surrogate_function,
            detach_reset=detach_reset,
            step_mode=step_mode,
            store_v_seq=store_v_seq,
        )
        self.backend = backend

    @property
    def backend(self) -> Backend:
        """What runs the neuron: "auto", "cupy", "c" or "torch"."""
        return self._backend

    @backend.setter
    def backend(self, value: Backend) -> None:
        if value not in get_args(Backend):
            raise InputError(f"backend must be one of {', '.join(get_args(Backend))}, got {value!r}")
        self._backend = value

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend}"

    @classmethod
    def from_parameters(
        cls, parameters: LIFParameters, backend: Backend = "auto", keeps_state: bool = True
    ) -> "LIFNode":
        """Return a neuron layer for sequences, such as one of ``PRESETS``, with a surrogate of its own."""
        node = cls(
            parameters.tau,
            parameters.decay_input,
            parameters.v_threshold,
            parameters.v_reset,
            deepcopy(parameters.surrogate),
            parameters.detach_reset,
            backend=backend,
        )
        node.keeps_state = keeps_state
        return node

    def lif_parameters(self) -> LIFParameters:
        """Return the neuron's constants as they are now."""
        # Read at every call: SpikingJelly users change tau and v_threshold on a live module.
        tau, v_threshold, v_reset = map(compiled_constant, (self.tau, self.v_threshold, self.v_reset))
        return LIFParameters(tau, self.decay_input, v_threshold, v_reset, self.detach_reset, self.surrogate_function)

    def kernel_parameters(self) -> LIFParameters:
        """Return :meth:`lif_parameters` of a neuron that the kernels have, one object for equal constants."""
        if torch.compiler.is_compiling():
            return self.lif_parameters()
        function = self.surrogate_function
        surrogate_arguments = type(function).__name__, float(function.alpha)
        constants = self.tau, self.decay_input, self.v_threshold, self.v_reset, self.detach_reset
        return LIFParameters.unflatten(*constants, *surrogate_arguments)

    def chosen_backend(self, x_seq: Tensor) -> Choice:
        """Return what runs this neuron on ``x_seq``; raises InputError if the kernels are asked for and cannot.

        They do not for backend "auto" where something but torch.compile watches or rewrites operations.
        """
        if self.backend == "auto" and watched(x_seq):
            return "torch"
        return backend.choose_backend(self.backend, x_seq, unsupported_reason(self.surrogate_function))

    def explain_backend(self, x_seq: Tensor) -> tuple[Choice, str]:
        """Return what :meth:`chosen_backend` does, and why, in a line; logs nothing."""
        if self.backend == "auto" and watched(x_seq):
            return "torch", "something watches or rewrites the operations"
        return backend.explain_backend(self.backend, x_seq, unsupported_reason(self.surrogate_function))

    def runs_kernels(self, x_seq: Tensor) -> bool:
        """Return whether the kernels run this neuron on ``x_seq``; see :meth:`chosen_backend`."""
        return self.chosen_backend(x_seq) != "torch"

    def materialize_states(self, inputs: tuple, states: tuple, step_mode: str) -> tuple:
        """Return the membrane potential as a float32 (float64 for float64 input) tensor of one frame's shape.

        For the kernels a fresh state stays the number that all neurons start from: nothing to write and read.
        """
        frame = inputs[0][0] if step_mode == "m" else inputs[0]
        dtype = torch.float64 if frame.dtype == torch.float64 else torch.float32
        v = states[0]
        if isinstance(v, Tensor) and v.shape == frame.shape:
            return (v.to(device=frame.device, dtype=dtype),)
        start = v if isinstance(v, int | float) else self.v_reset or 0.0
        if step_mode == "m" and not self.store_v_seq and self.runs_kernels(inputs[0]):
            return (start,)
        return (torch.full_like(frame, start, dtype=dtype, requires_grad=False),)

    def multi_step_forward(self, x_seq: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the spikes [T, ...] of a sequence; see the class for what remains of it."""
        refuse_symbolic(x_seq)
        if self.backend == "c" and x_seq.dtype in HALF_PRECISION:
            # Of autocast, which the layers beside it follow. In float32, as the membrane potential is, nothing changes.
            # Not self's: a subclass that does something of its own would do it twice.
            return LIFNode.multi_step_forward(self, x_seq.float(), *args, **kwargs).to(x_seq.dtype)
        if self.keeps_state:
            return super().multi_step_forward(x_seq, *args, **kwargs)
        start = self.get_reset_value("v")
        if not self.store_v_seq:
            states = self.materialize_states((x_seq,), (start,), "m")
            return self.multi_step_functional_forward((x_seq,), states)[0][0]
        self.v = start
        spikes = super().multi_step_forward(x_seq)
        self.v = start
        return spikes

    def single_step_functional_forward(self, inputs: tuple, states: tuple, **kwargs: object) -> tuple:
        """Advance one time step: ((spikes,), (membrane potential,))."""
        spike, v = lif.step(inputs[0], states[0], self.lif_parameters())
        return (spike,), (v,)

    def multi_step_functional_forward(self, inputs: tuple, states: tuple, **kwargs: object) -> tuple:
        """Advance all time steps: ((spikes [T, ...],), (final membrane potential,))."""
        x_seq, v = inputs[0], states[0]
        if self.runs_kernels(x_seq):
            spikes, v = lif.lif(x_seq, v, self.lif_parameters())
        else:
            spikes, v = self._multi_step_torch(x_seq, v)
        return (spikes,), (v,)

    def _multi_step_torch(self, x_seq: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if watched(x_seq):
            return lif.reference(x_seq, v, self.lif_parameters())
        # A compiler sees more in the operations of a plain loop than in a function that writes into given memory.
        in_place = x_seq.device.type == "cpu" and not torch.compiler.is_compiling()
        if in_place and unsupported_reason(self.surrogate_function) is None:
            return lif_cpu.lif_cpu(x_seq, v, self.lif_parameters())
        if (
            self.v_reset is not None
            and type(self.surrogate_function) in _FUSED_IN_SPIKINGJELLY
            and x_seq.dtype != torch.float64
        ):
            # SpikingJelly fires on h >= threshold; the next float32 above the threshold makes that h > threshold.
            neuron = self.lif_parameters()
            above = _next_float32(neuron.v_threshold)
            spikes, v, _ = functional.lif_multi_step(
                x_seq,
                v,
                neuron.tau,
                neuron.decay_input,
                above,
                neuron.v_reset,
                neuron.surrogate,
                neuron.detach_reset,
            )
            return spikes, v
        # SpikingJelly has no fused operation for the other surrogates and for float64 and would go step by step too;
        # a soft reset would subtract the shifted threshold.
        return lif.reference(x_seq, v, self.lif_parameters())
