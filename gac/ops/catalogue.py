"""The fused operations on noise of some size, called as the network calls them: to be checked or measured.

An operation is one entry of ``OPERATIONS``.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from gac.ops import batch_norm, gate_lif, lif, norm_lif, residual_lif, residual_lif_pool
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.neuron import LIFParameters

EPS = 1e-5
Tensors = tuple[Tensor, ...]


class Layer(NamedTuple):
    """Where an operation runs: activations [T, B, C, H, W] of some type; with ``kernels`` as a kernel.

    Without them its reference in plain torch runs. ``same_statistics`` gives it the kernels' statistics of a batch, so
    that spikes can be compared one by one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    neuron: LIFParameters
    device: torch.device
    kernels: bool
    same_statistics: bool = False

    def frame(self, count: int | None = None) -> Tensor:
        """Return noise [B, C, H, W] in channels_last."""
        noise = torch.randn(count or self.shape[1], *self.shape[2:], device=self.device)
        return noise.to(self.dtype, memory_format=torch.channels_last).requires_grad_()

    def sequence(self) -> Tensor:
        """Return noise [T, B, C, H, W] whose frames are channels_last."""
        return self.frame(self.shape[0] * self.shape[1]).detach().unflatten(0, self.shape[:2]).requires_grad_()

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias [C] of a BatchNorm, all different."""
        weight, bias = 0.2 * torch.randn(2, self.shape[2], device=self.device)
        return (1.2 + weight).requires_grad_(), (0.2 + bias).detach().requires_grad_()

    def scores(self) -> Tensor:
        """Return temporal attention [T, B] that opens the gate, so that the neuron behind it fires.

        It opens it to less than 1 in float32: there the membrane would be on the threshold of "cifar".
        """
        return (1 + 2 * torch.rand(self.shape[:2], device=self.device)).requires_grad_()

    def normalization(self, y: Tensor, weight: Tensor, bias: Tensor) -> BatchNormTransform:
        """Return the BatchNorm of ``y`` as the operations take it; that of the references is differentiable."""
        given = ()
        if self.kernels or self.same_statistics:
            given = batch_norm.batch_statistics(y.detach(), EPS)
        if self.kernels:
            return BatchNormTransform(weight, bias, *given, from_batch=True)
        mean, variance, _ = batch_norm.reference_moments(y)
        statistics = mean, (variance + EPS).rsqrt()
        if given:
            # The kernels' values with the gradient of the reference's own.
            statistics = (own + (value - own).detach() for own, value in zip(statistics, given, strict=True))
        return BatchNormTransform(weight, bias, *statistics, from_batch=True)


class FusedOperation(NamedTuple):
    """A fused operation.

    Attributes:
        summary: What it does.
        functions: The kernels' function and the reference.
        inputs: Makes its tensors, of which those that are differentiated require gradients.
        call: Calls a function on them and returns its outputs.
        moved: What has to be read or written in the forward and in the backward pass, in sequences [T, B, C, H, W] and
            in frames [B, C, H, W], where intermediate results stay in registers; vectors of one value for each channel
            or image do not count.
    """

    summary: str
    functions: tuple[Callable, Callable]
    inputs: Callable[[Layer], Tensors]
    call: Callable[..., Tensors]
    moved: tuple[tuple[float, float], tuple[float, float]]

    def run(self, layer: Layer, *inputs: Tensor) -> Tensors:
        """Return the outputs in a layer."""
        return self.call(layer, self.functions[0 if layer.kernels else 1], *inputs)

    def bytes(self, layer: Layer) -> tuple[int, int]:
        """Return the bytes that the forward and the backward pass have to move in a layer."""
        T, *frame = layer.shape
        forward, backward = (
            round((T * sequences + frames) * math.prod(frame)) * layer.dtype.itemsize
            for sequences, frames in self.moved
        )
        # The neuron's last membrane potential is float32.
        return forward + (4 * math.prod(frame) if self.functions[0] is lif.lif else 0), backward


def _residual(
    summary: str,
    module: ModuleType,
    moved: tuple[tuple[float, float], tuple[float, float]],
    shortcut_norm: bool = False,
) -> FusedOperation:
    """Return the operation of a module whose function has its name and takes what :mod:`gac.ops.residual_lif` takes."""

    def inputs(layer: Layer) -> Tensors:
        of_shortcut = layer.affine() if shortcut_norm else ()
        return (layer.sequence(), *layer.affine(), layer.sequence(), *of_shortcut)

    def call(layer: Layer, function: Callable, *tensors: Tensor) -> Tensors:
        y, weight, bias, shortcut, *affine = tensors
        of_shortcut = layer.normalization(shortcut, *affine) if affine else None
        outputs = function(y, layer.normalization(y, weight, bias), shortcut, of_shortcut, layer.neuron)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    functions = getattr(module, module.__name__.rpartition(".")[2]), module.reference
    return FusedOperation(summary, functions, inputs, call, moved)


OPERATIONS = {
    "lif": FusedOperation(
        "LIF neuron",
        (lif.lif, lif.reference),
        lambda layer: (layer.sequence(),),
        lambda layer, function, x: (function(x, 0.0, layer.neuron)[0],),
        # Read x; write spikes. Read x and the gradient of the spikes; write that of x.
        ((2, 0), (3, 0)),
    ),
    "batch_statistics": FusedOperation(
        "mean and variance of each channel",
        (batch_norm.batch_moments, batch_norm.reference_moments),
        lambda layer: (layer.sequence().detach(),),
        lambda layer, function, y: (function(y),),
        # Read y. The backward pass is part of the operation that normalises.
        ((1, 0), (0, 0)),
    ),
    "norm_lif": FusedOperation(
        "BatchNorm with its statistics, LIF neuron",
        (norm_lif.norm_lif, norm_lif.reference),
        lambda layer: (layer.sequence(), *layer.affine()),
        lambda layer, function, y, *affine: (function(y, layer.normalization(y, *affine), layer.neuron),),
        # Statistics: read y. Read y; write spikes. Sums: read y and the gradient of the spikes. Read both; write y's.
        ((3, 0), (5, 0)),
    ),
    "residual_lif": _residual(
        "BatchNorm with its statistics, residual sum, the next block's LIF neuron",
        residual_lif,
        # Statistics: read y. Read y and the shortcut; write the membrane stream and the spikes. Sums: read y, the
        # membrane stream and the gradients of it and of the spikes; write its whole gradient. Read that and y; write
        # the gradient of y.
        ((5, 0), (8, 0)),
    ),
    "residual_norm_lif": _residual(
        "the same with a shortcut that has a BatchNorm too",
        residual_lif,
        # Statistics of the shortcut: read it. Sums and gradients: read it twice; write its gradient.
        ((6, 0), (11, 0)),
        shortcut_norm=True,
    ),
    "residual_lif_pool": _residual(
        "BatchNorm with its statistics, the last residual sum, the last LIF neuron, average over pixels",
        residual_lif_pool,
        # Statistics: read y. Read y and the shortcut. Sums: read both again; write the gradient of the membrane stream.
        # Read that and y; write the gradient of y.
        ((3, 0), (6, 0)),
    ),
    "gate_lif": FusedOperation(
        "LIF neuron of the coding, gate, LIF neuron of the first block",
        (gate_lif.gate_lif, gate_lif.reference),
        lambda layer: (layer.frame(), layer.scores(), layer.frame()),
        lambda layer, function, *inputs: function(*inputs, layer.neuron),
        # Read a frame of x and of spatial; write the membrane stream and the spikes. Read both frames and the gradients
        # of the membrane stream and the spikes; write the gradients of both frames.
        ((2, 2), (2, 4)),
    ),
}
