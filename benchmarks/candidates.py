"""The networks that are compared, built alike and with equal weights, and the work that is timed.

An implementation is one entry of ``IMPLEMENTATIONS``.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, monitor
from torch import Tensor, nn

from benchmarks.common import PRECISIONS, MeasurementError, NetworkSize
from benchmarks.peers import LIF, Network, spikingjelly_lif
from benchmarks.trained import Trained
from gac import create_model
from gac.command_line import Parser
from gac.config import TrainConfig
from gac.execution.cuda_graph import WARM_UP_CALLS, CaptureOnDevice, Replayed
from gac.execution.device import autocast
from gac.models.ms_resnet import MSResNet
from gac.ops.backend import kernels_status
from gac.ops.overlap import overlapped, select_executor
from gac.training.optim import make_optimizer

MEMORY_FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
"""Memory formats of images and weights, by their names on the command line."""
FLOOR = "convolution-floor"


@dataclass(frozen=True)
class Setting:
    """What is timed: size of the network, T, images per batch, precision, layout "NCHW", "NHWC" or "auto", device."""

    size: NetworkSize
    T: int
    batch: int
    precision: str
    layout: str
    device: torch.device
    trained: Trained | None = None

    def weights(self) -> list[Tensor]:
        """Return the weights that all implementations start from."""
        if self.trained is not None:
            return self.trained.weights
        torch.manual_seed(0)
        return list(REFERENCE.build(self.size, self.T).state_dict().values())

    def autocast(self) -> torch.autocast:
        """Return the context in which a network runs in the precision."""
        return autocast(self.device, "off" if self.precision == "fp32" else self.precision)

    def describe(self, implementation: "Implementation") -> dict[str, Any]:
        """Return what is timed of an implementation, as tables and JSON files have it."""
        place = {"implementation": implementation.name, "T": self.T, "batch": self.batch}
        return place | {"precision": self.precision, "layout": implementation.layout(self)}


class Candidate:
    """A network with what it needs to be trained, on random images and labels.

    If they are replayed, as train.cuda_graph does it, the first step of a turn warms up, captures and replays; results
    are overwritten by the next step.
    """

    def __init__(self, implementation: "Implementation", setting: Setting, weights: Sequence[Tensor]) -> None:
        size, device = setting.size, setting.device
        self.implementation, self.setting = implementation, setting
        self.memory_format = MEMORY_FORMATS[implementation.layout(setting)]
        network = load(implementation.build(size, setting.T), weights)
        self.network = network.to(device, memory_format=self.memory_format)
        if setting.trained is None:
            images = torch.randn(setting.batch, 3, size.image_size, size.image_size, device=device)
        else:
            images = setting.trained.batch(setting.batch).to(device)
        self.images = images.contiguous(memory_format=self.memory_format)
        self.labels = torch.randint(size.num_classes, (setting.batch,), device=device)
        # With trained weights so small that firing rates stay theirs.
        learning_rate = 0.01 if setting.trained is None else 1e-7
        config = TrainConfig(learning_rate=learning_rate, momentum=0.9, weight_decay=5e-5)
        self.optimizer = make_optimizer(self.network.parameters(), config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=setting.precision == "fp16")
        self._convolution_weights = [parameter for parameter in self.network.parameters() if parameter.dim() == 4]
        self._executor = select_executor(implementation.overlapped, device)
        self._loss: Tensor | None = None
        self._replayed: dict[Callable, Replayed] | None = {} if implementation.replayed else None

    def train_step(self) -> Tensor:
        """Train on the batch and return its loss."""
        return self._run(self._train)

    def eval_step(self) -> Tensor:
        """Return the logits of the batch."""
        return self._run(self._evaluate)

    def _run(self, step: Callable[[], Tensor]) -> Tensor:
        if self._replayed is None:
            return step()
        if step not in self._replayed:
            self._replayed[step] = Replayed(step, CaptureOnDevice(self.setting.device))
            for _ in range(WARM_UP_CALLS):
                self._replayed[step]()
        return self._replayed[step]()

    def _train(self) -> Tensor:
        self.optimizer.zero_grad()
        with nullcontext() if self._executor is None else overlapped(self._convolution_weights, self._executor):
            with self.setting.autocast():
                logits = self.network(self.images)
                loss = F.cross_entropy(logits.float().mean(self.implementation.time_dimension), self.labels)
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._loss = loss.detach()
        return self._loss

    @torch.inference_mode()
    def _evaluate(self) -> Tensor:
        with self.setting.autocast():
            return self.network(self.images)

    @torch.no_grad()
    def densities(self) -> list[float]:
        """Return how many of the inputs of each of the blocks' 3 x 3 convolutions spike, in their order."""
        with monitor.InputMonitor(self.network.stages, nn.Conv2d, lambda x: x.mean().item()) as inputs:
            self.network(self.images)
        functional.reset_net(self.network)
        return [inputs[name][0] for name in inputs.monitored_layers if "shortcut" not in name]

    def rest(self) -> None:
        """Free what the last step left behind: gradients, membrane potentials that hold a graph, captured graphs."""
        if self._replayed:
            if self.setting.device.type == "cuda":
                # The last replay may not have ended.
                torch.cuda.synchronize(self.setting.device)
            self._replayed.clear()
        self.optimizer.zero_grad()
        functional.reset_net(self.network)

    def check_loss(self) -> None:
        """Raise MeasurementError if the last training step's loss is not finite."""
        if self._loss is not None and not self._loss.isfinite().item():
            at = self.setting
            where = f"{self.implementation.name}, T={at.T}, batch {at.batch}, {at.precision}"
            raise MeasurementError(f"{where}: the loss is not finite any more")


