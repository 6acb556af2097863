"""The evaluation that training and eval.py share."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from gac.data.interface import UNLABELLED
from gac.errors import InputError
from gac.execution.cuda_graph import Graphs
from gac.execution.device import autocast, float_for_sums, network_input
from gac.execution.distributed import SINGLE_PROCESS, Ranks


@dataclass(frozen=True)
class Evaluation:
    """What a network scores on a test set; accuracies in percent.

    The class of an image is the one with the largest output, averaged over time. ``top1_by_time[t - 1]`` is the
    top-1 accuracy of the average over only the first t steps, so its last entry is ``top1``. ``top5`` counts the
    min(5, classes) largest outputs. ``loss`` is the mean cross entropy of the outputs' mean over time.
    """

    images: int
    correct: int
    top1: float
    top5: float
    loss: float
    top1_by_time: list[float]
    images_per_second: float


class EvaluationStep:
    """Forward pass and scores of one batch, without waiting for the device.

    Args:
        network: Returns outputs [T, B, K] for images [B, C, H, W] or a sequence [T, B, C, H, W]; in evaluation mode
            when the step is called.
        device: Where it runs.
        amp: Precision: "off", "fp16" or "bf16".
        channels_last: Whether the images, and with them the activations, are put into this memory order.
        graphs: Replays batches as CUDA graphs; without it every batch is run. The network may be trained in place
            between two calls. While its modules have hooks (a monitor's, for example), batches are not replayed, as a
            replay calls no hook.
        steps: Score only the first so many time steps of the outputs; None for all of them.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        amp: str = "off",
        channels_last: bool = True,
        graphs: Graphs | None = None,
        steps: int | None = None,
    ) -> None:
        self.steps = steps
        self.network = network
        self.device = device
        self.amp = amp
        self.order = torch.channels_last if channels_last else torch.contiguous_format
        self._replayed = None if graphs is None else graphs.replaying(self._score)

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the scores of a batch, and the classes of its images.

        These are the hits [T + 1] (top-1 after each time step, then top-5), the summed loss in float64, the min(5, K)
        largest outputs' classes [B, 5], the largest first, and their probabilities [B, 5]. An image whose label is
        :data:`gac.data.interface.UNLABELLED` adds nothing to the scores.

        A replay overwrites the result of the previous one.
        """
        if self._replayed is None or has_hooks(self.network):
            return self._score(images, labels)
        return self._replayed(images, labels)

    def _score(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with autocast(self.device, self.amp):
            logits = self.network(network_input(images, self.order))
        logits = logits[: self.steps].float()
        # The sum over the first t steps has the same largest entry as their average.
        sums = logits.cumsum(0)
        by_time = (sums.argmax(-1) == labels).sum(-1)
        # Of equal outputs the first comes first, as in argmax: the best of them is the class that top-1 counts.
        ranked = sums[-1].sort(dim=-1, descending=True, stable=True).indices[:, :5]
        top5 = (ranked == labels.unsqueeze(-1)).sum()
        mean = logits.mean(0)
        loss = F.cross_entropy(mean, labels, reduction="sum", ignore_index=UNLABELLED)
        hits = torch.cat([by_time, top5.unsqueeze(0)])
        return hits, loss.to(float_for_sums(mean.device)), ranked, mean.softmax(-1).gather(-1, ranked)


def evaluate(
    step: EvaluationStep,
    batches: Iterable[tuple[Tensor, Tensor]],
    ranks: Ranks = SINGLE_PROCESS,
    classes: list[tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Evaluation:
    """Run a network in evaluation mode over ``batches``, as a :class:`gac.data.Loader` yields them.

    Counts are exact integers, kept on the device until the end and summed over the ranks, each of which has its own
    images. ``classes`` gets, for each batch of this rank, its labels and what the step says of its images. The network
    returns to the mode it was in. Raises InputError if there are no images.
    """
    was_training = step.network.training
    step.network.eval()
    started = time.perf_counter()
    images_seen = correct = loss = 0
    try:
        for images, labels in batches:
            hits, batch_loss, *best = step(images, labels)
            # Into new tensors, for the first sum too: the next replay overwrites what the step returned.
            correct, loss = correct + hits, loss + batch_loss
            if classes is not None:
                classes.append((labels, *(each.clone() for each in best)))
            images_seen += len(labels)
    finally:
        step.network.train(was_training)
    mine = images_seen, correct.tolist() if images_seen else None, float(loss)
    seen, hits, losses = zip(*ranks.gather(mine), strict=True)
    images_seen, total_loss = sum(seen), sum(losses)
    if images_seen == 0:
        raise InputError("the test set has no images; evaluate on one that has")
    *by_time, top5 = map(sum, zip(*(counts for counts in hits if counts is not None), strict=True))
    return Evaluation(
        images=images_seen,
        correct=by_time[-1],
        top1=100 * by_time[-1] / images_seen,
        top5=100 * top5 / images_seen,
        loss=total_loss / images_seen,
        top1_by_time=[100 * count / images_seen for count in by_time],
        images_per_second=images_seen / (time.perf_counter() - started),
    )


def has_hooks(network: nn.Module) -> bool:
    """Return whether ``network``, or every module, has a hook on its forward or backward pass: no replay calls it."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_all = any(getattr(every_module, f"_global{kind}") for kind in kinds)
    return of_all or any(getattr(module, kind) for module in network.modules() for kind in kinds)
