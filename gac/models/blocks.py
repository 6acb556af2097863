"""Building blocks of the networks: convolution with BatchNorm, and the membrane-shortcut block."""

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gac.models.batch_norm import BatchNorm2d
from gac.models.recompute import recomputed
from gac.neuron import Backend, LIFNode
from gac.ops.neuron import LIFParameters


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm over batch and time jointly: [T, B, C, H, W] or [B, C, H, W].

    A single frame may stand for ``repeats`` equal ones. ``norm`` may be replaced by any layer for [B, C, H, W].
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = BatchNorm2d(out_channels)

    def forward(self, x: Tensor, repeats: int = 1) -> Tensor:
        if x.dim() == 5:
            return functional.seq_to_ann_forward(x, (self.conv, self.norm))
        y = self.conv(x)
        if isinstance(self.norm, BatchNorm2d):
            return self.norm(y, repeats)
        if repeats > 1 and self.norm.training and isinstance(self.norm, _NormBase):
            # Its running variance has to count all frames.
            return self.norm(torch.cat([y] * repeats))[: len(y)]
        return self.norm(y)


class MSBlock(nn.Module):
    """Membrane-shortcut block: LIF-conv-BN twice, added to the real-valued input; nothing follows the addition.

    Where the shape changes, the shortcut is a 1 x 1 convolution with BatchNorm of the real-valued input. With
    ``checkpoint_activations`` (an attribute, False by default) training keeps only the block's input and computes
    the rest again in the backward pass.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, neuron: LIFParameters, backend: Backend
    ) -> None:
        super().__init__()
        self.lif1 = LIFNode.from_parameters(neuron, backend, keeps_state=False)
        self.conv1 = ConvNorm(in_channels, out_channels, 3, stride)
        self.lif2 = LIFNode.from_parameters(neuron, backend, keeps_state=False)
        self.conv2 = ConvNorm(out_channels, out_channels, 3)
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same_shape else ConvNorm(in_channels, out_channels, 1, stride)
        self.checkpoint_activations = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return recomputed(self._forward, [self], x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.lif1(x))
        return self.conv2(self.lif2(y)) + self.shortcut(x)
