"""Loss and accuracy summed over the steps of an epoch, on the device, and whether all of it is finite."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gac.config import TrainConfig
from gac.execution.device import float_for_sums
from gac.execution.distributed import SINGLE_PROCESS, Ranks
from gac.training.optim import learning_rate_at


class Totals(NamedTuple):
    """Sums over the steps of an epoch, and the first steps of the run at which something was not finite.

    Steps are numbered from 1 over the whole run. Counts and step numbers are exact in float64.
    """

    step: float = 0.0
    """Steps done in the run."""
    images: float = 0.0
    """Images seen in the epoch."""
    loss: float = 0.0
    """Sum of the losses of those images."""
    correct: float = 0.0
    """Images classified correctly, by the labels they had before CutMix."""
    skipped: float = 0.0
    """Steps of the epoch that loss scaling skipped because their gradients overflowed."""
    bad_loss: float = math.inf
    """First step whose loss was not finite; infinity if there is none."""
    bad_gradient: float = math.inf
    """First step with a gradient that was not finite; counted only without loss scaling."""
    bad_scale: float = math.inf
    """First step that took the loss scale below 1."""

    @property
    def healthy(self) -> bool:
        """Whether every step so far was finite."""
        return min(self.bad_loss, self.bad_gradient, self.bad_scale) == math.inf

    @property
    def mean_loss(self) -> float:
        """The mean loss per image."""
        return self.loss / self.images

    @property
    def top1(self) -> float:
        """The training accuracy in percent."""
        return 100 * self.correct / self.images


def over_ranks(totals: Sequence[Totals]) -> Totals:
    """Return the totals of a run from those of its ranks, which did the same steps on different images."""
    return Totals(
        step=totals[0].step,
        images=sum(each.images for each in totals),
        loss=sum(each.loss for each in totals),
        correct=sum(each.correct for each in totals),
        skipped=totals[0].skipped,
        bad_loss=min(each.bad_loss for each in totals),
        bad_gradient=min(each.bad_gradient for each in totals),
        bad_scale=min(each.bad_scale for each in totals),
    )


class DeviceTotals:
    """:class:`Totals` in one float64 tensor on a device, updated in place without reading it on the host.

    Each rank counts its own images. A checkpoint holds the totals over all ranks, which rank 0 goes on with.
    """

    def __init__(self, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.ranks = ranks
        self.tensor = torch.tensor(Totals(), dtype=float_for_sums(device), device=device)
        self._views = Totals(*self.tensor.unbind())

    def add(
        self, images: int, loss: Tensor, correct: Tensor, skipped: Tensor, bad_gradient: Tensor, bad_scale: Tensor
    ) -> None:
        """Count a step.

        Args:
            images: Images of its batch.
            loss: Their mean loss, a scalar.
            correct: How many of them were classified correctly.
            skipped: Whether loss scaling skipped the update.
            bad_gradient: Whether a gradient is not finite, without loss scaling.
            bad_scale: Whether the loss scale is below 1.
        """
        totals = self._views
        totals.step.add_(1)
        totals.images.add_(images)
        totals.loss.add_(loss.to(self.tensor.dtype) * images)
        totals.correct.add_(correct)
        totals.skipped.add_(skipped)
        for first, bad in (
            (totals.bad_loss, ~loss.isfinite()),
            (totals.bad_gradient, bad_gradient),
            (totals.bad_scale, bad_scale),
        ):
            first.copy_(torch.where(bad, torch.minimum(first, totals.step), first))

    def begin_epoch(self) -> None:
        """Set the sums over the epoch to zero; step numbers stay."""
        for total in (self._views.images, self._views.loss, self._views.correct, self._views.skipped):
            total.zero_()

    def read(self) -> Totals:
        """Return the totals of this rank; waits for the device."""
        return Totals(*self.tensor.tolist())

    def over_ranks(self) -> Totals:
        """Return the totals over all ranks, each of which must call this; waits for the device."""
        return over_ranks(self.ranks.gather(self.read()))

    def state_dict(self) -> Tensor:
        """Return the totals over all ranks, each of which must call this, as a tensor on the CPU."""
        return torch.tensor(self.over_ranks(), dtype=torch.float64)

    def load_state_dict(self, state: Tensor) -> None:
        """Continue from what :meth:`state_dict` returned, possibly on another number of ranks."""
        totals = Totals(*state.tolist())
        if not self.ranks.is_main:
            totals = totals._replace(images=0.0, loss=0.0, correct=0.0)
        self.tensor.copy_(torch.tensor(totals, dtype=self.tensor.dtype))


class Readback:
    """A small tensor on a device, read once in ``SECONDS`` at most and without waiting for the device."""

    SECONDS = 1.0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._on_host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._copied: torch.cuda.Event | None = None
        self._polled = time.perf_counter()

    def poll(self) -> list[float] | None:
        """Return the values copied since the last poll and begin another copy; None if it is too early for them.

        On the CPU the values are the current ones.
        """
        now = time.perf_counter()
        if now - self._polled < self.SECONDS:
            return None
        self._polled = now
        if not self.tensor.is_cuda:
            return self.tensor.tolist()
        values = None
        if self._copied is not None:
            if not self._copied.query():
                return None
            values = self._on_host.tolist()
        self._on_host.copy_(self.tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return values


class TrainingDiverged(ArithmeticError):
    """The loss, a gradient or a weight is not finite any more; the message is one line."""


def check_totals(totals: Totals, config: TrainConfig, batches: int) -> None:
    """Raise TrainingDiverged, with the step and its learning rate, if something was not finite at a step so far.

    A loss or a gradient that is not finite ends the run. With fp16, steps whose scaled gradients overflow are skipped,
    and the run ends when the loss scale falls below 1.

    Args:
        totals: The totals so far.
        config: The schedule.
        batches: Batches in an epoch.
    """
    causes = {
        "the loss is not finite": totals.bad_loss,
        "a gradient is not finite": totals.bad_gradient,
        "gradients overflow although the loss scale has fallen below 1": totals.bad_scale,
    }
    what, step = min(causes.items(), key=lambda cause: cause[1])
    if step < math.inf:
        raise TrainingDiverged(_message(what, int(step), config, batches))


def check_weights(network: nn.Module, step: int, config: TrainConfig, batches: int) -> None:
    """Raise TrainingDiverged if a weight or statistic is not finite after ``step``; waits for the device."""
    tensors = [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        raise TrainingDiverged(_message("a weight is not finite", step, config, batches))


def _message(what: str, step: int, config: TrainConfig, batches: int) -> str:
    epoch, batch = divmod(step - 1, batches)
    rate = learning_rate_at(config, epoch, batch, batches)
    return (
        f"{what} at step {step} (epoch {epoch + 1}, batch {batch + 1} of {batches}, learning rate {rate:.3g}): lower"
        " train.learning_rate or add train.warmup_epochs; the checkpoints are as they were"
    )
