"""Some of the test images, kept with the network that was scored on them, for a closer look at both."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gac.data import DataInfo
from gac.execution import random_state
from gac.execution.device import autocast, network_input
from gac.models.ms_resnet import MSResNet

_BATCH = 32


@dataclass(frozen=True, eq=False)
class Sample:
    """A network on its device, and N test images, evenly spread over the test set, as the loader yields them.

    ``images`` are [N, C, H, W], or event frames [N, T, C, H, W], normalised as ``data`` says; ``labels``, int64 [N],
    are the network's; ``places`` says which of the scored images they are, in the loader's order from 0.
    """

    network: MSResNet
    images: Tensor
    labels: Tensor
    places: list[int]
    data: DataInfo
    device: torch.device
    amp: str
    order: torch.memory_format
    seed: int

    def __str__(self) -> str:
        return f"{len(self.images)} of the {self.data.test_size} test images of {self.data.name}, evenly spread"

    def inputs(self) -> Iterator[Tensor]:
        """Yield what the network takes for the images, in small batches: [B, C, H, W] or [T, B, C, H, W]."""
        for batch in self.images.split(_BATCH):
            yield network_input(batch, self.order)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the network in this context: in the precision of the evaluation, and with the same result every time.

        What a coding draws at random comes from the run's seed, and the generators are put back.
        """
        with random_state.apart(self.seed, self.device), autocast(self.device, self.amp):
            yield


class Collector:
    """Keeps up to ``count`` of the ``total`` images that pass, at even distances."""

    def __init__(self, count: int, total: int) -> None:
        self._distance = max(1, -(-total // count))
        self._kept: list[tuple[Tensor, Tensor]] = []
        self.places: list[int] = []

    def watch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch as they are."""
        passed = 0
        for images, labels in batches:
            chosen = range(-passed % self._distance, len(labels), self._distance)
            if chosen:
                # Clones, as a view would keep the whole batch.
                self._kept.append(tuple(each[chosen.start :: self._distance].clone() for each in (images, labels)))
                self.places += [passed + place for place in chosen]
            passed += len(labels)
            yield images, labels

    def images_and_labels(self) -> tuple[Tensor, Tensor]:
        """Return what was kept."""
        images, labels = zip(*self._kept, strict=True)
        return torch.cat(images), torch.cat(labels)
