"""Activations [T, B, C, H, W] as the fused kernels take them: T frames of rows, a row being the channels of a pixel."""

import torch
from torch import Tensor

from gac.errors import InputError
from gac.ops.cuda import launch
from gac.ops.cuda.compiler import ELEMENTS, Kernel

MAX_T = 16
"""The most time steps that the fused operations hold in registers."""

THREADS = 128  # kThreads in kernels/tile.cuh
REDUCING_BLOCKS = 4  # for each multiprocessor


def check_activations(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """Raise InputError unless ``x`` is a non-empty [T, B, C, H, W] with T <= MAX_T, and matches ``like`` if given."""
    if x.ndim != 5 or x.numel() == 0:
        raise InputError(f"{name} must be a non-empty [T, B, C, H, W], got shape {list(x.shape)}")
    if x.shape[0] > MAX_T:
        raise InputError(f"the fused operations take up to {MAX_T} time steps, got {len(x)}; use backend='torch'")
    if x.dtype not in ELEMENTS:
        raise InputError(f"the fused operations take float32, float16 or bfloat16, got {x.dtype}; use backend='torch'")
    if like is not None and (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
        raise InputError(
            f"{name} must be {list(like.shape)}, {like.dtype}, on {like.device} like the other input, "
            f"got {list(x.shape)}, {x.dtype}, on {x.device}"
        )


def channels_last(x: Tensor) -> Tensor:
    """Return ``x`` [..., C, H, W] with channels innermost in memory and all else in order; a copy only if need be."""
    x, strides = x.resolve_neg(), _channels_last_strides(x.shape)
    if x.stride() == strides:
        return x
    matches = all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), strides, strict=True))
    return x if matches else empty_channels_last(x.shape, x).copy_(x)


def empty_channels_last(shape: torch.Size, like: Tensor) -> Tensor:
    """Return uninitialised memory for a tensor [..., C, H, W] with channels innermost, dtype and device of ``like``."""
    return torch.empty_strided(shape, _channels_last_strides(shape), dtype=like.dtype, device=like.device)


def gradient_or_zeros(grad: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """Return a gradient with channels innermost; zeros, of the dtype and device of ``like``, where there is none."""
    return empty_channels_last(shape, like).zero_() if grad is None else channels_last(grad)


def _channels_last_strides(shape: torch.Size) -> tuple[int, ...]:
    if len(shape) == 5:
        _, B, C, H, W = shape
        return B * H * W * C, H * W * C, 1, W * C, C
    *outer, C, H, W = shape
    strides = [1, W * C, C]
    size = C * H * W
    for length in reversed(outer):
        strides.insert(0, size)
        size *= length
    return tuple(strides)


def rows(x: Tensor) -> int:
    """Return the number of pixels of one frame of ``x`` [T, B, C, H, W]."""
    _, B, _, H, W = x.shape
    return B * H * W


def vector_width(dtype: torch.dtype, T: int, backward: bool = False) -> int:
    """Return how many neighbouring values a thread takes where their number and address allow it."""
    # A backward thread holds T x width membrane potentials in registers beside as many inputs and gradients. With more
    # than these widths the compiler spills; and 8 at T = 6 leaves room for half as many threads as 4 (by registers; not
    # measured).
    if dtype == torch.float32:
        return 4 if T <= 8 else 2
    return 8 if (3 if backward else 6) >= T else 4 if T <= 12 else 2


def fitting_width(T: int, length: int, *tensors: Tensor | None, backward: bool = False) -> int:
    """Return the vector width for ``length`` values in a row; the first tensor decides the dtype."""
    return narrowed_width(vector_width(tensors[0].dtype, T, backward), length, *tensors)


def narrowed_width(width: int, length: int, *tensors: Tensor | None) -> int:
    """Return the vector width up to ``width`` that divides ``length`` and that the tensors' addresses allow."""
    # The usual case, asked at every launch.
    if length % width == 0 and all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors):
        return width
    addresses = [(tensor.data_ptr(), tensor.itemsize) for tensor in tensors if tensor is not None]
    while width > 1 and (length % width or any(start % min(16, width * size) for start, size in addresses)):
        width //= 2
    return width


def grid(
    kernel: Kernel, rows: int, channels: int, width: int, device: torch.device, reduces: bool = False
) -> tuple[int, int]:
    """Return the grid of a kernel that works in tiles (kernels/tile.cuh): blocks over rows, and over channels.

    As many blocks as run at once: a thread then walks several rows and loads what belongs to its channels once. A
    kernel that ``reduces`` gets no more than a few for each multiprocessor, as every block leaves partial sums.
    """
    vectors = channels // width
    lanes = min(vectors, THREADS)
    columns = -(-vectors // lanes)
    needed = -(-rows // (THREADS // lanes))
    at_once = launch.resident_blocks(kernel, THREADS, device, REDUCING_BLOCKS if reduces else None)
    return max(1, min(needed, at_once // columns)), columns
