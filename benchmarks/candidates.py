"""The networks that are compared, built alike and with equal weights, and the work that is timed.

An implementation is one entry of ``IMPLEMENTATIONS``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from benchmarks.common import PRECISIONS, NetworkSize
from benchmarks.peers import spikingjelly_network, step_loop
from gac import LIFNode, create_model
from gac.errors import InputError
from gac.execution.cuda_graph import WARM_UP_CALLS, CaptureOnDevice, Replayed
from gac.execution.device import autocast
from gac.models.ms_resnet import MSResNet
from gac.ops.backend import cupy_status

MEMORY_FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
"""Memory formats of images and weights, by their names on the command line."""
FLOOR = "convolution-floor"
"""The name of :class:`ConvolutionFloor` beside those of the implementations."""
STYLES = {FLOOR: ("#000000", "_")}
"""Colour and marker in figures: Okabe and Ito's, which colour-blind readers tell apart; markers for print in grey."""


@dataclass(frozen=True)
class Implementation:
    """One way to write the network.

    ``build`` makes the network from a size and T; ``style`` is colour and marker in figures; ``names`` are pairs of a
    pattern of our parameter names and its replacement.
    """

    name: str
    style: tuple[str, str]
    build: Callable[[NetworkSize, int], nn.Module]
    names: tuple[tuple[str, str], ...] = ()
    batch_first: bool = False  # logits are [B, T, K], else [T, B, K]
    keeps_channels_last: bool = True  # activations stay in channels_last where the images are
    kernels: bool = False  # needs our CUDA kernels, which have no float64
    replayed: bool = False  # its steps are replays of CUDA graphs

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run on a device, in one line, or None if it can."""
        status = cupy_status(device) if self.kernels else None
        if status is None or status.ok:
            return None
        return f"{status.reason} ({status.hint})" if status.hint else status.reason

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors under this network's names from a mapping with ours. Raises KeyError for an unknown name."""
        if not self.names:
            return dict(tensors)
        matches = {
            name: match.expand(replacement)
            for name in tensors
            for pattern, replacement in self.names
            if (match := re.fullmatch(pattern, name))
        }
        return {matches[name]: tensor for name, tensor in tensors.items()}

    def layout(self, requested: str, precision: str, device: torch.device) -> str:
        """Return the memory format's name: the requested one, or for "auto" the one that suits the implementation."""
        if requested != "auto":
            return requested
        if device.type != "cuda" or not self.keeps_channels_last:
            return "NCHW"
        # What the convolutions run fastest with; the fused kernels copy every activation that is not channels_last.
        return "NHWC" if precision != "fp32" or self.kernels else "NCHW"


def _ours(name: str, style: tuple[str, str], backend: str, **options: bool) -> Implementation:
    def build(size: NetworkSize, T: int) -> MSResNet:
        # A temporal attention that starts dead has no gradient to compare.
        sizes = {"width": size.width, "depth": size.depth}
        return create_model(size.network, size.num_classes, T, temporal_init="alive", backend=backend, **sizes)

    return Implementation(name, style, build, **options)


def _peer(name: str, style: tuple[str, str], network: Callable[..., nn.Module], *options: object) -> Implementation:
    def build(size: NetworkSize, T: int) -> nn.Module:
        return network(size.family, T, size.num_classes, size.width, size.depth)

    return Implementation(name, style, build, *options)


REFERENCE = _ours("ours-torch", ("#009E73", "s"), "torch")
"""The implementation that makes the weights and that the others are checked against."""
IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        _ours("ours-cupy", ("#0072B2", "o"), "cupy", kernels=True),
        _ours("ours-cupy-graph", ("#56B4E9", "v"), "cupy", kernels=True, replayed=True),
        REFERENCE,
        _peer("spikingjelly", ("#D55E00", "^"), spikingjelly_network.SpikingJellyNetwork, spikingjelly_network.NAMES),
        _peer("step-loop", ("#666666", "D"), step_loop.StepLoopNetwork, step_loop.NAMES, True, False),
    )
}
STYLES = {name: each.style for name, each in IMPLEMENTATIONS.items()} | STYLES
NOT_REPLAYED = [name for name, each in IMPLEMENTATIONS.items() if not each.replayed]


