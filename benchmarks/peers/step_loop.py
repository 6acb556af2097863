"""GAC-MS-ResNet in plain torch: the paper's layout [B, T, ...] and a Python loop over time steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

_KIND = "(weight|bias|running_mean|running_var|num_batches_tracked)"
NAMES = (
    (r"stem\.conv\.weight", "stem.layers.0.weight"),
    (rf"stem\.norm\.{_KIND}", r"stem.layers.1.\1"),
    (r"coding\.gate\.temporal\.squeeze\.weight", "attention.temporal.0.weight"),
    (r"coding\.gate\.temporal\.expand\.weight", "attention.temporal.2.weight"),
    (r"coding\.gate\.spatial_channel\.conv1\.weight", "attention.spatial_channel.layers.1.weight"),
    (r"coding\.gate\.spatial_channel\.conv2\.weight", "attention.spatial_channel.layers.4.weight"),
    (r"stages\.(\d+)\.(\d+)\.conv1\.conv\.weight", r"stages.\1.\2.residual.1.layers.0.weight"),
    (rf"stages\.(\d+)\.(\d+)\.conv1\.norm\.{_KIND}", r"stages.\1.\2.residual.1.layers.1.\3"),
    (r"stages\.(\d+)\.(\d+)\.conv2\.conv\.weight", r"stages.\1.\2.residual.3.layers.0.weight"),
    (rf"stages\.(\d+)\.(\d+)\.conv2\.norm\.{_KIND}", r"stages.\1.\2.residual.3.layers.1.\3"),
    (r"stages\.(\d+)\.(\d+)\.shortcut\.conv\.weight", r"stages.\1.\2.shortcut.layers.0.weight"),
    (rf"stages\.(\d+)\.(\d+)\.shortcut\.norm\.{_KIND}", r"stages.\1.\2.shortcut.layers.1.\3"),
    (r"head\.(weight|bias)", r"classifier.\1"),
)


class TriangleSpike(torch.autograd.Function):
    """1 where the membrane is above the threshold 1, else 0; its gradient is taken to be max(0, 1 - |membrane - 1|)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, membrane: Tensor) -> Tensor:
        ctx.save_for_backward(membrane)
        return (membrane > 1.0).to(membrane.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_spike: Tensor) -> Tensor:
        (membrane,) = ctx.saved_tensors
        return grad_spike * (1.0 - (membrane - 1.0).abs()).clamp(min=0.0)


class RectangleSpike(torch.autograd.Function):
    """1 where the membrane is above 0.5, else 0; its gradient is taken to be 1 where |membrane - 0.5| < 0.5."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, membrane: Tensor) -> Tensor:
        ctx.save_for_backward(membrane)
        return (membrane > 0.5).to(membrane.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_spike: Tensor) -> Tensor:
        (membrane,) = ctx.saved_tensors
        return grad_spike * ((membrane - 0.5).abs() < 0.5).to(grad_spike.dtype)


@dataclass(frozen=True)
class Family:
    """The authors' constants for one size of images; ``widths`` are multiples of the stem's channels."""

    stem_kernel: int
    stem_stride: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    decay: float
    spike: type[torch.autograd.Function]
    detach_reset: bool


FAMILIES = {
    "cifar": Family(3, 1, (2, 4, 8), (1, 2, 2), 0.5, TriangleSpike, False),
    "imagenet": Family(7, 2, (1, 2, 4, 8), (2, 2, 2, 2), 0.25, RectangleSpike, True),
}


class LIF(nn.Module):
    """The authors' neuron, one time step after the other: [B, T, C, H, W] to spikes of the same shape."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def forward(self, x: Tensor) -> Tensor:
        membrane = torch.zeros_like(x[:, 0])
        spikes = []
        for t in range(x.shape[1]):
            membrane = self.family.decay * membrane + x[:, t]
            spike = self.family.spike.apply(membrane)
            membrane = membrane * (1.0 - (spike.detach() if self.family.detach_reset else spike))
            spikes.append(spike)
        return torch.stack(spikes, dim=1)


class EveryFrame(nn.Module):
    """Run image layers over all B x T frames: [B, T, C, H, W] in and out."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> EveryFrame:
    """Return a convolution with BatchNorm over all frames."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return EveryFrame(conv, nn.BatchNorm2d(out_channels))


class GatedAttention(nn.Module):
    """sigmoid(temporal x spatial-channel attention) times the spikes of a LIF layer: [B, T, C, H, W]."""

    def __init__(self, T: int, channels: int, family: Family) -> None:
        super().__init__()
        hidden = max(1, T // 2)
        self.lif = LIF(family)
        self.temporal = nn.Sequential(nn.Linear(T, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, T, bias=False))
        # Kernels of 4 x 4 keep the size with 1 row and column before and 2 after.
        self.spatial_channel = EveryFrame(
            nn.ZeroPad2d((1, 2, 1, 2)),
            nn.Conv2d(channels, channels, 4, bias=False),
            nn.ReLU(),
            nn.ZeroPad2d((1, 2, 1, 2)),
            nn.Conv2d(channels, channels, 4, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        frames = x.flatten(2)  # [B, T, C*H*W]
        temporal = self.temporal(frames.mean(2)) + self.temporal(frames.max(2).values)  # [B, T]
        return torch.sigmoid(temporal[:, :, None, None, None] * self.spatial_channel(x)) * self.lif(x)


class Block(nn.Module):
    """LIF-conv-BN twice plus the shortcut of the real-valued input: [B, T, C, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, family: Family) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            LIF(family),
            conv_norm(in_channels, out_channels, 3, stride),
            LIF(family),
            conv_norm(out_channels, out_channels, 3),
        )
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same_shape else conv_norm(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class StepLoopNetwork(nn.Module):
    """Images [B, 3, H, W] to logits [B, T, K]; everything is computed T times."""

    def __init__(self, family: str, T: int, num_classes: int, width: int, depth: Sequence[int]) -> None:
        super().__init__()
        self.T = T
        constants = FAMILIES[family]
        self.stem = conv_norm(3, width, constants.stem_kernel, constants.stem_stride)
        self.attention = GatedAttention(T, width, constants)
        widths = [width, *(width * factor for factor in constants.widths)]
        self.stages = nn.Sequential()
        for (entry, exit), blocks, stride in zip(pairwise(widths), depth, constants.strides, strict=True):
            first = Block(entry, exit, stride, constants)
            self.stages.append(nn.Sequential(first, *(Block(exit, exit, 1, constants) for _ in range(blocks - 1))))
        self.lif = LIF(constants)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.unsqueeze(1).repeat(1, self.T, 1, 1, 1)
        x = self.stages(self.attention(self.stem(x)))
        return self.classifier(self.lif(x).mean((3, 4)))
