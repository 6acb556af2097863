"""MS-ResNet, the membrane-shortcut residual network, with gated attention coding or a baseline coding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from spikingjelly.activation_based import base, layer, surrogate
from torch import Tensor, nn

from gac.coding import Coding
from gac.coding.baselines import BaselineCoding
from gac.coding.gated import Gate, GatedAttentionCoding, TemporalInit
from gac.errors import InputError, check_size
from gac.models import fused, resetting
from gac.models.blocks import ConvNorm, DeepStem, Downsampling, MSBlock
from gac.neuron import Backend, LIFNode, check_step_mode, make_parameters
from gac.ops.neuron import LIFParameters
from gac.ops.watchers import refuse_symbolic


@dataclass(frozen=True)
class Family:
    """How the networks differ: those of GAC's authors on CIFAR and on ImageNet, and others with membrane shortcuts."""

    stem_kernel: int
    stem_stride: int
    widths: tuple[int, ...]
    """Channels of the stages as multiples of the stem's."""
    strides: tuple[int, ...]
    neuron: Literal["cifar", "imagenet"] | LIFParameters
    initialisation: Literal["torch", "imagenet", "threshold"] = "torch"
    """PyTorch's own; that of GAC's ImageNet code; or PyTorch's with the BatchNorm weights of that code."""
    stem: type[ConvNorm] = ConvNorm
    downsampling: Downsampling = "stride"
    dropout: float = 0.0
    """Share of the head's inputs that training leaves out, the same ones at all time steps."""


CIFAR = Family(3, 1, widths=(2, 4, 8), strides=(1, 2, 2), neuron="cifar")
IMAGENET = Family(7, 2, (1, 2, 4, 8), (2, 2, 2, 2), neuron="imagenet", initialisation="imagenet")
MAX_CIFAR = Family(
    *(3, 1, (2, 4, 8), (1, 2, 2)),
    # h_t = 0.5 v_{t-1} + 0.5 x_t; s_t = [h_t > 1]; v_t = (1 - s_t) h_t, reset detached; ds/dh that of a sigmoid
    neuron=LIFParameters(2.0, True, 1.0, 0.0, detach_reset=True, surrogate=surrogate.Sigmoid(alpha=4.0)),
    downsampling="max_pool",
)
"""Max-ResNet on CIFAR (Fang et al., NeurIPS 2025), as SpikingJelly's ``model.max_resnet18``."""
IMAGENET_104 = Family(
    *(3, 2, (1, 2, 4, 8), (2, 2, 2, 2)),
    neuron="imagenet",
    initialisation="threshold",
    stem=DeepStem,
    downsampling="average_pool",
    dropout=0.2,
)
"""MS-ResNet-104 as its authors' code has it (Hu et al., 2024); their 18 and 34 are those of ``IMAGENET``."""


