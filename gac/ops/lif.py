"""The leaky integrate-and-fire neuron over T time steps: specification, operators and public function.

``reference`` is the specification, and what runs without kernels. ``lif`` runs the same neuron as one kernel each way
(``kernels/lif.cu``), registered as ``gac::lif_forward`` and ``gac::lif_backward``.
"""

import torch
from torch import Tensor

from gac.errors import InputError
from gac.ops import channels, operators
from gac.ops.cuda import compiler, launch
from gac.ops.cuda.compiler import Kernel
from gac.ops.neuron import SURROGATES, LIFParameters


def step(x: Tensor, v: Tensor, neuron: LIFParameters) -> tuple[Tensor, Tensor]:
    """Advance the neuron one time step.

    Args:
        x: Input [...] of any floating-point dtype.
        v: Membrane potential [...], float32 (float64 for float64 ``x``).
        neuron: Its surrogate is any of SpikingJelly's.

    Returns:
        Spikes [...] in the dtype of ``x``, and the next membrane potential [...] in that of ``v``.
    """
    h = neuron.decay * v + neuron.gain * x.to(v.dtype) + neuron.bias
    if torch.jit.is_tracing() and type(neuron.surrogate) in SURROGATES.values() and neuron.surrogate.spiking:
        s = _traced_spikes(h, neuron)
    else:
        # SpikingJelly fires on >=; taking the ties away again leaves its gradient as it is.
        s = neuron.surrogate(h - neuron.v_threshold) - (h == neuron.v_threshold).to(h.dtype)
    s_reset = s.detach() if neuron.detach_reset else s
    if neuron.v_reset is None:
        return s.to(x.dtype), h - s_reset * neuron.v_threshold
    return s.to(x.dtype), (1.0 - s_reset) * h + s_reset * neuron.v_reset


def _traced_spikes(h: Tensor, neuron: LIFParameters) -> Tensor:
    """Return the spikes for potentials ``h``, with the surrogate gradient, in operations that TorchScript can save."""
    s = (h > neuron.v_threshold).to(h.dtype)
    # Not decided by the grad mode: the tracer's own check repeats the recording without it.
    if torch.onnx.is_in_onnx_export():
        return s
    x = h - neuron.v_threshold
    derivative = neuron.surrogate.backward(torch.ones_like(x), x.detach(), neuron.surrogate.alpha)
    # Zero, with the derivative of the surrogate.
    return s + derivative * (x - x.detach())


def reference(x_seq: Tensor, v: Tensor | float, neuron: LIFParameters) -> tuple[Tensor, Tensor]:
    """Run the neuron over T time steps in plain torch, differentiable by autograd, on any device.

    Args:
        x_seq: Input [T, B, ...] of any floating-point dtype.
        v: Membrane potential before the first step: [B, ...] in float32 (float64 for float64 input), or one
            number for all neurons.
        neuron: Its surrogate is any of SpikingJelly's.

    Returns:
        Spikes [T, B, ...] in the dtype of ``x_seq``, and the membrane potential after the last step [B, ...].

    Raises:
        InputError: For empty, integer or scalar input, and for a ``v`` that does not fit it.
    """
    _check_input(x_seq, v)
    if not isinstance(v, Tensor):
        v = torch.full_like(x_seq[0], v, dtype=_state_dtype(x_seq), requires_grad=False)
    spikes = []
    for x in x_seq:
        s, v = step(x, v, neuron)
        spikes.append(s)
    return torch.stack(spikes), v


def lif(x_seq: Tensor, v: Tensor | float, neuron: LIFParameters) -> tuple[Tensor, Tensor]:
    """Run the neuron over T time steps in one kernel each way; spikes are bit-equal to ``reference``.

    For the backward pass only ``x_seq`` is kept, and ``v`` where it is a tensor; membrane potentials are computed
    again. The memory layout of frames (contiguous, channels_last) is that of ``x_seq`` in all results. Nothing is
    cast under autocast. There is no second derivative.

    Args:
        x_seq: Input [T, B, ...], float32, float16 or bfloat16. T <= 16 runs in registers; longer sequences in
            chunks of 16 steps, whose backward pass reads the input twice.
        v: Membrane potential before the first step: float32 [B, ...] (it gets a gradient), or one number.
        neuron: Its surrogate is one of SpikingJelly's PiecewiseQuadratic, Rect, Sigmoid and ATan.

    Returns:
        Spikes [T, B, ...] in the dtype of ``x_seq``, and the float32 membrane potential after the last step
        [B, ...].

    Raises:
        InputError: For an unsupported surrogate or dtype, empty input, and a ``v`` that does not fit the input.
    """
    _check_input(x_seq, v)
    neuron.check_kernels(x_seq.dtype)
    return _operator(
        x_seq,
        v if isinstance(v, Tensor) else None,
        0.0 if isinstance(v, Tensor) else float(v),
        neuron,
    )