class ConvolutionFloor(Candidate):
    """The floor under a training step: the convolutions of all residual blocks on T x B frames, and nothing else.

    A training step is the forward pass, the data gradient and the weight gradient of each; the first block's data
    gradient counts, since the gate before it is trained. Every convolution gets what it gets in the network: spikes
    cost less power than noise, which limits the clock of a GPU.
    """

    @cached_property
    def convolutions(self) -> list[tuple[nn.Module, Tensor, Tensor]]:
        """Each convolution with its input and its output's gradient, on the device; made when a turn begins."""
        blocks, grads, convolutions = self.network.stages, {}, []
        place = {"dtype": PRECISIONS[self.setting.precision], "memory_format": self.memory_format}
        with monitor.InputMonitor(blocks, nn.Conv2d, lambda x: x.to(copy=True, **place)) as inputs, torch.no_grad():
            self.network.train()(self.images)
        for name in inputs.monitored_layers:
            convolution, (x,) = deepcopy(blocks.get_submodule(name)).to(**place), inputs[name]
            shape = (len(x), *convolution(x[:1]).shape[1:])
            if shape not in grads:
                # Shared by convolutions with equal outputs: they are read, never written.
                grads[shape] = torch.randn(shape, device=x.device).to(**place)
            convolutions.append((convolution, x.requires_grad_(), grads[shape]))
        return convolutions

    def _train(self) -> None:
        outputs = [convolution(x) for convolution, x, _ in self.convolutions]
        wanted = [tensor for convolution, x, _ in self.convolutions for tensor in (x, convolution.weight)]
        torch.autograd.grad(outputs, wanted, [grad for *_, grad in self.convolutions])

    @torch.no_grad()
    def _evaluate(self) -> None:
        for convolution, x, _ in self.convolutions:
            convolution(x)

    def rest(self) -> None:
        """Free the convolutions' tensors: the implementations that take their turns now may need the memory."""
        self.__dict__.pop("convolutions", None)


