"""The networks that are compared, built alike and with equal weights."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from benchmarks.network_size import NetworkSize
from benchmarks.peers import spikingjelly_network, step_loop
from gac import LIFNode, create_model
from gac.errors import InputError
from gac.ops import backend

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
"""Memory orders of images and weights."""


@dataclass(frozen=True)
class Implementation:
    """One way to write the network.

    Args:
        name: Name on the command line and in tables.
        build: Makes the network from a size and the number of time steps T.
        neuron_type: Class of its spiking layers, which it registers in the order of our network.
        names: Pairs of a pattern of our parameter names and its replacement; empty for our own names.
        batch_first: The layout is [B, T, ...], logits are [B, T, K]; else [T, B, ...] and [T, B, K].
        keeps_channels_last: Activations stay in the memory order channels_last where the images have it.
        float64: It runs in float64 too.
        kernels: It needs our CUDA kernels.
        replayed: Its steps are replays of CUDA graphs.
    """

    name: str
    build: Callable[[NetworkSize, int], nn.Module]
    neuron_type: type[nn.Module]
    names: tuple[tuple[str, str], ...] = ()
    batch_first: bool = False
    keeps_channels_last: bool = True
    float64: bool = True
    kernels: bool = False
    replayed: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run on a device, in one line, or None if it can."""
        if not self.kernels:
            return None
        status = backend.cupy_status(device)
        if status.ok:
            return None
        return f"{status.reason} ({status.hint})" if status.hint else status.reason

    def neurons(self, network: nn.Module) -> list[nn.Module]:
        """Return the spiking layers of a network that it built, in the order in which an image passes them."""
        return [module for module in network.modules() if isinstance(module, self.neuron_type)]

    def time_first(self, sequence: Tensor) -> Tensor:
        """Return a view [T, B, ...] of a sequence in the network's layout, or the other way round."""
        return sequence.transpose(0, 1) if self.batch_first else sequence

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors under this network's names from a mapping with ours. Raises KeyError for an unknown name."""
        if not self.names:
            return dict(tensors)
        return {_translate(name, self.names): tensor for name, tensor in tensors.items()}


def _translate(name: str, names: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in names:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise KeyError(name)


def _build_ours(backend: str) -> Callable[[NetworkSize, int], nn.Module]:
    def build(size: NetworkSize, T: int) -> nn.Module:
        return create_model(
            size.network,
            size.num_classes,
            T,
            width=size.width,
            depth=size.depth,
            # A temporal attention that starts dead has no gradient to compare.
            temporal_init="alive",
            backend=backend,
        )

    return build


def _build_peer(network: Callable[..., nn.Module]) -> Callable[[NetworkSize, int], nn.Module]:
    return lambda size, T: network(size.family, T, size.num_classes, size.width, size.depth)


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("ours-cupy", _build_ours("cupy"), LIFNode, float64=False, kernels=True),
        Implementation("ours-cupy-graph", _build_ours("cupy"), LIFNode, float64=False, kernels=True, replayed=True),
        Implementation("ours-torch", _build_ours("torch"), LIFNode),
        Implementation(
            "spikingjelly",
            _build_peer(spikingjelly_network.SpikingJellyNetwork),
            neuron.LIFNode,
            names=spikingjelly_network.NAMES,
        ),
        Implementation(
            "step-loop",
            _build_peer(step_loop.StepLoopNetwork),
            step_loop.LIF,
            names=step_loop.NAMES,
            batch_first=True,
            keeps_channels_last=False,
        ),
    )
}
REFERENCE = IMPLEMENTATIONS["ours-torch"]
"""The implementation that makes the weights and that the others are checked against."""


def choose_layout(implementation: Implementation, precision: str, requested: str, device: torch.device) -> str:
    """Return the memory order for an implementation: the requested one, or for "auto" the one that suits it."""
    if requested != "auto":
        return requested
    if device.type != "cuda" or not implementation.keeps_channels_last:
        return "NCHW"
    # What the convolutions run fastest with; the fused kernels copy every activation that is not channels_last.
    return "NHWC" if precision != "fp32" or implementation.kernels else "NCHW"


def what_runs(
    names: Sequence[str], precisions: Sequence[str], device: torch.device
) -> tuple[list[Implementation], list[str], dict[str, str]]:
    """Return the implementations and precisions of these that a device can run, and why it cannot run the others.

    Raises:
        InputError: If it can run none of the implementations, or none of the precisions.
    """
    missing = {name: IMPLEMENTATIONS[name].missing(device) for name in dict.fromkeys(names)}
    lacking = {name: _lacks(device, name) for name in dict.fromkeys(precisions)}
    for option, reasons in (("--implementations", missing), ("--precision", lacking)):
        if reasons and all(reasons.values()):
            raise InputError(f"{option}: nothing can run, {'; '.join(f'{k}: {v}' for k, v in reasons.items())}")
    skipped = {name: reason for name, reason in (missing | lacking).items() if reason is not None}
    implementations = [IMPLEMENTATIONS[name] for name in missing if name not in skipped]
    return implementations, [name for name in lacking if name not in skipped], skipped


def _lacks(device: torch.device, precision: str) -> str | None:
    if precision == "fp16" and device.type != "cuda":
        return "needs a CUDA device"
    if precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return "the GPU has no bfloat16 arithmetic"
    return None
