"""The gate of gated attention coding with the LIF layers on both of its sides: specification, operators, function.

An image is the same at every time step, so the kernels (``kernels/gate_lif.cu``) read one frame of it and of the
spatial-channel attention and write T frames of membrane stream and spikes.
"""

import torch
from torch import Tensor

from gac.errors import InputError
from gac.ops import channels, lif, operators
from gac.ops.cuda import compiler, launch
from gac.ops.cuda.compiler import Kernel
from gac.ops.neuron import LIFParameters


def reference(
    x: Tensor,
    temporal: Tensor,
    spatial: Tensor,
    neuron: LIFParameters,
) -> tuple[Tensor, Tensor]:
    """Return membrane stream and spikes of :func:`gate_lif` in plain torch; the specification.

    The gate is float32 (float64 for float64) and rounded to the dtype of ``x`` before the second LIF layer sees it.
    """
    start, exact = neuron.v_start, torch.promote_types(x.dtype, torch.float32)
    encoded, _ = lif.reference(x.expand(len(temporal), *x.shape), start, neuron)
    scores = temporal.to(exact)[:, :, None, None, None] * spatial.to(exact)
    membrane = (torch.sigmoid(scores) * encoded.to(exact)).to(x.dtype)
    return membrane, lif.reference(membrane, start, neuron)[0]


def gate_lif(
    x: Tensor,
    temporal: Tensor,
    spatial: Tensor,
    neuron: LIFParameters,
) -> tuple[Tensor, Tensor]:
    """Return the gated spikes of a static image, and the spikes of the LIF layer that reads them.

    Both LIF layers have the same constants and start from the reset potential. The first turns ``x``, repeated over
    T steps, into spikes s_t; membrane_t = sigmoid(temporal_t * spatial) * s_t; the second turns that into spikes.
    The sigmoid may differ from torch's in the last bit. There is no second derivative.

    Args:
        x: One frame of features [B, C, H, W], float32, float16 or bfloat16.
        temporal: Temporal attention [T, B] with T <= 16; used in float32.
        spatial: Spatial-channel attention [B, C, H, W] in the dtype of ``x``.
        neuron: Both of them; its surrogate is one of SpikingJelly's PiecewiseQuadratic, Rect, Sigmoid and ATan.

    Returns:
        Membrane stream and spikes [T, B, C, H, W] in the dtype of ``x``, frames in channels_last.

    Raises:
        InputError: For shapes that do not fit, empty input, T > 16, an unsupported surrogate or dtype.
    """
    if x.ndim != 4 or temporal.ndim != 2 or temporal.shape[1:] != x.shape[:1] or temporal.device != x.device:
        raise InputError(
            "the gate takes images [B, C, H, W] and temporal attention [T, B] on one device, "
            f"got {list(x.shape)} on {x.device} and {list(temporal.shape)} on {temporal.device}"
        )
    channels.check_activations("input of the gate", x.expand(len(temporal), *x.shape))
    if (spatial.shape, spatial.dtype, spatial.device) != (x.shape, x.dtype, x.device):
        raise InputError(
            f"spatial-channel attention must be {list(x.shape)}, {x.dtype}, on {x.device} like the image, "
            f"got {list(spatial.shape)}, {spatial.dtype}, on {spatial.device}"
        )
    neuron.check_kernels(x.dtype)
    return _operator(x, temporal.float(), spatial, neuron)


operators.define(
    "gac::gate_lif",
    "(Tensor x, Tensor temporal, Tensor spatial, LIF neuron) -> (Tensor membrane, Tensor spikes)",
)
operators.define(
    "gac::gate_lif_backward",
    "(Tensor? grad_membrane, Tensor? grad_spikes, Tensor x, Tensor temporal, Tensor spatial, "
    "LIF neuron) -> (Tensor grad_x, Tensor grad_temporal, Tensor grad_spatial)",
)


@operators.outputs("gac::gate_lif")
def _outputs(x: Tensor, temporal: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    membrane = channels.empty_channels_last(torch.Size((len(temporal), *x.shape)), x)
    return membrane, torch.empty_like(membrane)


@operators.outputs("gac::gate_lif_backward")
def _gradients(
    grad_membrane: Tensor | None, grad_spikes: Tensor | None, x: Tensor, temporal: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = channels.empty_channels_last(x.shape, x)
    return grad_x, temporal.new_empty(temporal.shape), torch.empty_like(grad_x)


# Blocks for each that runs at once: with so many, the last to run leave few multiprocessors idle.
_WAVES = 4


def _blocks_per_image(kernel: Kernel, x: Tensor, width: int) -> int:
    needed = -(-x[0].numel() // (channels.THREADS * width))
    return min(needed, -(-_WAVES * launch.resident_blocks(kernel, channels.THREADS, x.device) // len(x)))


@operators.implement("gac::gate_lif")
def _gate_lif(x: Tensor, temporal: Tensor, spatial: Tensor, neuron: LIFParameters) -> tuple[Tensor, Tensor]:
    x, temporal, spatial = channels.channels_last(x), temporal.contiguous(), channels.channels_last(spatial)
    membrane, spikes = _outputs(x, temporal)
    T, B, size = len(temporal), len(x), x[0].numel()
    width = channels.fitting_width(T, size, x, spatial)
    template = (T, width, neuron.forward_template)
    kernel = compiler.make_kernel("gate_lif.cu", "gate_lif_forward", x.dtype, *template)
    blocks = _blocks_per_image(kernel, x, width)
    arguments = (x, temporal, spatial, neuron.struct, membrane, spikes, B, size, blocks)
    launch.launch(kernel, (B * blocks,), (channels.THREADS,), arguments)
    return membrane, spikes


@operators.implement("gac::gate_lif_backward")
def _gate_lif_backward(
    grad_membrane: Tensor | None,
    grad_spikes: Tensor | None,
    x: Tensor,
    temporal: Tensor,
    spatial: Tensor,
    neuron: LIFParameters,
) -> tuple[Tensor, Tensor, Tensor]:
    x, temporal, spatial = channels.channels_last(x), temporal.contiguous(), channels.channels_last(spatial)
    shape = torch.Size((len(temporal), *x.shape))
    incoming = [channels.gradient_or_zeros(grad, shape, x) for grad in (grad_membrane, grad_spikes)]
    grad_x, _, grad_spatial = _gradients(None, None, x, temporal)
    T, B, size = len(temporal), len(x), x[0].numel()
    width = channels.fitting_width(T, size, x, spatial, *incoming, backward=True)
    template = (T, width, neuron.backward_template)
    kernel = compiler.make_kernel("gate_lif.cu", "gate_lif_backward", x.dtype, *template)
    blocks = _blocks_per_image(kernel, x, width)
    partials = temporal.new_empty(blocks, T, B)
    arguments = (*incoming, x, temporal, spatial, neuron.struct, grad_x, partials, grad_spatial, B, size, blocks)
    launch.launch(kernel, (B * blocks,), (channels.THREADS,), arguments)
    return grad_x, partials.sum(0), grad_spatial


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, temporal, spatial, ctx.neuron = inputs
    ctx.save_for_backward(x, temporal, spatial)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_membrane: Tensor | None, grad_spikes: Tensor | None
) -> tuple[Tensor | None, ...]:
    return operators.call("gac::gate_lif_backward", grad_membrane, grad_spikes, *ctx.saved_tensors, ctx.neuron)


_operator = operators.differentiable("gac::gate_lif", _setup_context, _backward)
