"""Batch normalisation for the fused operations: statistics of a batch, and normalisation as an affine map.

The statistics are kernels (``kernels/batch_norm.cu``); applying them, forward and backward, is part of the operation
that follows (:mod:`gac.ops.norm_lif`, :mod:`gac.ops.residual_lif`).
"""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from gac.errors import InputError
from gac.ops import channels, operators
from gac.ops.cuda import compiler, launch


@dataclass(frozen=True)
class BatchNormTransform:
    """BatchNorm as one affine map for each channel: z = (y - mean) * (inverse_std * weight) + bias; all float32 [C].

    ``from_batch``: mean and inverse_std are those of y itself, so that the gradient of y goes through them too; else
    they are constants, as in evaluation. ``synchronized``: they are those of the y of all ranks.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    inverse_std: Tensor
    from_batch: bool
    synchronized: bool = False

    SCHEMA = "Tensor weight, Tensor norm_bias, Tensor mean, Tensor inverse_std"

    def check_fits(self, y: Tensor) -> None:
        """Raise InputError unless the kernels can apply this to ``y`` [T, B, C, H, W]."""
        for name, tensor in zip(("weight", "bias", "mean", "inverse_std"), self.tensors, strict=True):
            _check_fits(name, tensor, y)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """weight, bias, mean and inverse_std, in the order of ``SCHEMA``."""
        return self.weight, self.bias, self.mean, self.inverse_std


def _check_fits(name: str, tensor: Tensor, y: Tensor) -> None:
    C = y.shape[2]
    fits = tensor.shape == (C,) and tensor.dtype is torch.float32 and tensor.device == y.device
    if not (fits and tensor.is_contiguous()):
        raise InputError(
            f"BatchNorm's {name} must be a contiguous float32 [C={C}] on {y.device}, "
            f"got {list(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
        )


def reference_moments(y: Tensor) -> Tensor:
    """Return mean, variance and unbiased variance of each channel, [3, C], differentiable; the specification.

    ``y`` is [..., C, H, W]; float32 results (float64 for float64).
    """
    values = y.movedim(-3, 0).flatten(1).to(torch.promote_types(y.dtype, torch.float32))
    return torch.stack((values.mean(1), values.var(1, correction=0), values.var(1, correction=1)))


def reference(y: Tensor, normalization: BatchNormTransform) -> Tensor:
    """Return ``y`` [..., C, H, W] normalised, float32 (float64 for float64); the specification."""
    weight, bias, mean, inverse_std = (tensor[:, None, None] for tensor in normalization.tensors)
    return (y.to(mean.dtype) - mean) * (inverse_std * weight) + bias


def batch_moments(y: Tensor) -> Tensor:
    """Return mean, variance and unbiased variance of each channel of ``y`` [T, B, C, H, W]: float32 [3, C].

    Deterministic, in two stages, accumulated in float32 relative to a value of the data, so that a mean that is large
    against the deviations does not cancel them. Not differentiable: the operation that normalises does that part.
    """
    channels.check_activations("BatchNorm's input", y)
    return operators.call("gac::batch_moments", y)


def over_all_ranks(moments: Tensor, count: int) -> Tensor:
    """Return the moments [3, C] of the values of all ranks of the default process group, from each rank's own.

    Differentiable; every rank must call it. ``count`` is the number of values of a channel on this rank.
    """
    # Through sums in float64, in which mean * mean does not cancel the variance.
    mean, variance, _ = moments.double()
    sums = torch.stack((torch.full_like(mean, count), count * mean, count * (variance + mean * mean)))
    total, sum_, sum_of_squares = _SumOverRanks.apply(sums)
    mean = sum_ / total
    squared_deviations = sum_of_squares - total * mean * mean
    return torch.stack((mean, squared_deviations / total, squared_deviations / (total - 1))).to(moments.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; each rank's part has the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return _SumOverRanks.apply(grad)


def reference_statistics(
    moments: Tensor,
    eps: float,
    momentum: float = 0.0,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    batches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`batch_statistics` does, from moments [3, C]; the specification, and for those of all ranks."""
    mean, variance, unbiased_variance = moments
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
    if running_var is not None:
        running_var.lerp_(unbiased_variance, momentum)
    if batches is not None:
        batches.add_(1)
    return mean, (variance + eps).sqrt().reciprocal()


