"""The last LIF layer and the average of its spikes over each image: specification, CUDA operators, public function."""

import torch
from torch import Tensor

from gac.ops import channels, lif, operators
from gac.ops.cuda import compiler, launch
from gac.ops.neuron import LIFParameters


def reference(x: Tensor, neuron: LIFParameters) -> Tensor:
    """Return the firing rates of :func:`lif_pool` in plain torch, on any device; the specification."""
    spikes, _ = lif.reference(x, neuron.v_start, neuron)
    return spikes.mean((-2, -1), dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def lif_pool(x: Tensor, neuron: LIFParameters) -> Tensor:
    """Return the firing rate of each channel, image and time step of a LIF layer, without writing its spikes.

    The layer starts from its reset potential. A rate is the number nearest to the exact one; torch's mean on a GPU may
    differ from it in the last bit. There is no second derivative.

    Args:
        x: Membrane stream [T, B, C, H, W] with T <= 16, float32, float16 or bfloat16.
        neuron: Its surrogate is one of SpikingJelly's PiecewiseQuadratic, Rect, Sigmoid and ATan.

    Returns:
        Firing rates [T, B, C] in the dtype of ``x``.

    Raises:
        InputError: For an input of another rank, empty input, T > 16, an unsupported surrogate or dtype.
    """
    channels.check_activations("input of LIF and pooling", x)
    neuron.check_kernels(x.dtype)
    return _operator(x, neuron)


operators.define("gac::lif_pool", "(Tensor x, LIF neuron) -> Tensor")
operators.define(
    "gac::lif_pool_backward",
    "(Tensor grad_pooled, Tensor x, LIF neuron) -> Tensor",
)


@operators.outputs("gac::lif_pool")
def _pooled_like(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[:3])


@operators.outputs("gac::lif_pool_backward")
def _gradient_like(grad_pooled: Tensor, x: Tensor, *_: object) -> Tensor:
    return channels.empty_channels_last(x.shape, x)


@operators.implement("gac::lif_pool")
def _lif_pool(x: Tensor, neuron: LIFParameters) -> Tensor:
    x = channels.channels_last(x)
    pooled = _pooled_like(x)
    T, B, C, H, W = x.shape
    width = channels.fitting_width(T, C, x)
    template = (T, width, neuron.forward_template)
    kernel = compiler.make_kernel("lif_pool.cu", "lif_pool_forward", x.dtype, *template)
    columns = -(-C // (width * channels.THREADS))
    launch.launch(kernel, (B, columns), (channels.THREADS,), (x, neuron.struct, pooled, B, H * W, C))
    return pooled


@operators.implement("gac::lif_pool_backward")
def _lif_pool_backward(grad_pooled: Tensor, x: Tensor, neuron: LIFParameters) -> Tensor:
    grad_pooled, x = grad_pooled.contiguous(), channels.channels_last(x)
    grad_x = _gradient_like(grad_pooled, x)
    T, B, C, H, W = x.shape
    width = channels.fitting_width(T, C, x, grad_pooled, backward=True)
    template = (T, width, neuron.backward_template)
    kernel = compiler.make_kernel("lif_pool.cu", "lif_pool_backward", x.dtype, *template)
    grid = channels.grid(kernel, B * H * W, C, width, x.device)
    arguments = (grad_pooled, x, neuron.struct, grad_x, B, H * W, C)
    launch.launch(kernel, grid, (channels.THREADS,), arguments)
    return grad_x


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, ctx.neuron = inputs
    ctx.save_for_backward(x)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return (operators.call("gac::lif_pool_backward", grad_pooled, x, ctx.neuron),)


_operator = operators.differentiable("gac::lif_pool", _setup_context, _backward)