def what_runs(
    names: Sequence[str], precisions: Sequence[str], device: torch.device
) -> tuple[list[Implementation], list[str], dict[str, str]]:
    """Return the implementations and precisions of these that a device can run, and why it cannot run the others.

    Raises InputError if it can run none of the implementations, or none of the precisions.
    """
    missing = {name: IMPLEMENTATIONS[name].missing(device) for name in dict.fromkeys(names)}
    lacking = {name: PRECISIONS[name].missing(device) for name in dict.fromkeys(precisions)}
    for option, reasons in (("--implementations", missing), ("--precision", lacking)):
        if reasons and all(reasons.values()):
            raise InputError(f"{option}: nothing can run, {'; '.join(f'{k}: {v}' for k, v in reasons.items())}")
    skipped = {name: reason for name, reason in (missing | lacking).items() if reason is not None}
    implementations = [IMPLEMENTATIONS[name] for name in missing if name not in skipped]
    return implementations, [name for name in lacking if name not in skipped], skipped


@dataclass(frozen=True)
class Setting:
    """What is timed: size of the network, T, images per batch, precision, layout "NCHW", "NHWC" or "auto", device."""

    size: NetworkSize
    T: int
    batch: int
    precision: str
    layout: str
    device: torch.device

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that all implementations start from."""
        torch.manual_seed(0)
        return REFERENCE.build(self.size, self.T).state_dict()


class Candidate:
    """A network with what it needs to be trained, on random images and labels."""

    def __init__(self, implementation: Implementation, setting: Setting, weights: Mapping[str, Tensor]) -> None:
        size, batch, device = setting.size, setting.batch, setting.device
        self.layout = implementation.layout(setting.layout, setting.precision, device)
        memory_format = MEMORY_FORMATS[self.layout]
        network = implementation.build(size, setting.T)
        network.load_state_dict(implementation.translate(weights))
        self.network = network.to(device, memory_format=memory_format)
        shape = (batch, 3, size.image_size, size.image_size)
        self.images = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
        self.labels = torch.randint(size.num_classes, (batch,), device=device)
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-5, fused=device.type == "cuda"
        )
        for parameter in network.parameters():
            # See gac/training/optim.py: a first step that overflows would leave them uninitialised.
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=setting.precision == "fp16")
        self._loss: Tensor | None = None
        self._time_dimension = 1 if implementation.batch_first else 0
        self._device = device
        self._amp = "off" if setting.precision == "fp32" else setting.precision

    def train_step(self) -> Tensor:
        """Train on the batch and return its loss."""
        self.optimizer.zero_grad()
        with autocast(self._device, self._amp):
            logits = self.network(self.images)
            loss = F.cross_entropy(logits.float().mean(self._time_dimension), self.labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._loss = loss.detach()
        return self._loss

    @torch.inference_mode()
    def eval_step(self) -> Tensor:
        """Return the logits of the batch."""
        with autocast(self._device, self._amp):
            return self.network(self.images)

    def start_evaluation(self) -> None:
        """Let BatchNorm use its running statistics."""
        self.network.eval()

    def rest(self) -> None:
        """Free what the last step left behind: gradients, and membrane potentials that hold a graph."""
        self.optimizer.zero_grad()
        functional.reset_net(self.network)

    def diverged(self) -> bool:
        """Return whether the last training step's loss is not finite."""
        return self._loss is not None and not self._loss.isfinite().item()