class MSResNet(nn.Module, base.StepModule):
    """MS-ResNet that turns an image into class scores over T time steps.

    Input: images [B, C, H, W], the same at every time step and then run through the stem only once, or sequences
    [T, B, C, H, W]. Output: logits [T, B, K]. Every call is a new sequence of which nothing stays in the network, so
    several threads may call it at once (in training they share BatchNorm's running statistics); other neurons that
    were put in place of its own are reset before and after it, for one thread at a time. In step mode "s", which only
    direct coding supports, a call is one time step: [B, C, H, W] to [B, K], the neurons keep their state, and
    ``functional.reset_net`` begins the next sequence.

    With gated attention coding the stem's output passes the coding; with direct coding it enters the first block
    as it is; with rate, latency and phase coding the image is encoded before the stem (see
    :class:`~gac.coding.baselines.BaselineCoding`).

    Args:
        family: CIFAR, IMAGENET, MAX_CIFAR or IMAGENET_104.
        num_classes: Number of classes K.
        T: Number of time steps.
        in_channels: Channels C of the images.
        coding: How an image becomes spikes.
        width: Channels of the stem.
        depth: Blocks in each stage.
        neuron: Name of the LIF preset, or all constants of the neurons; by default the family's.
        kernel_size: Gated attention: side of the spatial-channel convolutions in pixels.
        reduction: Gated attention: bottleneck factor of the temporal branch.
        temporal_init: Gated attention: initialisation of the temporal branch.
        gate: Gated attention: "both" attentions, or for ablations "temporal" or "spatial_channel" alone.
        backend: What runs the network: "cupy" (this package's CUDA kernels), "c" (their C versions on the CPU, and
            convolutions over spikes by events), "torch" (the modules one by one) or "auto" (the kernels where they
            work: with CuPy on a CUDA device, with a C compiler on the CPU; else torch). With the kernels, sequences of
            up to 16 steps run fused: a neuron together with the BatchNorm, residual sum, gate or pooling next to it.
            Its module is then not called and its membrane potential not kept; a hook on it (a monitor's, for example)
            makes that layer run unfused, and one on a block or a BatchNorm the whole network.

    Raises:
        InputError: For sizes below 1, a depth that does not have one number per stage, unknown names; in forward
            for integers, for a wrong number of dimensions, time steps or channels, and for a neuron in place of the
            network's that is in another step mode.
    """

    def __init__(
        self,
        family: Family,
        num_classes: int,
        T: int,
        *,
        depth: Sequence[int],
        in_channels: int = 3,
        coding: Coding = "gac",
        width: int = 64,
        neuron: Literal["cifar", "imagenet"] | LIFParameters | None = None,
        kernel_size: int = 4,
        reduction: int = 2,
        temporal_init: TemporalInit = "default",
        gate: Gate = "both",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "T": T, "in_channels": in_channels, "width": width}
        num_classes, T, in_channels, width = (check_size(name, value) for name, value in sizes.items())
        stages = len(family.widths)
        if not isinstance(depth, Sequence) or len(depth) != stages:
            raise InputError(f"depth must be {stages} integers >= 1, the blocks of each stage, got {depth!r}")
        depth = [check_size(f"depth[{stage}]", blocks) for stage, blocks in enumerate(depth)]
        if coding != "gac" and gate != "both":
            raise InputError(f"gate is {gate!r}, and {coding} coding has no gate: leave it out or set coding to gac")
        neuron = make_parameters(family.neuron if neuron is None else neuron)
        self.T = T
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.coding_name = coding
        self._step_mode = "m"

        self.stem = family.stem(in_channels, width, family.stem_kernel, family.stem_stride)
        if coding == "gac":
            self.coding = GatedAttentionCoding(
                T,
                width,
                kernel_size,
                reduction,
                temporal_init,
                LIFNode.from_parameters(neuron, backend, keeps_state=False),
                gate,
            )
        elif coding == "direct":
            self.coding = nn.Identity()
        else:
            self.coding = BaselineCoding(coding, T)
        widths = [width, *(width * factor for factor in family.widths)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    MSBlock(
                        *(entry if i == 0 else exit, exit, stride if i == 0 else 1),
                        *(neuron, backend, family.downsampling),
                    )
                    for i in range(blocks)
                )
            )
            for (entry, exit), blocks, stride in zip(pairwise(widths), depth, family.strides, strict=True)
        )
        self.lif = LIFNode.from_parameters(neuron, backend, keeps_state=False)
        self.dropout = layer.Dropout(family.dropout, step_mode="m") if family.dropout else nn.Identity()
        self.head = nn.Linear(widths[-1], num_classes)
        if family.initialisation != "torch":
            self._initialise(convolutions=family.initialisation == "imagenet")

    def _initialise(self, convolutions: bool) -> None:
        # The authors' ImageNet code; their CIFAR code keeps PyTorch's defaults. MS-ResNet-104's keeps them for
        # convolutions.
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and convolutions:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.5)
        for module in self.modules():
            if isinstance(module, MSBlock):
                nn.init.zeros_(module.conv2.norm.weight)

    @property
    def T(self) -> int:
        """Number of time steps; may be set, but not with temporal attention, which has weights for each step."""
        return self.__dict__["T"]

    @T.setter
    def T(self, value: int) -> None:
        value = check_size("T", value)
        coding = self._modules.get("coding")
        if isinstance(coding, (GatedAttentionCoding, BaselineCoding)):
            coding.T = value
        self.__dict__["T"] = value

    def supported_step_mode(self) -> tuple[str, ...]:
        """Return "m", and "s" too for direct coding: the other codings make or see the whole sequence."""
        return ("s", "m") if self.coding_name == "direct" else ("m",)

    def set_backend(self, backend: Backend) -> None:
        """Choose what runs the network: "auto", "cupy", "c" or "torch" (see the argument ``backend``)."""
        for module in self.modules():
            if isinstance(module, LIFNode):
                module.backend = backend

    def set_checkpoint_activations(self, value: bool) -> None:
        """Choose whether blocks compute their activations again in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, MSBlock):
                module.checkpoint_activations = value

    def extra_repr(self) -> str:
        return f"T={self.T}, num_classes={self.num_classes}, coding={self.coding_name}"

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        # Not reset_net: its cache, shared by all networks, misses a neuron that was replaced, and a compiler that
        # reads it sees the networks that come and go elsewhere.
        stateful = resetting.collect(self)
        if any(getattr(each, "step_mode", self.step_mode) != self.step_mode for each in stateful):
            self._check_step_modes(self)
        if self.step_mode == "s":
            return self._run(x)
        resetting.reset(stateful)
        obstacle = fused.obstacle(self, x)
        if obstacle is not None and not torch.compiler.is_compiling():
            fused.report(self, obstacle, x)
        logits = fused.forward(self, x) if obstacle is None else self._run(x)
        resetting.reset([each for each in stateful if getattr(each, "keeps_state", True)])
        return logits

    def _run(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.dropout(self.lif(x).mean((-2, -1))))

    def encode(self, x: Tensor) -> Tensor:
        """Return the first block's input [T, B, C, H, W] (in step mode "s" [B, C, H, W]) for images or a sequence."""
        if self.coding_name not in ("gac", "direct"):
            return self.stem(self.coding(x))
        if self.step_mode == "s" or x.dim() == 5:
            return self.coding(self.stem(x))
        frame = self.coding(self.stem(x, repeats=self.T))
        # Repeated by torch.cat, which keeps channels_last; flattening an expanded frame would not.
        return frame if frame.dim() == 5 else torch.cat([frame] * self.T).unflatten(0, (self.T, -1))

    def _check_step_modes(self, within: nn.Module, prefix: str = "") -> None:
        """Raise InputError for a neuron that was put in place of one of the network's in another step mode."""
        for name, module in within.named_children():
            check_step_mode(f"{prefix}{name}", module, self.step_mode)
            # What is in SpikingJelly's containers, and in anybody's own modules, has the step mode that they need.
            if type(module) in (nn.ModuleList, nn.Sequential, MSBlock, GatedAttentionCoding):
                self._check_step_modes(module, f"{prefix}{name}.")

    def _check_input(self, x: Tensor) -> None:
        refuse_symbolic(x)
        if not x.is_floating_point():
            raise InputError(f"expected floating-point images, got {x.dtype}: divide bytes by 255 and normalise them")
        if x.dim() == 4 and x.shape[1] == self.in_channels:
            return
        takes_sequence = self.step_mode == "m" and self.coding_name in ("gac", "direct")
        if takes_sequence and x.dim() == 5 and x.shape[0] == self.T and x.shape[2] == self.in_channels:
            return
        expected = f"images [B, C={self.in_channels}, H, W]"
        if takes_sequence:
            expected += f" or a sequence [T={self.T}, B, C={self.in_channels}, H, W]"
        raise InputError(f"expected {expected}, got {list(x.shape)}")
