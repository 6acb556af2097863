"""Firing rates of the spiking layers, and the layers that are dead."""

import logging
from collections.abc import Iterable, Iterator

import torch
from spikingjelly.activation_based import monitor, neuron
from torch import Tensor, nn

from gac.execution.distributed import SINGLE_PROCESS, Ranks

logger = logging.getLogger("gac")


class FiringRates:
    """Share of neurons and time steps that spike in each layer, over the first images of an evaluation.

    Counted on the device by SpikingJelly's monitor. Its hooks keep a layer off the fused path, and a batch from being
    replayed as a CUDA graph, so they are there for the first batches alone, as many as :attr:`IMAGES` images need, and
    never in training. Ranks count together.
    """

    IMAGES = 1024

    def __init__(self, network: nn.Module, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.network = network
        self.ranks = ranks
        self._spikes: monitor.OutputMonitor | None = None
        self._images = 0
        self._reported: set[str] = set()

    def watch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches to a consumer that runs the network on each before it takes the next."""
        self._images = 0
        with monitor.OutputMonitor(self.network, neuron.BaseNode, _count) as self._spikes:
            for images, labels in batches:
                if self._images < self.IMAGES / self.ranks.size:
                    self._images += len(labels)
                else:
                    self._spikes.remove_hooks()
                yield images, labels

    def read(self) -> dict[str, float]:
        """Return each layer's firing rate in the evaluation just watched, by the layer's name; waits for the device.

        Every rank must call it.

        A layer whose rate is exactly 0 or 1 is warned about, once until it has another rate.
        """
        layers = self._spikes.monitored_layers
        none = torch.zeros((), dtype=torch.int64)
        counts = [sum((count for count, _ in self._spikes[name]), none) for name in layers]
        sizes = [sum(size for _, size in self._spikes[name]) for name in layers]
        mine = torch.stack(counts).tolist(), sizes, self._images
        spikes, sizes, images = zip(*self.ranks.gather(mine), strict=True)
        by_layer = zip(layers, zip(*spikes, strict=True), zip(*sizes, strict=True), strict=True)
        rates = {name: sum(count) / sum(size) for name, count, size in by_layer}
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


def _count(spikes: Tensor) -> tuple[Tensor, int]:
    return spikes.count_nonzero(), spikes.numel()
