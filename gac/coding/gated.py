"""Gated attention coding: temporal times spatial-channel attention gates the spikes of a LIF layer."""

from typing import Literal, get_args

import torch
from spikingjelly.activation_based import base
from spikingjelly.activation_based.functional import seq_to_ann_forward
from torch import Tensor, nn

from gac.errors import InputError, check_size
from gac.neuron import LIFNode, check_step_mode
from gac.ops.watchers import refuse_symbolic

TemporalInit = Literal["default", "alive"]
Gate = Literal["both", "temporal", "spatial_channel"]
"""The attentions that a gate has: both, as published, or one alone, for ablations."""


class TemporalAttention(nn.Module):
    """One score per image and time step, from the sequence's averages and maxima.

    Average and maximum over (C, H, W) give two vectors over time; both pass the same bottleneck
    T -> max(1, T // reduction) -> T without biases, and the results are added (no sigmoid here).
    Input [T, B, C, H, W], or one frame [B, C, H, W] that stands for T equal ones; output [T, B].

    For input that is constant in time a hidden unit whose weights sum to a non-positive number is dead: its
    input is (sum of its weights) x (maximum), and the maximum of batch-normalised maps is positive. With the
    authors' initialisation all units are dead with probability 1/2, 1/4, 1/8 for T = 2, 4, 6.

    Args:
        T: Number of time steps.
        reduction: Bottleneck factor; the authors' is 2.
        init: "default" is the authors' (PyTorch's own); "alive" flips the sign of each row that sums to a negative
            number, which leaves the size of every weight as it is and cannot start dead.
    """

    def __init__(self, T: int, reduction: int = 2, init: TemporalInit = "default") -> None:
        super().__init__()
        hidden = max(1, T // reduction)
        self.squeeze = nn.Linear(T, hidden, bias=False)
        self.expand = nn.Linear(hidden, T, bias=False)
        if init == "alive":
            with torch.no_grad():
                sums = self.squeeze.weight.sum(dim=1, keepdim=True)
                self.squeeze.weight.mul_(torch.where(sums < 0, -1.0, 1.0))

    @property
    def T(self) -> int:
        """Number of time steps that there are weights for."""
        return self.squeeze.in_features

    def dead_units(self) -> int:
        """Return how many hidden units give zero for every static image with a positive maximum."""
        return int((self.squeeze.weight.detach().sum(dim=1) <= 0).sum())

    def forward(self, x: Tensor) -> Tensor:
        # A view in both memory formats.
        values = (x if x.is_contiguous() else x.movedim(-3, -1)).flatten(-3)
        average, maximum = values.mean(-1), values.max(-1).values  # [T, B] or [B]
        if x.dim() == 4:
            average, maximum = average.expand(self.T, -1), maximum.expand(self.T, -1)
        pooled = torch.stack((average, maximum)).transpose(1, 2)  # [2, B, T]
        # In time-first memory order, which the gate's output takes from it.
        return self.expand(self.squeeze(pooled).relu()).sum(0).t().contiguous()


class SpatialChannelAttention(nn.Module):
    """One score per channel and pixel, from two convolutions that all time steps share.

    Two K x K convolutions C -> C without biases, ReLU between. Input and output [T, B, C, H, W] or [B, C, H, W].
    For an even K the zero padding is (K - 1) // 2 before and K // 2 after, in both directions.
    The paper's figure has one convolution; the authors' code, which gave the numbers, has these two.
    """

    def __init__(self, channels: int, kernel_size: int = 4) -> None:
        super().__init__()
        before, after = (kernel_size - 1) // 2, kernel_size // 2
        # Conv2d(padding="same") pads likewise, but warns every user of an even kernel.
        self.pad = nn.ZeroPad2d((before, after, before, after))
        self.conv1 = nn.Conv2d(channels, channels, kernel_size, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return seq_to_ann_forward(x, self._one_frame) if x.dim() == 5 else self._one_frame(x)

    def _one_frame(self, x: Tensor) -> Tensor:
        return self.conv2(self.pad(self.conv1(self.pad(x)).relu()))


class NoTemporalAttention(nn.Module):
    """1 for each image and time step, in place of :class:`TemporalAttention` in an ablation."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T = T

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(self.T, x.shape[-4])


class NoSpatialChannelAttention(nn.Module):
    """1 for each channel and pixel, in place of :class:`SpatialChannelAttention` in an ablation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class GatedAttentionUnit(nn.Module):
    """The gate: sigmoid(TA(x) * SCA(x)) * spikes.

    ``x`` is [T, B, C, H, W], or one frame [B, C, H, W] that stands for T equal ones and is then computed once;
    ``spikes`` and the output are [T, B, C, H, W]. An ablation has 1 in place of TA(x) or SCA(x), and no weights for it.
    """

    def __init__(
        self,
        T: int,
        channels: int,
        kernel_size: int = 4,
        reduction: int = 2,
        temporal_init: TemporalInit = "default",
        gate: Gate = "both",
    ) -> None:
        super().__init__()
        self.temporal = (
            NoTemporalAttention(T) if gate == "spatial_channel" else TemporalAttention(T, reduction, temporal_init)
        )
        self.spatial_channel = (
            NoSpatialChannelAttention() if gate == "temporal" else SpatialChannelAttention(channels, kernel_size)
        )

    def forward(self, x: Tensor, spikes: Tensor) -> Tensor:
        temporal = self.temporal(x)[:, :, None, None, None]  # [T, B, 1, 1, 1]
        return torch.sigmoid(temporal * self.spatial_channel(x)) * spikes


class GatedAttentionCoding(nn.Module, base.MultiStepModule):
    """Gated attention coding of real-valued features (Qiu et al., AAAI-24): LIF spikes weighted by attention.

    Give it the output of a convolution with BatchNorm. Input [T, B, C, H, W], or one frame [B, C, H, W] that
    stands for T equal ones: the attention is then computed once, with the same result. Output [T, B, C, H, W],
    real values in [0, 1). The attention sees the whole sequence, so only step mode "m" exists, and every call is a
    fresh sequence, of which nothing stays in the spiking layer (a neuron of another class is reset before and after).

    Args:
        T: Number of time steps; the temporal attention's weights are made for it.
        channels: Number of channels C.
        kernel_size: Side of the spatial-channel convolutions in pixels.
        reduction: The temporal attention has max(1, T // reduction) hidden units.
        temporal_init: "default" (the authors') or "alive" (see :class:`TemporalAttention`).
        neuron: The spiking layer; by default the authors' CIFAR preset.
        gate: "both" attentions, or for ablations "temporal" or "spatial_channel" alone.

    Raises:
        InputError: For T, channels, kernel_size or reduction below 1, unknown names, a neuron that is none, and in
            forward for an input whose shape does not fit and a neuron in step mode "s".
    """

    def __init__(
        self,
        T: int,
        channels: int,
        kernel_size: int = 4,
        reduction: int = 2,
        temporal_init: TemporalInit = "default",
        neuron: LIFNode | None = None,
        gate: Gate = "both",
    ) -> None:
        super().__init__()
        sizes = {"T": T, "channels": channels, "kernel_size": kernel_size, "reduction": reduction}
        T, channels, kernel_size, reduction = (check_size(name, value) for name, value in sizes.items())
        for name, value, choices in (("temporal_init", temporal_init, TemporalInit), ("gate", gate, Gate)):
            if value not in get_args(choices):
                raise InputError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
        if neuron is not None and not callable(getattr(neuron, "reset", None)):
            raise InputError(f"neuron must be a spiking layer, such as gac.neuron.LIFNode(), got {neuron!r}")
        self.step_mode = "m"
        self.channels = channels
        self.lif = neuron if neuron is not None else LIFNode()
        if isinstance(self.lif, LIFNode):
            self.lif.keeps_state = False
        self.gate = GatedAttentionUnit(T, channels, kernel_size, reduction, temporal_init, gate)

    @property
    def T(self) -> int:
        """Number of time steps; a temporal attention has weights for it, and another one is then refused."""
        return self.gate.temporal.T

    @T.setter
    def T(self, value: int) -> None:
        if value == self.T:
            return
        if isinstance(self.gate.temporal, TemporalAttention):
            raise InputError(
                f"T of gated attention coding is fixed, as its temporal attention has weights for {self.T} time steps: "
                f"make a network with T={value!r} instead"
            )
        self.gate.temporal.T = check_size("T", value)

    def extra_repr(self) -> str:
        return f"T={self.T}, channels={self.channels}"

    def forward(self, x: Tensor) -> Tensor:
        refuse_symbolic(x)
        frame_ok = x.dim() == 4 and x.shape[1] == self.channels
        sequence_ok = x.dim() == 5 and x.shape[0] == self.T and x.shape[2] == self.channels
        if not (frame_ok or sequence_ok):
            raise InputError(
                f"expected a sequence [T={self.T}, B, C={self.channels}, H, W] or a frame "
                f"[B, C={self.channels}, H, W], got {list(x.shape)}"
            )
        check_step_mode("neuron", self.lif, "m")
        x_seq = x if x.dim() == 5 else x.expand(self.T, *x.shape)
        self.lif.reset()
        spikes = self.lif(x_seq)
        if getattr(self.lif, "keeps_state", True):
            self.lif.reset()
        return self.gate(x, spikes)