@dataclass(frozen=True)
class Implementation:
    """A way to write the network: ``build`` makes it from a size and T, ``work`` is what is timed of it.

    ``style`` is colour and marker in figures: Okabe and Ito's colours, which colour-blind readers tell apart, and
    markers for print in grey.
    """

    name: str
    style: tuple[str, str]
    build: Callable[[NetworkSize, int], nn.Module]
    work: type[Candidate] = Candidate
    time_dimension: int = 0  # of the logits: 0 for [T, B, K], 1 for [B, T, K]
    keeps_channels_last: bool = True  # activations stay in channels_last where the images are
    kernels: Literal["cupy", "c"] | None = None  # needs ours, CUDA's or the CPU's, which have no float64
    replayed: bool = False  # its steps are replays of CUDA graphs
    overlapped: bool = False  # its weight gradients are computed on a second CUDA stream

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run on a device, in one line, or None if it can."""
        if self.kernels is None:
            return None
        status = kernels_status(self.kernels, device)
        if status.ok:
            return None
        return f"{status.reason} ({status.hint})" if status.hint else status.reason

    def layout(self, setting: Setting) -> str:
        """Return the memory format's name: the requested one, or for "auto" the one that suits the implementation."""
        if setting.layout != "auto":
            return setting.layout
        # What the convolutions run fastest with; the fused kernels copy every activation that is not channels_last.
        wanted = self.kernels or (setting.device.type == "cuda" and setting.precision != "fp32")
        return "NHWC" if wanted and self.keeps_channels_last else "NCHW"


def _ours(backend: str, size: NetworkSize, T: int) -> MSResNet:
    # A temporal attention that starts dead has no gradient to compare.
    options = {"width": size.width, "depth": size.depth, "temporal_init": "alive", "backend": backend}
    return create_model(size.network, size.num_classes, T, **options)


_CUPY = Implementation("ours-cupy", ("#0072B2", "o"), partial(_ours, "cupy"), kernels="cupy")
REFERENCE = Implementation("ours-torch", ("#009E73", "s"), partial(_ours, "torch"))
"""The implementation that makes the weights and that the others are checked against."""
_ALL = (
    _CUPY,
    replace(_CUPY, name="ours-cupy-graph", style=("#56B4E9", "v"), replayed=True),
    replace(_CUPY, name="ours-cupy-overlap", style=("#F0E442", "X"), replayed=True, overlapped=True),
    Implementation("ours-c", ("#CC79A7", "P"), partial(_ours, "c"), kernels="c"),
    REFERENCE,
    Implementation("spikingjelly", ("#D55E00", "^"), partial(Network, 0, spikingjelly_lif)),
    Implementation(
        "step-loop", ("#666666", "D"), partial(Network, 1, LIF), time_dimension=1, keeps_channels_last=False
    ),
    replace(REFERENCE, name=FLOOR, style=("#000000", "_"), work=ConvolutionFloor),
)
IMPLEMENTATIONS = {each.name: each for each in _ALL}
NETWORKS = [name for name, each in IMPLEMENTATIONS.items() if each.work is Candidate and not each.replayed]


def add_options(parser: Parser, names: Collection[str], **defaults: Any) -> None:
    """Add the options that all benchmarks of networks have; those whose default is a list take several values."""
    help = "what to compare; those that the device cannot run are skipped"
    parser.add("--implementations", help, choices=names, default=list(names))
    NetworkSize.add_options(parser, defaults["T"], defaults["batch"])
    help = "float32, or autocast to half precision; those that the device lacks are skipped"
    parser.add("--precision", help, choices=PRECISIONS, default=defaults["precision"])
    help = (
        "memory order of images and weights; auto: NHWC with our kernels, and on a GPU in half precision for all but"
        " the step-loop, which does not keep it; else NCHW"
    )
    parser.add("--layout", help, choices=("auto", *MEMORY_FORMATS), default="auto")


def load(network: nn.Module, weights: Sequence[Tensor]) -> nn.Module:
    """Return a network with the reference's weights, in its order (see benchmarks/peers.py)."""
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    return network