def _state_dtype(x_seq: Tensor) -> torch.dtype:
    return torch.float64 if x_seq.dtype == torch.float64 else torch.float32


def _check_input(x_seq: Tensor, v: Tensor | float) -> None:
    if x_seq.ndim < 1 or x_seq.numel() == 0:
        raise InputError(f"LIF input must be a non-empty [T, B, ...], got shape {list(x_seq.shape)}")
    if not x_seq.is_floating_point():
        raise InputError(f"LIF input must be floating point, got {x_seq.dtype}; convert it with .float()")
    if isinstance(v, Tensor):
        wanted = (x_seq.shape[1:], _state_dtype(x_seq), x_seq.device)
        if (v.shape, v.dtype, v.device) != wanted:
            raise InputError(
                f"membrane potential must be {list(wanted[0])}, {wanted[1]}, on {wanted[2]} for this input, "
                f"got {list(v.shape)}, {v.dtype}, on {v.device}"
            )


# The kernels see every tensor as flat [T, N]; all tensors of a call share the order of the N neurons.
def _flat_strides(x_seq: Tensor) -> tuple[int, ...]:
    """Return the strides of a dense tensor like ``x_seq``: time outermost, its frames' order of dimensions kept."""
    shape, strides = x_seq.shape[1:], x_seq.stride()[1:]
    # Outermost first; an expanded dimension (stride 0) has no place in memory and goes outside.
    order = sorted(range(len(shape)), key=lambda dim: (strides[dim] != 0, -strides[dim], dim))
    dense = [0] * len(shape)
    size = 1
    for dim in reversed(order):
        dense[dim] = size
        size *= shape[dim]
    return (size, *dense)


def _with_strides(tensor: Tensor | None, strides: tuple[int, ...]) -> Tensor | None:
    if tensor is None or _same_strides(tensor, strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _same_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    return all(size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))


_THREADS = 128  # kThreads in kernels/lif.cu
_CHUNK = 16  # time steps whose membrane potentials fit into registers


def forward_kernel(dtype: torch.dtype, T: int, width: int, neuron: str) -> Kernel:
    """Return the forward kernel for T time steps (all T > 16 share one) and ``width`` neurons a thread.

    ``neuron`` is a :attr:`~gac.ops.neuron.LIFParameters.forward_template`.
    """
    return compiler.make_kernel("lif.cu", "lif_forward", dtype, min(T, _CHUNK), T <= _CHUNK, width, neuron)


def backward_kernel(dtype: torch.dtype, T: int, width: int, neuron: str) -> Kernel:
    """Return the backward kernel for T time steps (all T > 16 share one) and ``width`` neurons a thread.

    ``neuron`` is a :attr:`~gac.ops.neuron.LIFParameters.backward_template`.
    """
    return compiler.make_kernel("lif.cu", "lif_backward", dtype, min(T, _CHUNK), T <= _CHUNK, width, neuron)


def vector_width(dtype: torch.dtype, T: int) -> int:
    """Return how many neurons a thread takes where all addresses are multiples of 16 bytes."""
    # A backward thread holds min(T, 16) x width potentials in registers beside as many inputs and gradients;
    # with more than these widths the compiler spills.
    if dtype == torch.float32:
        return 4 if T <= _CHUNK else 2
    return 8 if T <= 8 else 4


def _width(T: int, neurons: int, sequence: Tensor, *others: Tensor | None) -> int:
    return channels.narrowed_width(vector_width(sequence.dtype, T), neurons, sequence, *others)


