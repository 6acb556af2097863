"""GAC-MS-ResNet as others would write it, to compare with: with SpikingJelly's layers, and as a loop in plain torch.

Both register their layers in the order in which an image passes them, shortcuts last, as ours does: so our weights load
into them one after the other. The ImageNet networks of the first are SpikingJelly's own ``model.ms_resnet18`` and
``ms_resnet34`` (the tests hold this file to them), with the authors' surrogate gradient Rect(1.0) in place of its
Rect(2.0) and the coding after the stem, for which that class has no place.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from benchmarks.common import NetworkSize
from gac.neuron import PRESETS
from gac.ops.neuron import LIFParameters


class Network(nn.Module):
    """Images [B, 3, H, W] to logits at every time step, everything computed T times.

    Sequences are [T, B, ...], as SpikingJelly's, with ``time`` 0, and [B, T, ...], as the paper's, with 1.
    """

    def __init__(self, time: int, make_lif: Callable[[LIFParameters], nn.Module], size: NetworkSize, T: int) -> None:
        super().__init__()
        self.T, self.time, family = T, time, size.family
        make_lif = partial(make_lif, PRESETS[family.neuron])
        self.stem = conv_norm(3, size.width, family.stem_kernel, family.stem_stride)
        self.encoder = GatedAttention(time, make_lif(), T, size.width)
        widths = [size.width, *(size.width * factor for factor in family.widths)]
        self.stages = nn.Sequential()
        for (entry, exit), blocks, stride in zip(pairwise(widths), size.depth, family.strides, strict=True):
            first = Block(make_lif, entry, exit, stride)
            self.stages.append(nn.Sequential(first, *(Block(make_lif, exit, exit, 1) for _ in range(blocks - 1))))
        self.lif = make_lif()
        self.fc = nn.Linear(widths[-1], size.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        # Usually a line of the training loop; here the loop is the same for all networks.
        functional.reset_net(self)
        repeats = (self.T, 1, 1, 1, 1) if self.time == 0 else (1, self.T, 1, 1, 1)
        x = self.stem(images.unsqueeze(self.time).repeat(repeats))
        return self.fc(self.lif(self.stages(self.encoder(x))).mean((3, 4)))


class GatedAttention(nn.Module):
    """LIF spikes times sigmoid(temporal x spatial-channel attention), all frames computed."""

    def __init__(self, time: int, lif: nn.Module, T: int, channels: int) -> None:
        super().__init__()
        self.time, self.lif, hidden = time, lif, max(1, T // 2)
        self.temporal = nn.Sequential(nn.Linear(T, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, T, bias=False))
        conv = partial(nn.Conv2d, channels, channels, 4, bias=False)
        # Kernels of 4 x 4 keep the size with 1 row and column before and 2 after.
        pad = nn.ZeroPad2d((1, 2, 1, 2))
        self.spatial_channel = layer.SeqToANNContainer(pad, conv(), nn.ReLU(), pad, conv())

    def forward(self, x: Tensor) -> Tensor:
        frames = x.flatten(2).movedim(self.time, 1)  # [B, T, C*H*W]
        temporal = self.temporal(frames.mean(2)) + self.temporal(frames.max(2).values)  # [B, T]
        temporal = temporal.movedim(1, self.time)[:, :, None, None, None]
        return torch.sigmoid(temporal * self.spatial_channel(x)) * self.lif(x)


class Block(nn.Module):
    """LIF-conv-BN twice plus the shortcut of the real-valued input."""

    def __init__(self, make_lif: Callable[[], nn.Module], in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        first, second = conv_norm(in_channels, out_channels, 3, stride), conv_norm(out_channels, out_channels, 3)
        self.residual = nn.Sequential(make_lif(), first, make_lif(), second)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv_norm(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


def conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
    """Return a convolution with BatchNorm over all frames of a sequence."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return layer.SeqToANNContainer(conv, nn.BatchNorm2d(out_channels))


class LIF(nn.Module):
    """The authors' neuron, one time step after the other: [B, T, C, H, W] to spikes of the same shape."""

    def __init__(self, constants: LIFParameters) -> None:
        super().__init__()
        self.constants = constants

    def forward(self, x: Tensor) -> Tensor:
        membrane = torch.zeros_like(x[:, 0])
        spikes = []
        for t in range(x.shape[1]):
            membrane = self.constants.decay * membrane + x[:, t]
            spike = Spike.apply(membrane, self.constants)
            membrane = membrane * (1.0 - (spike.detach() if self.constants.detach_reset else spike))
            spikes.append(spike)
        return torch.stack(spikes, dim=1)


class Spike(torch.autograd.Function):
    """1 where the membrane is above the threshold, else 0, with the authors' surrogate gradients: triangle and Rect."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, membrane: Tensor, constants: LIFParameters) -> Tensor:
        ctx.save_for_backward(membrane)
        ctx.constants = constants
        return (membrane > constants.v_threshold).to(membrane.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_spike: Tensor) -> tuple[Tensor, None]:
        distance = (ctx.saved_tensors[0] - ctx.constants.v_threshold).abs()
        triangle = isinstance(ctx.constants.surrogate, surrogate.PiecewiseQuadratic)
        gradient = (1.0 - distance).clamp(min=0.0) if triangle else (distance < 0.5).to(distance.dtype)
        return grad_spike * gradient, None


def spikingjelly_lif(constants: LIFParameters) -> neuron.LIFNode:
    """Return SpikingJelly's neuron in multi-step mode."""
    options = asdict(constants)
    return neuron.LIFNode(surrogate_function=options.pop("surrogate"), step_mode="m", **options)
