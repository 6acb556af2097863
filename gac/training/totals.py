"""What the training steps of an epoch add up to, counted on the device, and whether it is still finite."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gac.config import TrainConfig
from gac.training.optim import learning_rate_at


class Totals(NamedTuple):
    """Sums over the steps of an epoch and the first step of the run at which something was not finite.

    Steps are numbered from 1 over the whole run. All of them are exact in float64, counts too.
    """

    step: float = 0.0
    """Steps done in the run."""
    images: float = 0.0
    """Images seen in the epoch."""
    loss: float = 0.0
    """Sum of the losses of those images."""
    correct: float = 0.0
    """Those classified rightly, by the labels they had before CutMix."""
    skipped: float = 0.0
    """Steps of the epoch that loss scaling skipped, as their gradients overflowed."""
    bad_loss: float = math.inf
    """First step whose loss was not finite; infinity for none."""
    bad_gradient: float = math.inf
    """First step with a gradient that was not finite, without loss scaling."""
    bad_scale: float = math.inf
    """First step that brought the loss scale below 1."""

    @property
    def healthy(self) -> bool:
        """Whether every step so far was finite."""
        return min(self.bad_loss, self.bad_gradient, self.bad_scale) == math.inf

    @property
    def mean_loss(self) -> float:
        """The mean loss of an image."""
        return self.loss / self.images

    @property
    def top1(self) -> float:
        """The training accuracy in percent."""
        return 100 * self.correct / self.images


def over_ranks(totals: Sequence[Totals]) -> Totals:
    """Return the totals of a run from those of its ranks, which have done the same steps on different images."""
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
    """:class:`Totals` in one float64 tensor on a device, updated in place and never read by the update."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.tensor(Totals(), dtype=torch.float64, device=device)
        self._views = Totals(*self.tensor.unbind())

    def add(
        self, images: int, loss: Tensor, correct: Tensor, skipped: Tensor, bad_gradient: Tensor, bad_scale: Tensor
    ) -> None:
        """Count a step.

        Args:
            images: Images of its batch.
            loss: Their mean loss, a scalar.
            correct: How many of them were classified rightly.
            skipped: Whether loss scaling skipped the update.
            bad_gradient: Whether a gradient that was not scaled is not finite.
            bad_scale: Whether the loss scale is below 1.
        """
        totals = self._views
        totals.step.add_(1)
        totals.images.add_(images)
        totals.loss.add_(loss.double() * images)
        totals.correct.add_(correct)
        totals.skipped.add_(skipped)
        for first, bad in (
            (totals.bad_loss, ~loss.isfinite()),
            (totals.bad_gradient, bad_gradient),
            (totals.bad_scale, bad_scale),
        ):
            first.copy_(torch.where(bad, torch.minimum(first, totals.step), first))

    def begin_epoch(self) -> None:
        """Set the sums over an epoch to zero; the numbers of steps stay."""
        for total in (self._views.images, self._views.loss, self._views.correct, self._views.skipped):
            total.zero_()

    def load(self, totals: Totals) -> None:
        """Continue from these totals."""
        self.tensor.copy_(torch.tensor(totals, dtype=torch.float64))

    def read(self) -> Totals:
        """Return the totals; waits for the device."""
        return Totals(*self.tensor.tolist())


class Readback:
    """A small tensor on a device, read now and then without waiting for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._on_host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._copied: torch.cuda.Event | None = None

    def poll(self) -> list[float] | None:
        """Return the values of the copy begun by the poll before, or None if it has not arrived, and begin another.

        On the CPU there is nothing to wait for and the values are those of now.
        """
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
    """The loss, a gradient or a weight is no longer finite; the message is one line."""


def check_totals(totals: Totals, config: TrainConfig, batches: int) -> None:
    """Raise TrainingDiverged, with the step and its learning rate, if a step so far was not finite.

    A loss or a gradient that is not finite ends a run. Under fp16 the steps whose scaled gradients overflow are
    skipped, and what ends the run is a loss scale below 1.

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
    """Raise TrainingDiverged if a weight or a statistic of ``network`` is not finite after ``step``; waits for it."""
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
