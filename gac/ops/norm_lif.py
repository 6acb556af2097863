"""BatchNorm, then the LIF neuron over T time steps, in one pass: specification, operators, public function.

The kernels (``kernels/norm_lif.cu``) read the convolution's output and write spikes, nothing else. The backward pass
computes normalised input and membrane potentials again: once for the two sums per channel that BatchNorm's gradient
needs, once for the gradient of the input.
"""

import torch
from torch import Tensor

from gac.ops import batch_norm, channels, lif, operators
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.cuda import compiler, launch
from gac.ops.neuron import LIFParameters


def reference(
    y: Tensor,
    normalization: BatchNormTransform,
    neuron: LIFParameters,
) -> Tensor:
    """Return the spikes of :func:`norm_lif` in plain torch, on any device; the specification.

    Differentiable by autograd, through the statistics too where they come from
    :func:`~gac.ops.batch_norm.reference_moments`. Normalised values are not rounded to the dtype of ``y``.
    """
    z = batch_norm.reference(y, normalization)
    return lif.reference(z, neuron.v_start, neuron)[0].to(y.dtype)


def norm_lif(
    y: Tensor,
    normalization: BatchNormTransform,
    neuron: LIFParameters,
) -> Tensor:
    """Return the spikes of a LIF layer whose input is ``y`` after BatchNorm, starting from the reset potential.

    Spikes are bit-equal to ``reference`` for equal statistics. Only ``y`` is kept for the backward pass; where
    ``normalization.from_batch`` the gradient includes that of the statistics. There is no second derivative.

    Args:
        y: Convolution output [T, B, C, H, W] with T <= 16, float32, float16 or bfloat16; channels_last frames are
            used as they are, others copied.
        normalization: The map of each channel, float32.
        neuron: Its surrogate is one of SpikingJelly's PiecewiseQuadratic, Rect, Sigmoid and ATan.

    Returns:
        Spikes [T, B, C, H, W] in the dtype of ``y``, frames in channels_last.

    Raises:
        InputError: For an input of another rank, empty input, T > 16, an unsupported surrogate or dtype, and a
            normalisation that does not fit.
    """
    channels.check_activations("input of BatchNorm and LIF", y)
    normalization.check_fits(y)
    neuron.check_kernels(y.dtype)
    return _operator(y, *normalization.tensors, normalization.from_batch, normalization.synchronized, neuron)


operators.define(
    "gac::norm_lif",
    f"(Tensor y, {BatchNormTransform.SCHEMA}, bool from_batch, bool synchronized, LIF neuron) -> Tensor",
)
operators.define(
    "gac::norm_lif_backward_sums",
    f"(Tensor grad_spikes, Tensor y, {BatchNormTransform.SCHEMA}, LIF neuron) -> Tensor",
)
operators.define(
    "gac::norm_lif_backward_input",
    f"(Tensor grad_spikes, Tensor y, {BatchNormTransform.SCHEMA}, Tensor sums, float inverse_count, LIF neuron) "
    "-> Tensor",
)


@operators.outputs("gac::norm_lif")
def _spikes_like(y: Tensor, *_: object) -> Tensor:
    return channels.empty_channels_last(y.shape, y)


@operators.outputs("gac::norm_lif_backward_sums")
def _sums_like(grad_spikes: Tensor, y: Tensor, *_: object) -> Tensor:
    return y.new_empty(2, y.shape[2], dtype=torch.float32)


@operators.outputs("gac::norm_lif_backward_input")
def _gradient_like(grad_spikes: Tensor, y: Tensor, *_: object) -> Tensor:
    return channels.empty_channels_last(y.shape, y)


@operators.implement("gac::norm_lif")
def _norm_lif(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    from_batch: bool,
    synchronized: bool,
    neuron: LIFParameters,
) -> Tensor:
    y = channels.channels_last(y)
    spikes = _spikes_like(y)
    T, C, rows = y.shape[0], y.shape[2], channels.rows(y)
    width = channels.fitting_width(T, C, y, weight, bias, mean, inverse_std)
    template = (T, width, neuron.forward_template)
    kernel = compiler.make_kernel("norm_lif.cu", "norm_lif_forward", y.dtype, *template)
    arguments = (y, (weight, bias, mean, inverse_std), neuron.struct, spikes, rows, C)
    launch.launch(kernel, channels.grid(kernel, rows, C, width, y.device), (channels.THREADS,), arguments)
    return spikes


@operators.implement("gac::norm_lif_backward_sums")
def _backward_sums(
    grad_spikes: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    neuron: LIFParameters,
) -> Tensor:
    y, grad_spikes = channels.channels_last(y), channels.channels_last(grad_spikes)
    T, C, rows = y.shape[0], y.shape[2], channels.rows(y)
    width = channels.fitting_width(T, C, y, grad_spikes, weight, bias, mean, inverse_std, backward=True)
    template = (T, width, neuron.backward_template)
    kernel = compiler.make_kernel("norm_lif.cu", "norm_lif_backward_sums", y.dtype, *template)
    blocks, columns = channels.grid(kernel, rows, C, width, y.device, reduces=True)
    partials = y.new_empty(blocks, 2, C, dtype=torch.float32)
    arguments = (grad_spikes, y, (weight, bias, mean, inverse_std), neuron.struct, partials, rows, C)
    launch.launch(kernel, (blocks, columns), (channels.THREADS,), arguments)
    return batch_norm.total_of_partials(partials, inverse_std)


@operators.implement("gac::norm_lif_backward_input")
def _backward_input(
    grad_spikes: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    sums: Tensor,
    inverse_count: float,
    neuron: LIFParameters,
) -> Tensor:
    y, grad_spikes = channels.channels_last(y), channels.channels_last(grad_spikes)
    grad_y = _gradient_like(grad_spikes, y)
    T, C, rows = y.shape[0], y.shape[2], channels.rows(y)
    width = channels.fitting_width(T, C, y, grad_spikes, weight, bias, mean, inverse_std, sums, backward=True)
    template = (T, width, neuron.backward_template)
    kernel = compiler.make_kernel("norm_lif.cu", "norm_lif_backward_input", y.dtype, *template)
    arguments = (grad_spikes, y, (weight, bias, mean, inverse_std), neuron.struct, sums, inverse_count, grad_y, rows, C)
    launch.launch(kernel, channels.grid(kernel, rows, C, width, y.device), (channels.THREADS,), arguments)
    return grad_y


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    y, weight, bias, mean, inverse_std, ctx.from_batch, ctx.synchronized, ctx.neuron = inputs
    ctx.save_for_backward(y, weight, bias, mean, inverse_std)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_spikes: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    sums = operators.call("gac::norm_lif_backward_sums", grad_spikes, *saved, ctx.neuron)
    y = saved[0]
    means = batch_norm.gradient_sums(sums, y.numel() // y.shape[2], ctx.from_batch, ctx.synchronized)
    grad_y = operators.call("gac::norm_lif_backward_input", grad_spikes, *saved, *means, ctx.neuron)
    grad_bias, grad_weight = sums.unbind()
    return grad_y, grad_weight, grad_bias


_operator = operators.differentiable("gac::norm_lif", _setup_context, _backward)
