"""One evaluation for training and for eval.py."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac.errors import InputError
from gac.training.distributed import ALONE, Ranks
from gac.training.precision import autocast


@dataclass(frozen=True)
class Evaluation:
    """What a network scores on a test set; accuracies in percent.

    The class of an image is the one with the largest output, averaged over time. ``top1_by_time[t - 1]`` is the
    top-1 accuracy of the average over the first t steps alone, so its last entry is ``top1``. ``top5`` counts the
    min(5, classes) largest outputs. ``loss`` is the mean cross entropy of the outputs' mean over time.
    """

    images: int
    correct: int
    top1: float
    top5: float
    loss: float
    top1_by_time: list[float]
    images_per_second: float


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    amp: str = "off",
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Run ``network`` in evaluation mode over ``batches`` of images [B, C, H, W] and labels [B].

    The network returns outputs [T, B, K]. Counts are exact integers, kept on the device until the end, and those of
    all ranks, each with its own images, are added up. The network is left in the mode it was in. Raises InputError if
    there are no images.
    """
    was_training = network.training
    network.eval()
    started = time.perf_counter()
    images_seen = 0
    correct = loss = None
    for images, labels in batches:
        with autocast(device, amp):
            logits = network(images)
        hits, batch_loss = _score(logits.float(), labels)
        correct = hits if correct is None else correct + hits
        loss = batch_loss if loss is None else loss + batch_loss
        images_seen += len(labels)
    network.train(was_training)
    mine = (images_seen, None if correct is None else correct.tolist(), 0.0 if loss is None else loss.item())
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


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hits [T + 1] of a batch (top-1 after each step, then top-5) and its summed loss in float64."""
    # The sum over the first t steps has the same largest entry as their average.
    by_time = (logits.cumsum(0).argmax(-1) == labels).sum(-1)
    mean = logits.mean(0)
    top5 = (mean.topk(min(5, mean.shape[-1])).indices == labels.unsqueeze(-1)).sum()
    loss = F.cross_entropy(mean, labels, reduction="sum").double()
    return torch.cat([by_time, top5.unsqueeze(0)]), loss
