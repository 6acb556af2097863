"""Firing rates of the spiking layers, by time step and channel, spikes themselves, and a warning about dead layers."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from spikingjelly.activation_based import monitor, neuron
from torch import Tensor, nn

from gac.analysis.running import find_layer, run
from gac.errors import InputError
from gac.execution.distributed import SINGLE_PROCESS, Ranks

logger = logging.getLogger("gac")


@dataclass(frozen=True, eq=False)
class LayerFiring:
    """How often the neurons of a layer spiked.

    ``spikes``, int64 [T, C], counts those of each time step and channel; each of these numbers is of ``neurons``
    neurons: the pixels of the channel times the images.
    """

    layer: str
    spikes: Tensor
    neurons: int

    @property
    def rate(self) -> float:
        """The firing rate: the share of neurons and time steps that spike."""
        return int(self.spikes.sum()) / (self.spikes.numel() * self.neurons)

    @property
    def rate_by_time(self) -> list[float]:
        """The share of neurons that spike at each time step."""
        return (self.spikes.double().mean(1) / self.neurons).tolist()

    @property
    def rate_by_channel(self) -> list[float]:
        """The firing rate of each channel."""
        return (self.spikes.double().mean(0) / self.neurons).tolist()

    @property
    def dead_channels(self) -> list[int]:
        """The channels of which no neuron ever spiked."""
        return (self.spikes.sum(0) == 0).nonzero().flatten().tolist()

    @property
    def saturated_channels(self) -> list[int]:
        """The channels of which every neuron spiked at every time step."""
        return (self.spikes == self.neurons).all(0).nonzero().flatten().tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return what is known about the layer as plain values."""
        names = ("layer", "rate", "rate_by_time", "rate_by_channel", "dead_channels", "saturated_channels")
        return {name: getattr(self, name) for name in names}


class FiringRates:
    """Fraction of neurons and time steps that spike in each layer, over the first images of an evaluation.

    Counted on the device by SpikingJelly's monitor. Its hooks keep a layer off the fused path, and a batch from being
    replayed as a CUDA graph, so they are removed after the first :attr:`IMAGES` images, and absent in training. Counts
    are summed over the ranks.
    """

    IMAGES = 1024

    def __init__(self, network: nn.Module, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.network = network
        self.ranks = ranks
        self._spikes: monitor.OutputMonitor | None = None
        self._images = 0
        self._reported: set[str] = set()

    def watch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches; the caller runs the network on each before it takes the next."""
        self._images = 0
        with monitor.OutputMonitor(self.network, neuron.BaseNode, _count) as self._spikes:
            for images, labels in batches:
                if self._images < self.IMAGES / self.ranks.size:
                    self._images += len(labels)
                else:
                    self._spikes.remove_hooks()
                yield images, labels

    def read(self) -> dict[str, float]:
        """Return the firing rates in the evaluation just watched, by layer name; waits for the device.

        Every rank must call it. Logs a warning when the rate of a layer has become exactly 0 or 1.
        """
        mine = {layer.layer: layer for layer in _layers(self._spikes)}, self._images
        found, images = zip(*self.ranks.gather(mine), strict=True)
        # A rank without images ran no layers.
        names = max(found, key=len)
        rates = {name: _together([layers[name] for layers in found if layers]).rate for name in names}
        dead = {name: rate for name, rate in rates.items() if rate in (0.0, 1.0)}
        for name in sorted(dead.keys() - self._reported) if self.ranks.is_main else ():
            logger.warning(
                "dead layer: %s %s for %d test images, so what comes after it learns nothing from it",
                name,
                "never spiked" if dead[name] == 0 else "always spiked",
                sum(images),
            )
        self._reported = set(dead)
        return rates


def measure_firing(network: nn.Module, batches: Iterable[Tensor]) -> list[LayerFiring]:
    """Return how often each spiking layer of a network fires, in the order of its modules.

    The arguments are those of :func:`gac.analysis.running.run`; layers that do not run are left out.

    Raises:
        InputError: If there are no images or no spiking layers, and for a spiking layer in step mode "s".
    """
    _check_multi_step(network)
    with monitor.OutputMonitor(network, neuron.BaseNode, _count) as spikes:
        run(network, batches)
    return _layers(spikes)


def record_spikes(network: nn.Module, batch: Tensor, layer: str) -> Tensor:
    """Return the spikes [T, B, C, H, W] of the spiking layer that is called ``layer``, for a batch.

    Raises:
        InputError: If there is no such layer, or it does not run; see :func:`measure_firing` for the rest.
    """
    found = find_layer(network, layer, neuron.BaseNode, "spiking layer")
    _check_multi_step(network)
    recorded = []
    with monitor.OutputMonitor(found, type(found), lambda spikes: recorded.append(spikes.detach().clone())):
        run(network, [batch])
    if not recorded:
        raise InputError(f"spiking layer {layer} does not run when the network is called")
    return recorded[-1]


def _check_multi_step(network: nn.Module) -> None:
    nodes = [(name, node) for name, node in network.named_modules() if isinstance(node, neuron.BaseNode)]
    if not nodes:
        raise InputError(f"{type(network).__name__} has no spiking layers, whose firing could be measured")
    for name, node in nodes:
        if node.step_mode != "m":
            raise InputError(
                f"spiking layer {name} runs in step mode {node.step_mode!r}, in which time steps cannot be told apart:"
                ' call spikingjelly\'s functional.set_step_mode(network, "m")'
            )


def _count(spikes: Tensor) -> tuple[Tensor, int]:
    """Return the spikes of each time step and channel [T, C], and the number of neurons of each."""
    if spikes.dim() == 2:
        # One neuron for each image.
        spikes = spikes.unsqueeze(2)
    others = [each for each in range(spikes.dim()) if each not in (0, 2)]
    return spikes.count_nonzero(others), spikes.numel() // (spikes.shape[0] * spikes.shape[2])


def _layers(spikes: monitor.OutputMonitor) -> list[LayerFiring]:
    """Return what the monitor recorded with :func:`_count`."""
    return [
        _together([LayerFiring(name, counts.cpu(), neurons) for counts, neurons in spikes[name]])
        for name in spikes.monitored_layers
        if spikes[name]
    ]


def _together(parts: list[LayerFiring]) -> LayerFiring:
    """Return the counts of a layer on all images, from those on some of them."""
    return LayerFiring(parts[0].layer, sum(part.spikes for part in parts), sum(part.neurons for part in parts))
