"""Some of the test images, kept with the network that was scored on them, for a closer look at both."""

import heapq
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gac.data import DataInfo
from gac.data.interface import UNLABELLED
from gac.execution import random_state
from gac.execution.device import autocast, network_input
from gac.memory import available_memory
from gac.models.ms_resnet import MSResNet

logger = logging.getLogger("gac")

_LARGEST_BATCH = 32
_MISTAKES = 12


@dataclass(frozen=True, eq=False)
class Mistake:
    """A test image that the network takes for another class, and the probability it gives to that class.

    ``image`` is [C, H, W], or event frames [T, C, H, W]; ``place`` says which of the scored images it is, in the
    loader's order from 0.
    """

    image: Tensor
    place: int
    label: int
    prediction: int
    probability: float


@dataclass(frozen=True, eq=False)
class Sample:
    """A network on its device, and N test images, evenly spread over the test set, as the loader yields them.

    ``images`` are [N, C, H, W], or event frames [N, T, C, H, W], normalised as ``data`` says; ``labels``, int64 [N],
    are the network's; ``places`` says which of the scored images they are, in the loader's order from 0. ``mistakes``
    are the most confident ones on the whole test set, at most 12, the most confident first. The first ``steps`` of the
    network's outputs were scored. With several ``processes`` all of this is of the images of one of them.
    """

    network: MSResNet
    images: Tensor
    labels: Tensor
    places: list[int]
    mistakes: list[Mistake]
    data: DataInfo
    device: torch.device
    amp: str
    order: torch.memory_format
    batch_size: int
    seed: int
    steps: int
    processes: int

    def __str__(self) -> str:
        spread = "evenly spread"
        if self.processes > 1:
            spread += f" over those of one of {self.processes} processes"
        return f"{len(self.images)} of the {self.data.test_size} test images of {self.data.name}, {spread}"

    def inputs(self) -> Iterator[Tensor]:
        """Yield what the network takes for the images, in small batches: [B, C, H, W] or [T, B, C, H, W]."""
        for batch in self.images.split(min(self.batch_size, _LARGEST_BATCH)):
            yield network_input(batch, self.order)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the network in this context: in the precision of the evaluation, and with the same result every time.

        What a coding draws at random comes from the run's seed, and the generators are put back.
        """
        with random_state.apart(self.seed, self.device), autocast(self.device, self.amp):
            yield


@torch.no_grad()
def undecided(sample: Sample, count: int) -> tuple[Sample, Tensor]:
    """Return ``count`` of the images, and the class probabilities [T, N, K] of the mean output over steps 1..t.

    T are the steps that were scored. The images are those whose class changes most often with time, as there is most to
    see in them. Call it while the sample is running.
    """
    logits = torch.cat([sample.network(batch)[: sample.steps].float() for batch in sample.inputs()], 1)
    steps = torch.arange(1, len(logits) + 1, device=logits.device)
    probabilities = (logits.cumsum(0) / steps[:, None, None]).softmax(-1)
    classes = probabilities.argmax(-1)
    changes = (classes[1:] != classes[:-1]).sum(0)
    chosen = changes.argsort(descending=True, stable=True)[:count]
    places = [sample.places[i] for i in chosen.tolist()]
    shown = replace(sample, images=sample.images[chosen], labels=sample.labels[chosen], places=places)
    return shown, probabilities[:, chosen]


def affordable(count: int, data: DataInfo, device: torch.device) -> int:
    """Return how many images may be kept beside everything else, at most ``count``; says so if they are fewer."""
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    of_image = 4 * data.channels * data.height * data.width * (data.frames or 1)
    fit = count if available is None else max(1, available // 4 // of_image)
    if fit < count:
        logger.warning("too little memory to keep %d test images for a closer look: %d are kept", count, fit)
    return min(count, fit)


class Collector:
    """Keeps up to ``count`` of the ``total`` images that pass, at even distances, and the most confident mistakes.

    ``scored`` is the list to which :func:`gac.evaluation.evaluate.evaluate` adds the classes of each batch.
    """

    def __init__(self, count: int, total: int, scored: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._distance = max(1, -(-total // count))
        self._scored = scored
        self._kept: list[tuple[Tensor, Tensor]] = []
        self.places: list[int] = []
        self.mistakes: list[Mistake] = []

    def watch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch as they are; each is scored before the next is taken."""
        passed = 0
        for images, labels in batches:
            chosen = range(-passed % self._distance, len(labels), self._distance)
            if chosen:
                # Clones, as a view would keep the whole batch.
                self._kept.append(tuple(each[chosen.start :: self._distance].clone() for each in (images, labels)))
                self.places += [passed + place for place in chosen]
            yield images, labels
            self._keep_mistakes(images, passed)
            passed += len(labels)

    def _keep_mistakes(self, images: Tensor, passed: int) -> None:
        labels, ranked, probabilities = self._scored[-1]
        wrong = ((ranked[:, 0] != labels) & (labels != UNLABELLED)).nonzero().flatten().tolist()
        found = [
            Mistake(images[i], passed + i, int(labels[i]), int(ranked[i, 0]), float(probabilities[i, 0])) for i in wrong
        ]
        best = heapq.nlargest(_MISTAKES, [*self.mistakes, *found], key=lambda mistake: mistake.probability)
        self.mistakes = [replace(each, image=each.image.clone()) if each in found else each for each in best]

    def images_and_labels(self) -> tuple[Tensor, Tensor]:
        """Return what was kept."""
        images, labels = zip(*self._kept, strict=True)
        return torch.cat(images), torch.cat(labels)
