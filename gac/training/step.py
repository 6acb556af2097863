"""One training step, as work for the device alone."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from gac.config import TrainConfig
from gac.execution.device import autocast
from gac.execution.distributed import SINGLE_PROCESS, Ranks, without_synchronization
from gac.training.ema import MovingAverage
from gac.training.optim import classification_loss
from gac.training.totals import DeviceTotals

# Below it the gradients overflow although they are made smaller. GradScaler's documentation calls that a sign that
# something is wrong; from its initial 65,536, with no good step in between, it takes 17 overflows.
LOWEST_LOSS_SCALE = 1.0


class TrainingStep:
    """Forward, loss, backward and update of one batch, the average of the weights, if there is one, and the totals.

    A call reads no tensor's value and branches on shapes and the configuration alone, so the host never waits for
    the device and a CUDA graph can capture the call. What changes from step to step comes in tensors: the batch,
    and on a CUDA device the learning rate.

    The batch may be one rank's part of a batch. Gradients are then those of the mean loss over all ranks' images,
    however many of them a rank has, and the same on all ranks. A part is run in ``accumulate_steps`` micro-batches (or
    as many as each rank has images), whose gradients add up.

    Attributes:
        totals: What the steps so far add up to, on this rank's images.
        batch_images: Images of the next call's batch on all ranks; None for those of the call, as one process has it.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: TrainConfig,
        device: torch.device,
        average: MovingAverage | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.network = network
        self.ranks = ranks
        self.batch_images: int | None = None
        self._parallel = ranks.parallel(network, device)
        self.optimizer = optimizer
        self.scaler = scaler
        self.config = config
        self.device = device
        self.average = average
        self.totals = DeviceTotals(device)
        self._one = torch.ones((), device=device)
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def __call__(self, images: Tensor, targets: Tensor, labels: Tensor) -> None:
        """Train on one batch.

        Args:
            images: Images [B, C, H, W].
            targets: What to learn: labels, int64 [B], or probabilities [B, K].
            labels: What the accuracy counts, int64 [B].
        """
        config = self.config
        self.optimizer.zero_grad()
        batch_images = self.batch_images or len(labels)
        # The same number on every rank, as each of them ends in the same collectives.
        parts = min(config.accumulate_steps, batch_images // self.ranks.size)
        loss = correct = 0
        split = (tensor.tensor_split(parts) for tensor in (images, targets, labels))
        for part, batch in enumerate(zip(*split, strict=True)):
            last = part == parts - 1
            with nullcontext() if last else without_synchronization(self._parallel):
                part_loss, part_correct = self._backward(*batch, batch_images)
            loss = loss + part_loss * (len(batch[0]) / len(labels))
            correct = correct + part_correct
        bad_gradient = self._bad_gradient()
        if config.gradient_clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            # The norm of an overflow makes NaNs of some gradients: the scaler has seen it and skips the update.
            nn.utils.clip_grad_norm_(self._parameters, config.gradient_clip_norm)
        scale = self._loss_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        scale_after = self._loss_scale()
        skipped = scale_after < scale
        if self.average is not None:
            self.average.update(skipped)
        self.totals.add(
            len(labels),
            loss,
            correct=correct,
            skipped=skipped,
            bad_gradient=bad_gradient,
            bad_scale=scale_after < LOWEST_LOSS_SCALE,
        )

    def _backward(self, images: Tensor, targets: Tensor, labels: Tensor, batch_images: int) -> tuple[Tensor, Tensor]:
        """Add a micro-batch's part to the gradients; return its mean loss and how many are classified rightly."""
        config = self.config
        with autocast(self.device, config.amp):
            logits = self._parallel(images)  # [T, B, K]
            loss = classification_loss(logits.float(), targets, config.loss, config.label_smoothing)
        # The ranks' gradients are averaged, whatever number of images they come from.
        weight = self.ranks.size * len(labels) / batch_images
        self.scaler.scale(loss * weight).backward()
        return loss.detach(), (logits.detach().mean(0).argmax(-1) == labels).sum()

    def _bad_gradient(self) -> Tensor:
        # Scaled gradients may overflow: GradScaler then skips the update.
        if self.scaler.is_enabled():
            return self._one < 0
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        # The largest magnitude; a sum of squares could overflow where every gradient is finite.
        return ~nn.utils.get_total_norm(gradients, norm_type=float("inf")).isfinite()

    def _loss_scale(self) -> Tensor:
        # GradScaler.get_scale would wait for the device. Without scaling this is 1.
        return self.scaler.scale(self._one)
