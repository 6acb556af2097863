"""Convolution over spikes by events on the CPU: specification, C kernels, autograd, public function.

Spikes are 0 or 1 and few, so a convolution is a sum of rows of the weight: out[pixel] += weight[tap, channel] for each
spike. The kernels (``kernels/event_conv.c``) list the spikes once, for the output and for the weight gradient.
"""

import ctypes
import functools
import os

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from gac.ops import c_compiler, c_kernels, openmp
from gac.ops.watchers import watched

# In a thread of a Zen 5, for 3 x 3 kernels of 64 to 512 channels, events take as long as oneDNN's dense convolution in
# the better memory order at a density of 0.6 forward and 0.5 for the weight gradient. With 32 channels events gain
# up to a half in channels_last and nothing otherwise; with 16 they take twice as long (docs/performance.md).
MAX_DENSITY = 0.5
"""The largest part of the inputs that spike for which the convolution is by events."""
MAX_GRADIENT_DENSITY = 0.4
"""The same for the weight gradient."""
MIN_CHANNELS = 64
"""The fewest input and output channels for which events are used."""


def reference(spikes: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Return the convolution of :func:`event_conv2d` in plain torch; the specification."""
    return F.conv2d(spikes, weight, stride=stride, padding=padding)


def event_conv2d(spikes: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Return the convolution of spikes with a weight, with an effort that is proportional to the number of spikes.

    Equal to ``reference`` but for the order of summation: an output that n spikes reach is within n * 2**-24 times
    the sum of the absolute values of their weights of the exact one, and likewise the weight gradient. Both are the
    same to the bit for any number of threads and any CPU. The input gradient is the dense one. There is no second
    derivative.

    The dense convolution runs for other dtypes than float32 and other devices than the CPU, under torch.compile and
    whatever watches operations (:func:`gac.ops.watchers.watched`), for inputs with other values than 0 and 1, with more
    than MAX_DENSITY spikes or fewer than MIN_CHANNELS channels, for strided 1 x 1 kernels unless the spikes are in
    channels_last, for weights and gradients that are not finite, and without a C compiler
    (:func:`gac.ops.c_kernels.status`). Under autocast on the CPU what is dense has its dtype, such as bfloat16: the
    input gradient, and the convolution where events are not used. The output is float32 there too.

    Args:
        spikes: [N, C, H, W], in any memory order; the output has that of ``reference``.
        weight: [K, C, kernel height, kernel width].
        stride: In both directions.
        padding: Zeros at each side.

    Returns:
        [N, K, H', W'].
    """
    if not _is_supported(spikes, weight, stride, padding):
        return reference(spikes, weight, stride, padding)
    if not (_can_run(spikes, weight, stride) or _is_strided_1x1(weight, stride)):
        return _dense(spikes, weight, stride, padding)
    if torch.is_grad_enabled() and (spikes.requires_grad or weight.requires_grad):
        return _EventConvolution.apply(spikes, weight, stride, padding)[0]
    return _forward(spikes, weight, stride, padding)[0]


def _dense(spikes: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return reference(spikes, weight, stride, padding).to(spikes.dtype)


def _is_supported(spikes: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    # What F.conv2d refuses is left to it.
    return not (
        torch.compiler.is_compiling()
        or watched(spikes)
        or watched(weight)
        or any(
            x.device.type != "cpu" or x.dtype != torch.float32 or x.layout != torch.strided for x in (spikes, weight)
        )
        or not (type(stride) is int and type(padding) is int and stride >= 1 and padding >= 0)
        or not (spikes.ndim == weight.ndim == 4 and spikes.shape[1] == weight.shape[1])
        or spikes.numel() == 0
        or weight.numel() == 0
        or any(size + 2 * padding < kernel for size, kernel in zip(spikes.shape[2:], weight.shape[2:], strict=True))
    )


def _is_strided_1x1(weight: Tensor, stride: int) -> bool:
    # Whose dense weight gradient has to be kept from channels_last: see _EventConvolution.backward.
    return stride > 1 and weight.shape[2:].numel() == 1


def _can_run(spikes: Tensor, weight: Tensor, stride: int) -> bool:
    return _pays(spikes, weight, stride) and c_kernels.status().ok


def _pays(spikes: Tensor, weight: Tensor, stride: int) -> bool:
    """Return whether events can be faster than the dense convolution, if spikes are few."""
    # A strided 1 x 1 kernel reads so few pixels that it would be slower to change the order of all.
    fitting_order = weight.shape[2:].numel() > 1 or stride == 1 or _is_channels_last(spikes)
    return fitting_order and min(weight.shape[:2]) >= MIN_CHANNELS


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("frames", "channels", "height", "width", "outputs", "kernel_height", "kernel_width"),
            *("stride", "padding", "out_height", "out_width"),
        )
    )


def _shape(spikes: Tensor, weight: Tensor, stride: int, padding: int) -> _Shape:
    outputs = (
        (size + 2 * padding - kernel) // stride + 1
        for size, kernel in zip(spikes.shape[2:], weight.shape[2:], strict=True)
    )
    return _Shape(*spikes.shape, weight.shape[0], *weight.shape[2:], stride, padding, *outputs)


@functools.cache
def _kernels() -> ctypes.CDLL:
    functions = c_compiler.load_library("event_conv.c").functions
    shape, team, pointer, number = (
        ctypes.POINTER(_Shape),
        ctypes.POINTER(c_kernels.Team),
        ctypes.c_void_p,
        ctypes.c_int64,
    )
    for name, result, parameters in (
        ("list_stride", number, (shape,)),
        ("list_count", number, (shape,)),
        ("packed_size", number, (shape,)),
        ("list_events", number, (shape, team, pointer, pointer, pointer)),
        ("transpose", None, (team, number, number, number, pointer, pointer)),
        ("pack", ctypes.c_int, (shape, team, pointer, number, number, pointer)),
        ("convolve", None, (shape, team, pointer, pointer, pointer, pointer)),
        ("weight_gradient", ctypes.c_int, (shape, team, *[pointer] * 5, number, number)),
    ):
        function = getattr(functions, name)
        function.restype, function.argtypes = result, parameters
    return functions


def _forward(spikes: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the convolution, and the lists of spikes if it was made from them and the weight gradient should be."""
    if not _can_run(spikes, weight, stride):
        return _dense(spikes, weight, stride, padding), None, None
    kernels, team, shape = _kernels(), c_kernels.team(), _shape(spikes, weight, stride, padding)
    rows = _rows(spikes, team)
    count = torch.empty(kernels.list_count(shape), dtype=torch.uint8)
    index = torch.empty(len(count) * kernels.list_stride(shape), dtype=torch.uint8)
    events = kernels.list_events(shape, team, rows.data_ptr(), index.data_ptr(), count.data_ptr())
    packed = torch.empty(kernels.packed_size(shape))
    most = _most_events(shape)
    if not 0 <= events <= MAX_DENSITY * most or not _pack(shape, team, weight, packed):
        return _dense(spikes, weight, stride, padding), None, None
    outputs = (shape.frames, shape.outputs, shape.out_height, shape.out_width)
    out = torch.empty(outputs, memory_format=torch.channels_last)
    kernels.convolve(shape, team, index.data_ptr(), count.data_ptr(), packed.data_ptr(), out.data_ptr())
    if not (_is_channels_last(spikes) or _is_channels_last(weight)):
        rows, out = out, torch.empty(outputs)
        pixels = shape.out_height * shape.out_width
        kernels.transpose(team, shape.frames, pixels, shape.outputs, rows.data_ptr(), out.data_ptr())
    return (out, index, count) if events <= MAX_GRADIENT_DENSITY * most else (out, None, None)


def _most_events(shape: _Shape) -> float:
    """Return how many events a density of 1 stands for."""
    # One thread competes with a dense convolution in all of them. Results must not depend on torch's number of threads.
    threads = 1 if openmp.parallel_function() else os.cpu_count() or 1
    height, width = shape.height, shape.width
    if shape.kernel_height * shape.kernel_width == 1 and shape.stride > 1:
        height, width = shape.out_height, shape.out_width
    return shape.frames * shape.channels * height * width / threads


def _pack(shape: _Shape, team: c_kernels.Team, weight: Tensor, packed: Tensor) -> bool:
    """Put the weight into tiles; return whether all of it is finite."""
    if not weight.is_contiguous():
        weight = weight.contiguous(memory_format=torch.channels_last)
    return bool(_kernels().pack(shape, team, weight.data_ptr(), *_weight_strides(weight), packed.data_ptr()))


def _weight_strides(weight: Tensor) -> tuple[int, int]:
    """Return how far apart channels and kernel positions of a contiguous or channels_last weight are in memory."""
    _, C, height, width = weight.shape
    return (height * width, 1) if weight.is_contiguous() else (1, C)


def _rows(x: Tensor, team: c_kernels.Team) -> Tensor:
    """Return ``x`` with its channels innermost in memory."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    x, rows = x.contiguous(), torch.empty(x.shape, memory_format=torch.channels_last)
    N, C, H, W = x.shape
    _kernels().transpose(team, N, C, H * W, x.data_ptr(), rows.data_ptr())  # several times as fast as torch's copy
    return rows


def _is_channels_last(x: Tensor) -> bool:
    # Of 1 x 1 kernels and pixels, which lie in memory alike in both orders, torch tells the order by the strides.
    return x.is_contiguous(memory_format=torch.channels_last) and (x.stride(1), x.stride(3)) == (1, x.shape[1])


class _EventConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        spikes: Tensor, weight: Tensor, stride: int, padding: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return _forward(spikes, weight, stride, padding)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        spikes, weight, ctx.stride, ctx.padding = inputs
        _, index, count = output
        ctx.dense_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else spikes.dtype
        ctx.mark_non_differentiable(*(each for each in (index, count) if each is not None))
        ctx.save_for_backward(spikes, weight, index, count)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        spikes, weight, index, count = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None
        sizes = ctx.stride, ctx.padding, ctx.dense_dtype
        wanted_spikes, wanted_weight, *_ = ctx.needs_input_grad
        grad_spikes = grad_weight = None
        if wanted_spikes:
            grad_spikes, _ = _dense_gradients(gradient, spikes, weight, *sizes, (True, False))
        if wanted_weight and index is not None:
            grad_weight = _weight_gradient(gradient, spikes, weight, index, count, ctx.stride, ctx.padding)
        if wanted_weight and grad_weight is None:
            if _is_strided_1x1(weight, ctx.stride):
                # oneDNN writes out of bounds in channels_last (docs/performance.md), of which a 1 x 1 weight's strides
                # are a sign too. The weight's values are not read.
                gradient, spikes, weight = gradient.contiguous(), spikes.contiguous(), torch.empty(weight.shape)
            _, grad_weight = _dense_gradients(gradient, spikes, weight, *sizes, (False, True))
        return grad_spikes, grad_weight, None, None


def _weight_gradient(
    gradient: Tensor, spikes: Tensor, weight: Tensor, index: Tensor, count: Tensor, stride: int, padding: int
) -> Tensor | None:
    """Return the weight gradient by events, or None if ``gradient`` is not finite."""
    kernels, team, shape = _kernels(), c_kernels.team(), _shape(spikes, weight, stride, padding)
    rows = _rows(gradient, team)
    dense = weight.is_contiguous() or _is_channels_last(weight)
    grad_weight = torch.empty_like(weight, memory_format=torch.preserve_format if dense else torch.contiguous_format)
    packed = torch.empty(kernels.packed_size(shape))
    buffers = (x.data_ptr() for x in (index, count, rows, packed, grad_weight))
    finite = kernels.weight_gradient(shape, team, *buffers, *_weight_strides(grad_weight))
    return grad_weight if finite else None


def _dense_gradients(
    gradient: Tensor,
    spikes: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    sizes = ([stride] * 2, [padding] * 2, [1, 1])
    if dtype != spikes.dtype:
        # The input gradient does not depend on the spikes' values.
        spikes = spikes.to(dtype) if wanted[1] else torch.empty_like(spikes, dtype=dtype)
    results = torch.ops.aten.convolution_backward(
        gradient.to(dtype), spikes, weight.to(dtype), None, *sizes, False, [0, 0], 1, [*wanted, False]
    )
    return tuple(None if result is None else result.to(gradient.dtype) for result in results[:2])
