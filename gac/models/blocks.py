"""Building blocks of the networks: convolution with BatchNorm, a stem of three, and the membrane-shortcut block."""

from typing import Literal

import torch
from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gac.models.batch_norm import BatchNorm2d
from gac.models.recompute import recomputed
from gac.neuron import Backend, LIFNode
from gac.ops.neuron import LIFParameters

Downsampling = Literal["stride", "max_pool", "average_pool"]
"""What makes maps smaller in a block: the strides of its convolutions, or pooling in place of one of them."""


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
            return functional.seq_to_ann_forward(x, (self._convolve, self.norm))
        y = self._convolve(x)
        if isinstance(self.norm, BatchNorm2d):
            return self.norm(y, repeats)
        if repeats > 1 and self.norm.training and isinstance(self.norm, _NormBase):
            # Its running variance has to count all frames.
            return self.norm(torch.cat([y] * repeats))[: len(y)]
        return self.norm(y)

    def _convolve(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DeepStem(ConvNorm):
    """Three convolutions with biases and nothing between them, the first with a stride, then BatchNorm.

    The stem of MS-ResNet-104 in its authors' code. Shapes are those of :class:`ConvNorm`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size, padding=padding)
        self.conv3 = nn.Conv2d(out_channels, out_channels, kernel_size, padding=padding)
        # Layers are in the order in which an image passes them.
        self.norm = self._modules.pop("norm")

    def _convolve(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv(x)))


class MSBlock(nn.Module):
    """Membrane-shortcut block: LIF-conv-BN twice, added to the real-valued input; nothing follows the addition.

    Where the shape changes, the shortcut is a 1 x 1 convolution with BatchNorm of the real-valued input. A block with a
    stride makes its maps smaller by the strides of the first and of the shortcut's convolution; or ("max_pool",
    Max-ResNet) the first has none and a 3 x 3 maximum follows its BatchNorm; or ("average_pool", MS-ResNet-104) the
    shortcut's has none and gets averages. With ``checkpoint_activations`` (an attribute, False by default) training
    keeps only the block's input and computes the rest again in the backward pass.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        neuron: LIFParameters,
        backend: Backend,
        downsampling: Downsampling = "stride",
    ) -> None:
        super().__init__()
        self.stride = stride
        pooling = "none" if stride == 1 else downsampling
        self.lif1 = LIFNode.from_parameters(neuron, backend, keeps_state=False)
        self.conv1 = ConvNorm(in_channels, out_channels, 3, 1 if pooling == "max_pool" else stride)
        if pooling == "max_pool":
            self.conv1 = nn.Sequential(self.conv1, layer.MaxPool2d(3, stride, padding=1, step_mode="m"))
        self.lif2 = LIFNode.from_parameters(neuron, backend, keeps_state=False)
        self.conv2 = ConvNorm(out_channels, out_channels, 3)
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif pooling == "average_pool":
            # Of odd sides the last row and column are averaged by themselves, so that the sum's sides are equal.
            pool = layer.AvgPool2d(stride, stride, ceil_mode=True, step_mode="m")
            self.shortcut = nn.Sequential(pool, ConvNorm(in_channels, out_channels, 1))
        else:
            self.shortcut = ConvNorm(in_channels, out_channels, 1, stride)
        self.checkpoint_activations = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return recomputed(self._forward, [self], x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.lif1(x))
        return self.conv2(self.lif2(y)) + self.shortcut(x)
