"""One training step, as work for the device alone."""

import torch
from torch import Tensor, nn

from gac.config import TrainConfig
from gac.training.optim import classification_loss
from gac.training.precision import autocast
from gac.training.totals import DeviceTotals

# Below it the gradients overflow although they are made smaller. GradScaler's documentation calls that a sign that
# something is wrong; from its initial 65,536, with no good step in between, it takes 17 overflows.
LOWEST_LOSS_SCALE = 1.0


class TrainingStep:
    """Forward, loss, backward and update of one batch, and the totals.

    A call reads no tensor's value and branches on shapes and the configuration alone, so the host never waits for
    the device and a CUDA graph can capture the call. What changes from step to step comes in tensors: the batch,
    and on a CUDA device the learning rate.

    Attributes:
        totals: What the steps so far add up to.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.scaler = scaler
        self.config = config
        self.device = device
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
        with autocast(self.device, config.amp):
            logits = self.network(images)  # [T, B, K]
            loss = classification_loss(logits.float(), targets, config.loss, config.label_smoothing)
        self.scaler.scale(loss).backward()
        bad_gradient = self._bad_gradient()
        scale = self._loss_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        scale_after = self._loss_scale()
        self.totals.add(
            len(labels),
            loss.detach(),
            correct=(logits.detach().mean(0).argmax(-1) == labels).sum(),
            skipped=scale_after < scale,
            bad_gradient=bad_gradient,
            bad_scale=scale_after < LOWEST_LOSS_SCALE,
        )

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