def _launch(kernel: Kernel, neurons: int, width: int, arguments: tuple[Tensor | float | None, ...]) -> None:
    blocks = -(-neurons // (_THREADS * width))
    launch.launch(kernel, (blocks,), (_THREADS,), arguments)


_STATE = "Tensor? v_init, float v_start"
operators.define(
    "gac::lif_forward",
    f"(Tensor x_seq, {_STATE}, LIF neuron) -> (Tensor spikes, Tensor v_final)",
)
operators.define(
    "gac::lif_backward",
    f"(Tensor? grad_spikes, Tensor? grad_v_final, Tensor x_seq, {_STATE}, bool need_grad_x, bool need_grad_v, "
    "LIF neuron) -> (Tensor grad_x, Tensor grad_v_init)",
)


@operators.outputs("gac::lif_forward")
def _forward_outputs(x_seq: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    strides = _flat_strides(x_seq)
    spikes = torch.empty_strided(x_seq.shape, strides, dtype=x_seq.dtype, device=x_seq.device)
    v_final = torch.empty_strided(x_seq.shape[1:], strides[1:], dtype=torch.float32, device=x_seq.device)
    return spikes, v_final


@operators.outputs("gac::lif_backward")
def _backward_outputs(
    grad_spikes: Tensor | None, grad_v_final: Tensor | None, x_seq: Tensor, *others: object
) -> tuple[Tensor, Tensor]:
    *_, need_grad_x, need_grad_v, _ = others
    grad_x, grad_v_init = _forward_outputs(x_seq)
    # An operator returns a fixed number of tensors: a gradient that nobody asked for is an empty one.
    return grad_x if need_grad_x else grad_x.new_empty(0), grad_v_init if need_grad_v else grad_v_init.new_empty(0)


@operators.implement("gac::lif_forward")
def _forward_on_device(
    x_seq: Tensor, v_init: Tensor | None, v_start: float, neuron: LIFParameters
) -> tuple[Tensor, Tensor]:
    T, neurons = x_seq.shape[0], x_seq[0].numel()
    strides = _flat_strides(x_seq)
    x_seq, v_init = _with_strides(x_seq, strides), _with_strides(v_init, strides[1:])
    spikes, v_final = _forward_outputs(x_seq)
    width = _width(T, neurons, x_seq, v_init, spikes, v_final)
    kernel = forward_kernel(x_seq.dtype, T, width, neuron.forward_template)
    _launch(kernel, neurons, width, (x_seq, v_init, v_start, neuron.struct, spikes, v_final, neurons, T))
    return spikes, v_final


@operators.implement("gac::lif_backward")
def _backward_on_device(
    grad_spikes: Tensor | None,
    grad_v_final: Tensor | None,
    x_seq: Tensor,
    v_init: Tensor | None,
    v_start: float,
    need_grad_x: bool,
    need_grad_v: bool,
    neuron: LIFParameters,
) -> tuple[Tensor, Tensor]:
    T, neurons = x_seq.shape[0], x_seq[0].numel()
    strides = _flat_strides(x_seq)
    x_seq, grad_spikes = _with_strides(x_seq, strides), _with_strides(grad_spikes, strides)
    v_init, grad_v_final = _with_strides(v_init, strides[1:]), _with_strides(grad_v_final, strides[1:])
    grad_x, grad_v_init = _backward_outputs(None, None, x_seq, need_grad_x, need_grad_v, neuron)
    v_boundary = None
    if T > _CHUNK:
        boundaries = (T - 1) // _CHUNK
        v_boundary = torch.empty(boundaries, neurons, dtype=torch.float32, device=x_seq.device)
    outgoing = (grad_x if need_grad_x else None, grad_v_init if need_grad_v else None, v_boundary)
    width = _width(T, neurons, x_seq, grad_spikes, grad_v_final, v_init, *outgoing)
    kernel = backward_kernel(x_seq.dtype, T, width, neuron.backward_template)
    incoming = (grad_spikes, grad_v_final, x_seq, v_init, v_start)
    _launch(kernel, neurons, width, (*incoming, neuron.struct, *outgoing, neurons, T))
    return grad_x, grad_v_init


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x_seq, v_init, ctx.v_start, ctx.neuron = inputs
    ctx.save_for_backward(x_seq, v_init)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_spikes: Tensor | None, grad_v_final: Tensor | None
) -> tuple[Tensor | None, ...]:
    x_seq, v_init = ctx.saved_tensors
    need_grad_x, need_grad_v, *_ = ctx.needs_input_grad
    grad_x, grad_v_init = operators.call(
        "gac::lif_backward", grad_spikes, grad_v_final, x_seq, v_init, ctx.v_start, need_grad_x, need_grad_v, ctx.neuron
    )
    return grad_x if need_grad_x else None, grad_v_init if need_grad_v else None


_operator = operators.differentiable("gac::lif_forward", _setup_context, _backward)
