"""GAC-MS-ResNet as one writes it with SpikingJelly 2.0: its layers in multi-step mode.

The ImageNet networks are SpikingJelly's own ``model.ms_resnet18`` and ``ms_resnet34`` layer by layer (the tests hold
this file to them), with the authors' surrogate gradient Rect(1.0) in place of its Rect(2.0) and the coding after the
stem, for which that class has no place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

_KIND = "(weight|bias|running_mean|running_var|num_batches_tracked)"
NAMES = (
    (r"stem\.conv\.weight", "conv.weight"),
    (rf"stem\.norm\.{_KIND}", r"bn.\1"),
    (r"coding\.gate\.temporal\.squeeze\.weight", "encoder.temporal.0.weight"),
    (r"coding\.gate\.temporal\.expand\.weight", "encoder.temporal.2.weight"),
    (r"coding\.gate\.spatial_channel\.conv1\.weight", "encoder.spatial_channel.1.weight"),
    (r"coding\.gate\.spatial_channel\.conv2\.weight", "encoder.spatial_channel.4.weight"),
    (r"stages\.(\d+)\.(\d+)\.conv([12])\.conv\.weight", r"layers.\1.\2.conv\3.weight"),
    (rf"stages\.(\d+)\.(\d+)\.conv([12])\.norm\.{_KIND}", r"layers.\1.\2.bn\3.\4"),
    (r"stages\.(\d+)\.(\d+)\.shortcut\.conv\.weight", r"layers.\1.\2.shortcut.0.weight"),
    (rf"stages\.(\d+)\.(\d+)\.shortcut\.norm\.{_KIND}", r"layers.\1.\2.shortcut.1.\3"),
    (r"head\.(weight|bias)", r"fc.\1"),
)


@dataclass(frozen=True)
class Family:
    """The authors' constants for one size of images; ``widths`` are multiples of the stem's channels."""

    stem_kernel: int
    stem_stride: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    tau: float
    threshold: float
    detach_reset: bool
    surrogate: type[surrogate.SurrogateFunctionBase]

    def make_lif(self) -> neuron.LIFNode:
        """Return SpikingJelly's neuron with the authors' constants."""
        return neuron.LIFNode(
            tau=self.tau,
            decay_input=False,
            v_threshold=self.threshold,
            surrogate_function=self.surrogate(1.0),
            detach_reset=self.detach_reset,
            step_mode="m",
        )


FAMILIES = {
    "cifar": Family(3, 1, (2, 4, 8), (1, 2, 2), 2.0, 1.0, False, surrogate.PiecewiseQuadratic),
    "imagenet": Family(7, 2, (1, 2, 4, 8), (2, 2, 2, 2), 4 / 3, 0.5, True, surrogate.Rect),
}


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> layer.Conv2d:
    return layer.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False, step_mode="m"
    )


def _norm(channels: int) -> layer.BatchNorm2d:
    return layer.BatchNorm2d(channels, step_mode="m")


class GatedAttentionEncoder(nn.Module):
    """LIF spikes times sigmoid(temporal x spatial-channel attention), all frames computed: [T, B, C, H, W] to same."""

    def __init__(self, T: int, channels: int, family: Family) -> None:
        super().__init__()
        self.lif = family.make_lif()
        hidden = max(1, T // 2)
        self.temporal = nn.Sequential(nn.Linear(T, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, T, bias=False))
        # Kernels of 4 x 4 keep the size with 1 row and column before and 2 after.
        self.spatial_channel = layer.SeqToANNContainer(
            nn.ZeroPad2d((1, 2, 1, 2)),
            nn.Conv2d(channels, channels, 4, bias=False),
            nn.ReLU(),
            nn.ZeroPad2d((1, 2, 1, 2)),
            nn.Conv2d(channels, channels, 4, bias=False),
        )

    def forward(self, x_seq: Tensor) -> Tensor:
        frames = x_seq.flatten(2)  # [T, B, C*H*W]
        average, maximum = frames.mean(2).t(), frames.max(2).values.t()  # [B, T]
        temporal = (self.temporal(average) + self.temporal(maximum)).t()  # [T, B]
        gate = torch.sigmoid(temporal[:, :, None, None, None] * self.spatial_channel(x_seq))
        return gate * self.lif(x_seq)


class Block(nn.Module):
    """LIF-conv-BN twice plus the shortcut of the real-valued input: [T, B, C, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, family: Family) -> None:
        super().__init__()
        self.lif1 = family.make_lif()
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn1 = _norm(out_channels)
        self.lif2 = family.make_lif()
        self.conv2 = _conv(out_channels, out_channels, 3)
        self.bn2 = _norm(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(_conv(in_channels, out_channels, 1, stride), _norm(out_channels))

    def forward(self, x_seq: Tensor) -> Tensor:
        y_seq = self.bn1(self.conv1(self.lif1(x_seq)))
        return self.bn2(self.conv2(self.lif2(y_seq))) + self.shortcut(x_seq)


class SpikingJellyNetwork(nn.Module):
    """Images [B, 3, H, W] to logits [T, B, K]."""

    def __init__(self, family: str, T: int, num_classes: int, width: int, depth: Sequence[int]) -> None:
        super().__init__()
        self.T = T
        constants = FAMILIES[family]
        self.conv = _conv(3, width, constants.stem_kernel, constants.stem_stride)
        self.bn = _norm(width)
        self.encoder = GatedAttentionEncoder(T, width, constants)
        widths = [width, *(width * factor for factor in constants.widths)]
        self.layers = nn.Sequential()
        for (entry, exit), blocks, stride in zip(pairwise(widths), depth, constants.strides, strict=True):
            first = Block(entry, exit, stride, constants)
            self.layers.append(nn.Sequential(first, *(Block(exit, exit, 1, constants) for _ in range(blocks - 1))))
        self.lif = constants.make_lif()
        self.pool = layer.AdaptiveAvgPool2d(1, step_mode="m")
        self.fc = layer.Linear(widths[-1], num_classes, step_mode="m")

    def forward(self, images: Tensor) -> Tensor:
        # Usually a line of the training loop; here the loop is the same for all networks.
        functional.reset_net(self)
        x_seq = images.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        x_seq = self.layers(self.encoder(self.bn(self.conv(x_seq))))
        return self.fc(self.pool(self.lif(x_seq)).flatten(2))
