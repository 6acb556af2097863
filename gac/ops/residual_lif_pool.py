"""The last residual sum, LIF layer and average over each image in one pass: specification, operators, public function.

The kernels (``kernels/residual_lif_pool.cu``) write neither the sum (the membrane stream) nor the spikes nor the
gradient of the spikes: the backward pass computes the sum again from what was added. Its second pass is that of
:mod:`gac.ops.residual_lif`.
"""

import torch
from torch import Tensor

from gac.ops import batch_norm, channels, operators, residual_lif
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.cuda import compiler, launch
from gac.ops.neuron import LIFParameters


def reference(
    y: Tensor,
    normalization: BatchNormTransform,
    shortcut: Tensor,
    shortcut_normalization: BatchNormTransform | None,
    neuron: LIFParameters,
) -> Tensor:
    """Return the firing rates of :func:`residual_lif_pool` in plain torch; the specification."""
    _, spikes = residual_lif.reference(y, normalization, shortcut, shortcut_normalization, neuron)
    return spikes.mean((-2, -1), dtype=torch.promote_types(y.dtype, torch.float32)).to(y.dtype)


def residual_lif_pool(
    y: Tensor,
    normalization: BatchNormTransform,
    shortcut: Tensor,
    shortcut_normalization: BatchNormTransform | None,
    neuron: LIFParameters,
) -> Tensor:
    """Return the firing rates of the LIF layer that reads the membrane stream BatchNorm(y) + shortcut.

    A rate is that of a channel in an image at a time step: the number nearest to the exact one for the spikes that
    :func:`~gac.ops.residual_lif.residual_lif` gives; torch's mean on a GPU may differ from it in the last bit. For the
    backward pass ``y`` and ``shortcut`` are kept. There is no second derivative.

    Args:
        y: Output of the last block's last convolution, [T, B, C, H, W] with T <= 16, float32, float16 or bfloat16.
        normalization: Its BatchNorm.
        shortcut: The block's input, or the output of the shortcut's convolution; shape and dtype of ``y``.
        shortcut_normalization: The shortcut's BatchNorm, or None to add it as it is.
        neuron: That of the network's last LIF layer, which starts from its reset potential. Its surrogate is one of
            SpikingJelly's PiecewiseQuadratic, Rect, Sigmoid and ATan.

    Returns:
        Firing rates [T, B, C] in the dtype of ``y``.

    Raises:
        InputError: For inputs of another rank or that differ in shape, dtype or device, empty input, T > 16, an
            unsupported surrogate or dtype, and normalisations that do not fit.
    """
    terms = residual_lif.terms_of_sum(y, normalization, shortcut, shortcut_normalization)
    neuron.check_kernels(y.dtype)
    return _operator(*terms, neuron)


operators.define("gac::residual_lif_pool", f"({residual_lif.TERMS}, LIF neuron) -> Tensor")
operators.define(
    "gac::residual_lif_pool_backward_sums",
    f"(Tensor grad_pooled, {residual_lif.TENSORS_OF_SUM}, LIF neuron) -> (Tensor grad, Tensor sums)",
)


@operators.outputs("gac::residual_lif_pool")
def _pooled_like(y: Tensor, *_: object) -> Tensor:
    return y.new_empty(y.shape[:3])


@operators.outputs("gac::residual_lif_pool_backward_sums")
def _gradient_and_sums(grad_pooled: Tensor, y: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    *_, shortcut_inverse_std, _ = others
    sums = y.new_empty(2 if shortcut_inverse_std is None else 3, y.shape[2], dtype=torch.float32)
    return channels.empty_channels_last(y.shape, y), sums


@operators.implement("gac::residual_lif_pool")
def _residual_lif_pool(
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
    neuron: LIFParameters,
) -> Tensor:
    y, shortcut = channels.channels_last(y), channels.channels_last(shortcut)
    pooled = _pooled_like(y)
    normalization = (weight, bias, mean, inverse_std)
    shortcut_normalization = (shortcut_weight, shortcut_bias, shortcut_mean, shortcut_inverse_std)
    T, B, C, H, W = y.shape
    width = channels.fitting_width(T, C, y, shortcut, *normalization, *shortcut_normalization)
    normalized = shortcut_weight is not None
    template = (T, width, neuron.forward_template, normalized)
    kernel = compiler.make_kernel("residual_lif_pool.cu", "residual_lif_pool_forward", y.dtype, *template)
    terms = (y, normalization, shortcut, shortcut_normalization if normalized else None)
    columns = -(-C // (width * channels.THREADS))
    launch.launch(kernel, (B, columns), (channels.THREADS,), (*terms, neuron.struct, pooled, B, H * W, C))
    return pooled


@operators.implement("gac::residual_lif_pool_backward_sums")
def _backward_sums(
    grad_pooled: Tensor,
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
    neuron: LIFParameters,
) -> tuple[Tensor, Tensor]:
    y, shortcut, grad_pooled = channels.channels_last(y), channels.channels_last(shortcut), grad_pooled.contiguous()
    grad, _ = _gradient_and_sums(grad_pooled, y, shortcut_inverse_std, neuron)
    normalization = (weight, bias, mean, inverse_std)
    shortcut_normalization = (shortcut_weight, shortcut_bias, shortcut_mean, shortcut_inverse_std)
    T, B, C, H, W = y.shape
    tensors = (y, shortcut, grad_pooled, *normalization, *shortcut_normalization)
    width = channels.fitting_width(T, C, *tensors, backward=True)
    normalized = shortcut_weight is not None
    template = (T, width, neuron.backward_template, normalized)
    kernel = compiler.make_kernel("residual_lif_pool.cu", "residual_lif_pool_backward_sums", y.dtype, *template)
    blocks, columns = channels.grid(kernel, channels.rows(y), C, width, y.device, reduces=True)
    partials = y.new_empty(blocks, 3 if normalized else 2, C, dtype=torch.float32)
    terms = (y, normalization, shortcut, shortcut_normalization if normalized else None)
    arguments = (grad_pooled, *terms, neuron.struct, grad, partials, B, H * W, C)
    launch.launch(kernel, (blocks, columns), (channels.THREADS,), arguments)
    return grad, batch_norm.total_of_partials(partials, inverse_std, shortcut_inverse_std)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.from_batch, ctx.synchronized, ctx.neuron = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad, sums = operators.call("gac::residual_lif_pool_backward_sums", grad_pooled, *saved, ctx.neuron)
    y, weight, _, mean, inverse_std, shortcut, shortcut_weight, _, *shortcut_statistics = saved
    of_shortcut = (None if shortcut_weight is None else shortcut, shortcut_weight, *shortcut_statistics)
    return residual_lif.gradients_of_terms(ctx, grad, sums, y, weight, mean, inverse_std, *of_shortcut)


_operator = operators.differentiable("gac::residual_lif_pool", _setup_context, _backward)