class ReplayedCandidate(Candidate):
    """A candidate whose steps are replayed as train.cuda_graph does it; their results are overwritten by the next.

    The first step of a turn warms up, captures and replays; those that follow replay.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self._replayed: dict[str, Replayed] = {}

    def train_step(self) -> Tensor:
        """Train on the batch and return its loss."""
        return self._replay("train_step", super().train_step)

    def eval_step(self) -> Tensor:
        """Return the logits of the batch."""
        return self._replay("eval_step", super().eval_step)

    def rest(self) -> None:
        """Free what the last step left behind, and the graphs with their memory."""
        if self._device.type == "cuda":
            # The last replay may not have ended.
            torch.cuda.synchronize(self._device)
        self._replayed.clear()
        super().rest()

    def _replay(self, name: str, step: Callable[[], Tensor]) -> Tensor:
        if name not in self._replayed:
            self._replayed[name] = Replayed(step, CaptureOnDevice(self._device))
            for _ in range(WARM_UP_CALLS):
                self._replayed[name]()
        return self._replayed[name]()


def neurons(network: MSResNet) -> list[LIFNode]:
    """Return the spiking layers of our network in the order in which an image passes them."""
    return [module for module in network.modules() if isinstance(module, LIFNode)]


def make_candidate(implementation: Implementation, setting: Setting, weights: Mapping[str, Tensor]) -> Candidate:
    """Return the candidate of an implementation."""
    return (ReplayedCandidate if implementation.replayed else Candidate)(implementation, setting, weights)


class ConvolutionFloor:
    """The floor under a training step: the convolutions of all residual blocks on T x B frames, and nothing else.

    A training step is the forward pass, the data gradient and the weight gradient of each; the first block's data
    gradient counts, since the gate before it is trained. Every convolution gets what it gets in the network from two
    random images, repeated for the batch: spikes cost less power than noise, which limits the clock of a GPU.
    """

    def __init__(self, setting: Setting, weights: Mapping[str, Tensor]) -> None:
        network = REFERENCE.build(setting.size, setting.T)
        network.load_state_dict(weights)
        self._modules = [module for module in network.stages.modules() if isinstance(module, nn.Conv2d)]
        self._inputs = record_inputs(network, self._modules, setting.size.image_size)
        self._setting = setting
        self.layout = REFERENCE.layout(setting.layout, setting.precision, setting.device)

    @cached_property
    def convolutions(self) -> list[tuple[Tensor, Tensor, Tensor, tuple]]:
        """Input, weight, output's gradient, stride and padding of each, on the device; made when a turn begins."""
        T, batch, memory_format = self._setting.T, self._setting.batch, MEMORY_FORMATS[self.layout]
        place = {"device": self._setting.device, "dtype": PRECISIONS[self._setting.precision].dtype}
        grad_outputs: dict[torch.Size, Tensor] = {}
        convolutions = []
        for module, frames in zip(self._modules, self._inputs, strict=True):
            x = frames.to(**place).repeat(batch, 1, 1, 1)[: T * batch].contiguous(memory_format=memory_format)
            weight = module.weight.detach().to(**place, memory_format=memory_format)
            shape = F.conv2d(x[:1], weight, None, module.stride, module.padding).shape
            shape = torch.Size((len(x), *shape[1:]))
            if shape not in grad_outputs:
                # Shared by convolutions with equal outputs: they are read, never written.
                grad_outputs[shape] = torch.randn(shape, **place).contiguous(memory_format=memory_format)
            convolutions.append((x, weight, grad_outputs[shape], (module.stride, module.padding)))
        return convolutions

    @torch.inference_mode()
    def train_step(self) -> None:
        """Run every convolution forward, then both gradients of each, last first."""
        self.eval_step()
        for x, weight, grad_output, arguments in reversed(self.convolutions):
            convolution_gradients(x, weight, grad_output, arguments)

    @torch.inference_mode()
    def eval_step(self) -> None:
        """Run every convolution forward."""
        for x, weight, _, arguments in self.convolutions:
            F.conv2d(x, weight, None, *arguments)

    def start_evaluation(self) -> None:
        """Do nothing."""

    def rest(self) -> None:
        """Free the convolutions' tensors, which the implementations that take their turns now may need."""
        self.__dict__.pop("convolutions", None)

    def diverged(self) -> bool:
        """Return False: nothing is learned."""
        return False


def convolution_gradients(x: Tensor, weight: Tensor, grad_output: Tensor, arguments: tuple) -> tuple[Tensor, ...]:
    """Return the data gradient and the weight gradient of a convolution with some stride and padding."""
    arguments = (None, *arguments, (1, 1), False, (0, 0), 1, (True, True, False))
    return torch.ops.aten.convolution_backward(grad_output, x, weight, *arguments)[:2]


def record_inputs(network: nn.Module, modules: Sequence[nn.Module], images: Tensor | int) -> list[Tensor]:
    """Return a copy of what each of ``modules`` gets first in a training forward pass of ``images``.

    A number stands for two random images of this size; two, because BatchNorm refuses a single value for each channel.
    """
    images = torch.randn(2, 3, images, images) if isinstance(images, int) else images
    inputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[module] = arguments[0].detach().clone()

    handles = [module.register_forward_pre_hook(record) for module in modules]
    with torch.no_grad():
        network.train()(images)
    for handle in handles:
        handle.remove()
    return [inputs[module] for module in modules]