def batch_statistics(
    y: Tensor,
    eps: float,
    momentum: float = 0.0,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    batches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation [C] of ``y`` [T, B, C, H, W], and move the running statistics.

    Computed as by :func:`batch_moments`, and not differentiable either.

    Args:
        y: Activations, as :func:`batch_moments` takes them.
        eps: Added to the variance.
        momentum: Share of the new value in the running statistics.
        running_mean: Running mean [C], changed in place, or None.
        running_var: Running (unbiased) variance [C], changed in place, or None.
        batches: Number of batches so far, an int64 scalar, increased in place, or None.

    Raises:
        InputError: For activations that :func:`batch_moments` refuses, and running statistics that do not fit them.
    """
    channels.check_activations("BatchNorm's input", y)
    for name, tensor in (("running mean", running_mean), ("running variance", running_var)):
        if tensor is not None:
            _check_fits(name, tensor, y)
    return operators.call("gac::batch_statistics", y, running_mean, running_var, batches, eps, momentum)


_LANES = 8  # kLanes in kernels/batch_norm.cu

operators.define("gac::batch_moments", "(Tensor y) -> Tensor")
operators.define(
    "gac::batch_statistics",
    "(Tensor y, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float eps, float momentum)"
    " -> (Tensor mean, Tensor inverse_std)",
)


@operators.outputs("gac::batch_moments")
def _moments_like(y: Tensor) -> Tensor:
    return y.new_empty(3, y.shape[2], dtype=torch.float32)


@operators.outputs("gac::batch_statistics")
def _statistics_like(y: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape[2], dtype=torch.float32), y.new_empty(y.shape[2], dtype=torch.float32)


@operators.implement("gac::batch_moments")
def _batch_moments(y: Tensor) -> Tensor:
    moments = _moments_like(y)
    partials = _moments_of_blocks(y)
    _launch_total("batch_moments_total", partials, (), (moments,))
    return moments


@operators.implement("gac::batch_statistics")
def _batch_statistics(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    mean, inverse_std = _statistics_like(y)
    outputs = (mean, inverse_std, running_mean, running_var, batches)
    _launch_total("batch_statistics_total", _moments_of_blocks(y), (), (*outputs, eps, momentum))
    return mean, inverse_std


def _moments_of_blocks(y: Tensor) -> Tensor:
    y = channels.channels_last(y)
    T, C, rows = y.shape[0], y.shape[2], channels.rows(y)
    width = channels.fitting_width(1, C, y)
    kernel = compiler.make_kernel("batch_norm.cu", "batch_moments_partials", y.dtype, width)
    blocks, columns = channels.grid(kernel, T * rows, C, width, y.device, reduces=True)
    partials = y.new_empty(blocks, 3, C, dtype=torch.float32)
    launch.launch(kernel, (blocks, columns), (channels.THREADS,), (y, partials, T * rows, C))
    return partials


def total_of_partials(partials: Tensor, second_factor: Tensor, third_factor: Tensor | None = None) -> Tensor:
    """Return partials [blocks, quantities, C] summed over the blocks: [quantities, C], deterministic.

    The sums of the second and the third quantity are multiplied by their factors [C].
    """
    totals = torch.empty_like(partials[0])
    _launch_total("total_of_partials", partials, partials.shape[1:2], (second_factor, third_factor, totals))
    return totals


def _launch_total(name: str, partials: Tensor, rows_of_grid: tuple[int, ...], arguments: tuple) -> None:
    """Launch a second stage on partials [blocks, quantities, C]."""
    blocks, _, C = partials.shape
    kernel, grid = compiler.make_kernel("batch_norm.cu", name), (-(-C // _LANES), *rows_of_grid)
    # kLanes * kSlices threads
    launch.launch(kernel, grid, (1024,), (partials, *arguments, blocks, C))


def gradient_sums(sums: Tensor, count: int, from_batch: bool, synchronized: bool) -> tuple[Tensor, float]:
    """Return what the gradient of the statistics takes the mean of, [quantities, C], and one over their number.

    Args:
        sums: Sums over this rank's values of a channel.
        count: Number of those values.
        from_batch: See :class:`BatchNormTransform`; otherwise the statistics have no gradient.
        synchronized: Take the mean over the values of all ranks; every rank must call this.
    """
    if not from_batch:
        return sums, 0.0
    if not synchronized:
        return sums, 1.0 / count
    everywhere = torch.cat((sums.flatten(), sums.new_full((1,), count)))
    torch.distributed.all_reduce(everywhere)
    return (everywhere[:-1] / everywhere[-1]).view_as(sums), 1.0
