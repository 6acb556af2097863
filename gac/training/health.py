"""Whether the numbers of a run are still finite, and what to say when they are not."""

import math

import torch
from torch import nn

from gac.config import TrainConfig
from gac.training.optim import learning_rate_at
from gac.training.totals import Totals


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
