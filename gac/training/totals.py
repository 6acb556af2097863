"""What the training steps of an epoch add up to, counted on the device."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
