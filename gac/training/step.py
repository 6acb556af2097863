"""One training step, which never makes the host wait for the device."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import optimizer as optimizers

from gac.config import TrainConfig
from gac.evaluation.evaluate import has_hooks
from gac.execution.device import autocast
from gac.execution.distributed import SINGLE_PROCESS, Ranks, collective
from gac.ops.overlap import overlapped, select_executor
from gac.training.distillation import Distillation
from gac.training.ema import MovingAverage
from gac.training.optim import classification_loss
from gac.training.totals import DeviceTotals

logger = logging.getLogger("gac")

# Below 1 the gradients overflow although they are scaled down. GradScaler's documentation calls that a sign that
# something is wrong; from its initial 65,536 it takes 17 overflows without a good step in between.
LOWEST_LOSS_SCALE = 1.0


class TrainingStep:
    """Forward and backward pass and update for one batch, with distillation and the average of weights, if any.

    A call reads no tensor's value and branches only on shapes and the configuration, so the host never waits for
    the device and a CUDA graph can capture the call. What changes from step to step comes in tensors: the batch,
    and on a CUDA device the learning rate.

    The batch may be one rank's part of a batch. Gradients are then those of the mean loss over the images of all
    ranks, however many each has, and the same on all ranks. A part is run in ``accumulate_steps`` micro-batches (or as
    many as each rank has images), whose gradients add up.

    Attributes:
        totals: Totals of the steps so far.
        batch_images: Images of the next batch on all ranks together; None for a single process.
        executor: What computes weight gradients beside the backward pass; None if they are not, or turn out not to be.
        networks: What a step runs: the network that learns and its teacher, if it has one.
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
        distillation: Distillation | None = None,
    ) -> None:
        self.network = network
        self.ranks = ranks
        self.batch_images: int | None = None
        self._parallel = _parallel(network, device, ranks)
        self.optimizer = optimizer
        self.scaler = scaler
        self.config = config
        self.device = device
        self.average = average
        self.distillation = distillation
        teacher = None if distillation is None else distillation.teacher
        self.networks = [network] if teacher is None else [network, teacher.network]
        self.totals = DeviceTotals(device, ranks)
        self.executor = select_executor(config.overlap_weight_gradients, device)
        self._one = torch.ones((), device=device)
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._convolution_weights = [parameter for parameter in self._parameters if parameter.dim() == 4]

    def __call__(self, images: Tensor, targets: Tensor, labels: Tensor) -> None:
        """Train on one batch.

        Args:
            images: Images [B, C, H, W] or a sequence [T, B, C, H, W].
            targets: What to learn: labels, int64 [B], or probabilities [B, K].
            labels: What the accuracy counts, int64 [B].
        """
        config = self.config
        self.optimizer.zero_grad()
        batch_images = self.batch_images or len(labels)
        # The same number on every rank, as the last one ends in a collective.
        parts = min(config.accumulate_steps, batch_images // self.ranks.size)
        loss = correct = 0
        split = (
            images.tensor_split(parts, dim=int(images.dim() == 5)),
            targets.tensor_split(parts),
            labels.tensor_split(parts),
        )
        for part, batch in enumerate(zip(*split, strict=True)):
            # Only the last micro-batch exchanges gradients with the other ranks, on the CPU through Gloo.
            accumulating = self.ranks.size > 1 and part < parts - 1
            through_gloo = self.ranks.size > 1 and self.device.type == "cpu"
            with (
                self._parallel.no_sync() if accumulating else nullcontext(),
                collective() if through_gloo else nullcontext(),
                self._overlapped(),
            ):
                part_loss, part_correct = self._backward(*batch, batch_images)
            loss = loss + part_loss * (len(batch[-1]) / len(labels))
            correct = correct + part_correct
        bad_gradient = self._bad_gradient()
        if config.gradient_clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            # Clipping makes gradients NaN after an overflow; the scaler has seen it and skips the update.
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

    def has_hooks(self) -> bool:
        """Return whether a step calls somebody's hook, on a module, a parameter or the optimiser: no replay does."""
        optimizer = self.optimizer
        return (
            any(map(has_hooks, self.networks))
            or any(each._backward_hooks or each._post_accumulate_grad_hooks for each in self._parameters)
            or bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
            or bool(optimizers._global_optimizer_pre_hooks or optimizers._global_optimizer_post_hooks)
        )

    def abandon(self) -> None:
        """Let the next call begin anew after one that ended in an error and did nothing on the device."""
        # What GradScaler notes down between scaling a loss and updating the scale, in itself and in the optimiser.
        self.scaler._per_optimizer_states.clear()
        for name in ("grad_scale", "found_inf"):
            self.optimizer.__dict__.pop(name, None)

    def _backward(self, images: Tensor, targets: Tensor, labels: Tensor, batch_images: int) -> tuple[Tensor, Tensor]:
        """Add the gradients of a micro-batch; return its mean loss and the number of images classified correctly."""
        config = self.config
        with autocast(self.device, config.amp):
            logits = self._parallel(images)  # [T, B, K]
            loss = classification_loss(logits.float(), targets, config.loss, config.label_smoothing)
            if self.distillation is not None:
                loss = loss + self.distillation(logits.float(), images)
        # DDP averages the gradients of the ranks without regard to the number of images of each.
        weight = self.ranks.size * len(labels) / batch_images
        self.scaler.scale(loss * weight).backward()
        return loss.detach(), (logits.detach().mean(0).argmax(-1) == labels).sum()

    @contextmanager
    def _overlapped(self) -> Iterator[None]:
        """Overlap weight gradients with the rest of the backward pass, if the configuration says so."""
        if self.executor is None:
            yield
            return
        with overlapped(self._convolution_weights, self.executor) as begun:
            yield
        if begun.submitted == 0:
            self.executor = None
            logger.warning(
                "train.overlap_weight_gradients is left off: no convolution of this network runs between fused kernels,"
                " learns and has no hooks (python -m gac.doctor says whether the kernels work)"
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


def _parallel(network: nn.Module, device: torch.device, ranks: Ranks) -> nn.Module:
    """Wrap ``network`` in DDP if there are several ranks."""
    if ranks.size == 1:
        return network
    with warnings.catch_warnings(), collective():
        # Older versions of PyTorch do not know the new name of broadcast_buffers.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            # Training does not read the buffers; Ranks.broadcast_buffers copies them before anything does.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
