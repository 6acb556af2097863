"""The end of a residual block and the next LIF layer in one pass: specification, operators, public function.

The kernels (``kernels/residual_lif.cu``) add the normalised output of the block's last convolution to the shortcut,
write the sum (the membrane stream) and, in the same pass, the spikes of the LIF layer that reads it. The backward
pass adds both gradients of the membrane stream on the way.
"""

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from gac.errors import InputError
from gac.ops import batch_norm, channels, lif, operators
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.cuda import compiler, launch
from gac.ops.neuron import LIFParameters


def reference(
    y: Tensor,
    normalization: BatchNormTransform,
    shortcut: Tensor,
    shortcut_normalization: BatchNormTransform | None,
    neuron: LIFParameters | None,
) -> tuple[Tensor, Tensor | None]:
    """Return membrane stream and spikes of :func:`residual_lif` in plain torch; the specification.

    The sum is rounded to the dtype of ``y`` before the LIF layer sees it.
    """
    added = shortcut if shortcut_normalization is None else batch_norm.reference(shortcut, shortcut_normalization)
    membrane = (batch_norm.reference(y, normalization) + added).to(y.dtype)
    if neuron is None:
        return membrane, None
    return membrane, lif.reference(membrane, neuron.v_start, neuron)[0]


def residual_lif(
    y: Tensor,
    normalization: BatchNormTransform,
    shortcut: Tensor,
    shortcut_normalization: BatchNormTransform | None,
    neuron: LIFParameters | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the membrane stream BatchNorm(y) + shortcut, and the spikes of the LIF layer that reads it.

    Both are bit-equal to ``reference`` for equal statistics. For the backward pass ``y``, the membrane stream and a
    shortcut that is normalised are kept. There is no second derivative.

    Args:
        y: Output of the block's last convolution, [T, B, C, H, W] with T <= 16, float32, float16 or bfloat16.
        normalization: Its BatchNorm.
        shortcut: The block's input, or the output of the shortcut's convolution; shape and dtype of ``y``.
        shortcut_normalization: The shortcut's BatchNorm, or None to add it as it is.
        neuron: That of the next LIF layer, which starts from its reset potential; None if there is none. Its surrogate
            is one of SpikingJelly's PiecewiseQuadratic, Rect, Sigmoid and ATan.

    Returns:
        Membrane stream and spikes [T, B, C, H, W] in the dtype of ``y``, frames in channels_last; None for the spikes
        if there is no LIF layer.

    Raises:
        InputError: For inputs of another rank or that differ in shape, dtype or device, empty input, T > 16, an
            unsupported surrogate or dtype, and normalisations that do not fit.
    """
    terms = terms_of_sum(y, normalization, shortcut, shortcut_normalization)
    if neuron is not None:
        neuron.check_kernels(y.dtype)
    membrane, spikes = _operator(*terms, neuron is not None, neuron or _NO_NEURON)
    return membrane, None if neuron is None else spikes


def terms_of_sum(
    y: Tensor,
    normalization: BatchNormTransform,
    shortcut: Tensor,
    shortcut_normalization: BatchNormTransform | None,
) -> tuple[Tensor | bool | None, ...]:
    """Return the arguments that ``TERMS`` names. Raises InputError, as :func:`residual_lif`, if they do not fit."""
    channels.check_activations("input of the residual sum", y)
    channels.check_activations("shortcut", shortcut, like=y)
    normalization.check_fits(y)
    of_shortcut, kind = (None,) * 4, (normalization.from_batch, normalization.synchronized)
    if shortcut_normalization is not None:
        shortcut_normalization.check_fits(shortcut)
        of_shortcut = shortcut_normalization.tensors
        if (shortcut_normalization.from_batch, shortcut_normalization.synchronized) != kind:
            raise InputError(
                "the BatchNorms of a residual sum must both be in training or both in evaluation mode, and their "
                "statistics of the same ranks; use backend='torch'"
            )
    return y, *normalization.tensors, shortcut, *of_shortcut, *kind


# Without spikes the neuron chooses a kernel and is not used.
_NO_NEURON = LIFParameters(2.0, False, 1.0, 0.0, True, surrogate.Rect(alpha=1.0))

TENSORS_OF_SUM = (
    f"Tensor y, {BatchNormTransform.SCHEMA}, Tensor shortcut, Tensor? shortcut_weight, Tensor? shortcut_bias, "
    "Tensor? shortcut_mean, Tensor? shortcut_inverse_std"
)
TERMS = f"{TENSORS_OF_SUM}, bool from_batch, bool synchronized"
operators.define("gac::residual_lif", f"({TERMS}, bool with_spikes, LIF neuron) -> (Tensor membrane, Tensor spikes)")
operators.define(
    "gac::residual_lif_backward_sums",
    "(Tensor? grad_membrane, Tensor? grad_spikes, Tensor membrane, Tensor y, Tensor mean, Tensor inverse_std, "
    "Tensor? shortcut, Tensor? shortcut_mean, Tensor? shortcut_inverse_std, "
    "LIF neuron) -> (Tensor grad, Tensor sums)",
)
operators.define(
    "gac::residual_lif_backward_inputs",
    "(Tensor grad, Tensor y, Tensor weight, Tensor mean, Tensor inverse_std, "
    "Tensor? shortcut, Tensor? shortcut_weight, Tensor? shortcut_mean, Tensor? shortcut_inverse_std, "
    "Tensor sums, float inverse_count) -> (Tensor grad_y, Tensor grad_shortcut)",
)


@operators.outputs("gac::residual_lif")
def _outputs(y: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    *_, with_spikes, _ = others
    membrane = channels.empty_channels_last(y.shape, y)
    # An operator returns a fixed number of tensors: what nobody asked for is an empty one.
    return membrane, torch.empty_like(membrane) if with_spikes else y.new_empty(0)


@operators.outputs("gac::residual_lif_backward_sums")
def _gradient_and_sums(
    grad_membrane: Tensor | None,
    grad_spikes: Tensor | None,
    membrane: Tensor,
    y: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    shortcut: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    quantities = 2 if shortcut is None else 3
    sums = y.new_empty(quantities, y.shape[2], dtype=torch.float32)
    return channels.empty_channels_last(y.shape, y), sums


@operators.outputs("gac::residual_lif_backward_inputs")
def _input_gradients(
    grad: Tensor, y: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor, shortcut: Tensor | None, *_: object
) -> tuple[Tensor, Tensor]:
    grad_y = channels.empty_channels_last(y.shape, y)
    return grad_y, y.new_empty(0) if shortcut is None else torch.empty_like(grad_y)


def _channels_last(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else channels.channels_last(tensor) for tensor in tensors]


@operators.implement("gac::residual_lif")
def _residual_lif(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    shortcut_mean: Tensor | None,
    shortcut_inverse_std: Tensor | None,
    from_batch: bool,
    synchronized: bool,
    with_spikes: bool,
    neuron: LIFParameters,
) -> tuple[Tensor, Tensor]:
    y, shortcut = _channels_last(y, shortcut)
    membrane, spikes = _outputs(y, with_spikes, neuron)
    normalization = (weight, bias, mean, inverse_std)
    shortcut_normalization = (shortcut_weight, shortcut_bias, shortcut_mean, shortcut_inverse_std)
    T, C, rows = y.shape[0], y.shape[2], channels.rows(y)
    width = channels.fitting_width(T, C, y, shortcut, *normalization, *shortcut_normalization)
    normalized = shortcut_weight is not None
    template = (T, width, neuron.forward_template, normalized, with_spikes)
    kernel = compiler.make_kernel("residual_lif.cu", "residual_lif_forward", y.dtype, *template)
    arguments = (y, normalization, shortcut, shortcut_normalization if normalized else None, neuron.struct)
    outputs = (membrane, spikes if with_spikes else None)
    grid = channels.grid(kernel, rows, C, width, y.device)
    launch.launch(kernel, grid, (channels.THREADS,), (*arguments, *outputs, rows, C))
    return membrane, spikes


@operators.implement("gac::residual_lif_backward_sums")
def _backward_sums(
    grad_membrane: Tensor | None,
    grad_spikes: Tensor | None,
    membrane: Tensor,
    y: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    shortcut: Tensor | None,
    shortcut_mean: Tensor | None,
    shortcut_inverse_std: Tensor | None,
    neuron: LIFParameters,
) -> tuple[Tensor, Tensor]:
    grad_membrane = channels.gradient_or_zeros(grad_membrane, y.shape, y)
    grad_spikes, membrane, y, shortcut = _channels_last(grad_spikes, membrane, y, shortcut)
    sequences = (grad_membrane, grad_spikes, membrane, y)
    grad, _ = _gradient_and_sums(None, None, membrane, y, mean, inverse_std, shortcut)
    T, C, rows = y.shape[0], y.shape[2], channels.rows(y)
    width = channels.fitting_width(T, C, y, *sequences, mean, shortcut, shortcut_mean, backward=True)
    template = (T, width, neuron.backward_template, shortcut is not None, grad_spikes is not None)
    kernel = compiler.make_kernel("residual_lif.cu", "residual_lif_backward_sums", y.dtype, *template)
    blocks, columns = channels.grid(kernel, rows, C, width, y.device, reduces=True)
    partials = y.new_empty(blocks, 2 if shortcut is None else 3, C, dtype=torch.float32)
    arguments = (*sequences, mean, shortcut, shortcut_mean, neuron.struct, grad, partials, rows, C)
    launch.launch(kernel, (blocks, columns), (channels.THREADS,), arguments)
    return grad, batch_norm.total_of_partials(partials, inverse_std, shortcut_inverse_std)


@operators.implement("gac::residual_lif_backward_inputs")
def _backward_inputs(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    shortcut: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_mean: Tensor | None,
    shortcut_inverse_std: Tensor | None,
    sums: Tensor,
    inverse_count: float,
) -> tuple[Tensor, Tensor]:
    grad, y, shortcut = _channels_last(grad, y, shortcut)
    grad_y, grad_shortcut = _input_gradients(grad, y, weight, mean, inverse_std, shortcut)
    normalization = (weight, mean, inverse_std)
    shortcut_normalization = (shortcut_weight, shortcut_mean, shortcut_inverse_std)
    T, C, rows = y.shape[0], y.shape[2], channels.rows(y)
    width = channels.fitting_width(T, C, y, grad, shortcut, *normalization, *shortcut_normalization, sums)
    template = (T, width, shortcut is not None)
    kernel = compiler.make_kernel("residual_lif.cu", "residual_lif_backward_inputs", y.dtype, *template)
    arguments = (grad, y, *normalization, shortcut, *shortcut_normalization, sums, inverse_count)
    outputs = (grad_y, None if shortcut is None else grad_shortcut)
    grid = channels.grid(kernel, rows, C, width, y.device)
    launch.launch(kernel, grid, (channels.THREADS,), (*arguments, *outputs, rows, C))
    return grad_y, grad_shortcut


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    y, weight, _, mean, inverse_std, shortcut, *shortcut_tensors, ctx.from_batch, ctx.synchronized = inputs[:12]
    shortcut_weight, _, shortcut_mean, shortcut_inverse_std = shortcut_tensors
    ctx.with_spikes, ctx.neuron = inputs[12:]
    # A shortcut that is added as it is has the gradient of the sum: its values are not needed.
    kept = None if shortcut_weight is None else shortcut
    ctx.save_for_backward(
        output[0], y, weight, mean, inverse_std, kept, shortcut_weight, shortcut_mean, shortcut_inverse_std
    )
    ctx.set_materialize_grads(False)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_membrane: Tensor | None, grad_spikes: Tensor | None
) -> tuple[Tensor | None, ...]:
    membrane, y, weight, *statistics, shortcut, shortcut_weight, shortcut_mean, shortcut_inverse_std = ctx.saved_tensors
    grad, sums = operators.call(
        "gac::residual_lif_backward_sums",
        grad_membrane,
        # Compiled graphs pass a gradient of the empty tensor that stands for no spikes.
        grad_spikes if ctx.with_spikes else None,
        membrane,
        y,
        *statistics,
        shortcut,
        shortcut_mean,
        shortcut_inverse_std,
        ctx.neuron,
    )
    of_shortcut = (shortcut, shortcut_weight, shortcut_mean, shortcut_inverse_std)
    return gradients_of_terms(ctx, grad, sums, y, weight, *statistics, *of_shortcut)


def gradients_of_terms(
    ctx: torch.autograd.function.FunctionCtx,
    grad: Tensor,
    sums: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    shortcut: Tensor | None,
    *of_shortcut: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``TENSORS_OF_SUM`` from that of the sum, ``grad``, and its sums.

    ``shortcut`` and ``of_shortcut`` (weight, mean and inverse standard deviation) are None where it is added as it is.
    """
    means = batch_norm.gradient_sums(sums, y.numel() // y.shape[2], ctx.from_batch, ctx.synchronized)
    arguments = (grad, y, weight, mean, inverse_std, shortcut, *of_shortcut, *means)
    grad_y, grad_shortcut = operators.call("gac::residual_lif_backward_inputs", *arguments)
    grad_bias, grad_weight, *grad_shortcut_weight = sums.unbind()
    of_normalization = (grad_weight, grad_bias, None, None)
    if shortcut is None:
        return grad_y, *of_normalization, grad, None, None, None, None
    # A copy: autograd makes these the parameters' .grad, and two of them must not share memory.
    return grad_y, *of_normalization, grad_shortcut, *grad_shortcut_weight, grad_bias.clone(), None, None


_operator = operators.differentiable("gac::residual_lif", _setup_context, _backward)
