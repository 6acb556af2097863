"""The training loop, from a configuration to a folder with a trained network."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.config import Config
from gac.data import build_data
from gac.errors import InputError
from gac.models import create_model, describe
from gac.training import random_state
from gac.training.device import select_device
from gac.training.evaluate import Evaluation, evaluate
from gac.training.metrics_file import append_metrics, drop_metrics_after
from gac.training.optim import classification_loss, learning_rate_at, load_optimizer, make_optimizer
from gac.training.precision import autocast, check_precision, describe_precision
from gac.training.progress import EpochProgress
from gac.training.run_folder import RunFolder, check_same_run
from gac.training.signals import Interrupted, Interruption
from gac.training.versions import versions
from gac.training.writing import writing

logger = logging.getLogger("gac")


class TrainingDiverged(ArithmeticError):
    """The loss or the weights are no longer finite; the message is one line."""


@dataclass
class Position:
    """Where a run is; together with the weights, the optimiser and the generators all that resuming needs."""

    epoch: int = 0
    """Complete epochs, evaluation included."""
    batch: int = 0
    """Batches done of the epoch in progress."""
    step: int = 0
    """Batches done in all."""
    images: int = 0
    """Images seen in the epoch in progress."""
    seconds: float = 0.0
    """Seconds spent training in the epoch in progress."""
    mix_epoch: bool | None = None
    """With train.cutmix epoch: whether the batches of this epoch are mixed; None before it is decided."""
    best_top1: float = -math.inf
    """Highest test accuracy so far, in percent."""


def train(config: Config, output: str | Path, resume: str | None = None) -> None:
    """Train as ``config`` says and write everything to the folder ``output``.

    The folder gets config.yaml, metrics.jsonl (a line an epoch), last.pt (the newest state, to resume from),
    best.pt (the network with the highest test accuracy) and TensorBoard's event files. Accuracies are in
    percent; the training accuracy counts the labels that images had before CutMix.

    Args:
        config: The run.
        output: Its folder.
        resume: "auto" to continue output/last.pt if it is there, the path of a last.pt to continue that one,
            or None to start afresh.

    Raises:
        InputError: For input that cannot be used, and for an output folder that holds another run.
        Interrupted: After SIGINT or SIGTERM, once last.pt is written.
        TrainingDiverged: When the loss or a weight is no longer finite; the checkpoints stay as they were.
        ResultsNotWritten: When the disk is full or the folder can no longer be written.
    """
    with Interruption() as interruption:
        Trainer(config, RunFolder(Path(output)), resume, interruption).run()


class Trainer:
    """One run: what :func:`train` builds and drives."""

    def __init__(self, config: Config, folder: RunFolder, resume: str | None, interruption: Interruption) -> None:
        self.config = config
        self.folder = folder
        self.interruption = interruption
        self.device = select_device(config.device)
        check_precision(self.device, config.train.amp)
        # Before anything slow, so that a wrong path or a changed configuration is known at once.
        checkpoint = folder.checkpoint_to_resume(resume)
        payload = None if checkpoint is None else _read_resumable(checkpoint, config)

        random_state.seed_everything(config.train.seed)
        self.data = build_data(
            config.data,
            device=self.device,
            batch_size=config.train.batch_size,
            eval_batch_size=config.train.eval_batch_size,
            seed=config.train.seed,
            normalize=config.model.takes_normalized_images,
        )
        self.network = create_model(
            num_classes=self.data.info.num_classes,
            in_channels=self.data.info.channels,
            **asdict(config.model),
        )
        self.memory_format = torch.contiguous_format
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            if config.train.channels_last:
                self.memory_format = torch.channels_last
        self.network.to(self.device, memory_format=self.memory_format)
        self.optimizer = make_optimizer(self.network.parameters(), config.train, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.amp == "fp16")
        self.cutmix = v2.CutMix(alpha=config.train.cutmix_beta, num_classes=self.data.info.num_classes)
        self.position = Position()
        self.metrics: dict[str, float] = {}
        # Sums over the epoch so far, on the device: reading them every step would make it wait for the host.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)

        folder.create(config)
        self._log_start()
        if payload is not None:
            self._restore(payload)
            if checkpoint.resolve().parent != folder.path.resolve():
                # The best network so far is in another folder; this one keeps the best of what follows.
                self.position.best_top1 = -math.inf
            logger.info(
                "resuming %s after %d epochs and %d batches",
                checkpoint,
                self.position.epoch,
                self.position.batch,
            )
        elif resume is not None:
            logger.info("there is no %s: starting afresh", folder.last)
        with writing(folder.metrics):
            drop_metrics_after(folder.metrics, self.position.epoch)

    def run(self) -> None:
        """Train the epochs that are left; see :func:`train`."""
        epochs = self.config.train.epochs
        if self.position.epoch == epochs:
            logger.info("all %d epochs are done: nothing to do", epochs)
            return
        with writing(self.folder.path):
            writer = SummaryWriter(self.folder.path, purge_step=self.position.epoch + 1)
        with writer:
            try:
                while self.position.epoch < epochs:
                    self._train_epoch()
                    self._check_finite()
                    self._finish_epoch(writer, self._evaluate())
            except Interrupted as interrupted:
                self._check_finite()
                self._write_last()
                logger.info(
                    "%s after %d epochs and %d batches; continue by adding --resume auto --output %s",
                    interrupted,
                    self.position.epoch,
                    self.position.batch,
                    self.folder.path,
                )
                raise
        logger.info("best test top-1 %.2f %%, in %s", self.position.best_top1, self.folder.best)

    def _train_epoch(self) -> None:
        position, batches = self.position, len(self.data.train)
        if position.mix_epoch is None and self.config.train.cutmix == "epoch":
            position.mix_epoch = self._toss_cutmix_coin()
        self.network.train()
        title = f"epoch {position.epoch + 1}/{self.config.train.epochs}"
        epoch = self.data.train.epoch(position.epoch, start=position.batch)
        with self._clock(), EpochProgress(title, batches, position.batch, self._read_sums) as progress:
            for images, labels in self.interruption.watch(epoch):
                self._train_step(images, labels)
                progress.update(len(labels))
            # Waits for the device, so that the clock stops when the work is done.
            self._read_sums()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        train, position = self.config.train, self.position
        rate = learning_rate_at(train, position.epoch, position.batch, len(self.data.train))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        targets = labels
        if position.mix_epoch or (train.cutmix == "batch" and self._toss_cutmix_coin()):
            images, targets = self.cutmix(images, labels)
        images = images.contiguous(memory_format=self.memory_format)

        self.optimizer.zero_grad()
        with autocast(self.device, train.amp):
            logits = self._forward(images)  # [T, B, K]
            loss = classification_loss(logits.float(), targets, train.loss, train.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

        self.loss_sum += loss.detach() * len(labels)
        self.correct += (logits.detach().mean(0).argmax(-1) == labels).sum()
        position.batch += 1
        position.step += 1
        position.images += len(labels)

    def _forward(self, images: Tensor) -> Tensor:
        try:
            return self.network(images)
        except ValueError as error:
            if not str(error).startswith("Expected more than 1 value per channel when training"):
                raise
            height, width = images.shape[-2:]
            raise InputError(
                f"BatchNorm cannot train on a single value per channel, which a batch of {len(images)} image of"
                f" {height} x {width} pixels leaves at model.T {self.config.model.T}: choose a train.batch_size that"
                f" leaves no single image at the end of {self.data.info.train_size}, or larger images"
            ) from error

    def _evaluate(self) -> Evaluation:
        batches = self.interruption.watch(self.data.test.epoch(0))
        # Rate coding draws random numbers: an abandoned evaluation must leave none drawn, as resuming repeats it.
        before = random_state.capture(self.device)
        try:
            return evaluate(self.network, batches, self.device, self.config.train.amp)
        except Interrupted:
            random_state.restore(before, self.device)
            raise

    def _finish_epoch(self, writer: SummaryWriter, test: Evaluation) -> None:
        position = self.position
        loss, top1 = self._read_sums()
        self.metrics = metrics = {
            "epoch": position.epoch + 1,
            "step": position.step,
            "train_loss": loss,
            "train_top1": top1,
            "test_loss": test.loss,
            "test_top1": test.top1,
            "test_top5": test.top5,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": position.images / position.seconds,
            "seconds": position.seconds,
        }
        improved = test.top1 > position.best_top1
        self.position = Position(
            epoch=position.epoch + 1,
            step=position.step,
            best_top1=max(test.top1, position.best_top1),
        )
        self.loss_sum.zero_()
        self.correct.zero_()
        # In this order: whatever a crash leaves behind, last.pt is never ahead of the other files.
        with writing(self.folder.metrics):
            append_metrics(self.folder.metrics, metrics)
        with writing(self.folder.path):
            for name, value in metrics.items():
                if name != "epoch":
                    writer.add_scalar(name, value, metrics["epoch"])
            writer.flush()
        if improved:
            with writing(self.folder.best):
                write_checkpoint(self.folder.best, self._payload())
        self._write_last()
        self._log_epoch(improved, position.seconds + test.images / test.images_per_second)

    def _toss_cutmix_coin(self) -> bool:
        return torch.rand(()).item() < self.config.train.cutmix_probability

    def _read_sums(self) -> tuple[float, float]:
        """Return the mean loss and the top-1 accuracy in percent of the epoch so far; waits for the device."""
        loss = self.loss_sum.item() / self.position.images
        if not math.isfinite(loss):
            raise self._diverged("the training loss is")
        return loss, 100 * self.correct.item() / self.position.images

    def _check_finite(self) -> None:
        tensors = [t for t in self.network.state_dict().values() if t.is_floating_point()]
        if not torch.stack([t.isfinite().all() for t in tensors]).all():
            raise self._diverged("weights are")
        if not self.loss_sum.isfinite():
            raise self._diverged("the training loss is")

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} not finite in epoch {self.position.epoch + 1} after step {self.position.step} at learning rate"
            f" {self.optimizer.param_groups[0]['lr']:.3g}: lower train.learning_rate or add train.warmup_epochs;"
            " last.pt and best.pt are as they were"
        )

    @contextmanager
    def _clock(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.position.seconds += time.perf_counter() - started

    def _payload(self) -> dict[str, Any]:
        return {
            "model": self.network.state_dict(),
            "config": self.config.to_dict(),
            "num_classes": self.data.info.num_classes,
            "in_channels": self.data.info.channels,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "metrics": self.metrics,
            "versions": versions(),
        }

    def _write_last(self) -> None:
        training = {
            "position": asdict(self.position),
            "loss_sum": self.loss_sum,
            "correct": self.correct,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_state": random_state.capture(self.device),
        }
        with writing(self.folder.last):
            write_checkpoint(self.folder.last, {**self._payload(), "training": training})

    def _restore(self, payload: dict[str, Any]) -> None:
        training = payload["training"]
        self.network.load_state_dict(payload["model"])
        self.metrics = payload["metrics"]
        self.position = Position(**training["position"])
        self.loss_sum.copy_(training["loss_sum"])
        self.correct.copy_(training["correct"])
        load_optimizer(self.optimizer, training["optimizer"], self.device)
        self.scaler.load_state_dict(training["scaler"])
        random_state.restore(training["random_state"], self.device)

    def _log_start(self) -> None:
        info, train = self.data.info, self.config.train
        logger.info(
            "%s: %d training and %d test images, %d x %d x %d, %d classes",
            info.name,
            info.train_size,
            info.test_size,
            info.channels,
            info.height,
            info.width,
            info.num_classes,
        )
        for line in describe(self.network):
            logger.info("%s: %s", self.config.model.name, line)
        logger.info(
            "%d epochs of %d batches on %s, precision %s; writing to %s",
            train.epochs,
            len(self.data.train),
            self.device,
            describe_precision(self.device, train.amp),
            self.folder.path,
        )

    def _log_epoch(self, improved: bool, seconds: float) -> None:
        metrics, epochs = self.metrics, self.config.train.epochs
        logger.info(
            "epoch %d/%d: train loss %.4f, top-1 %.2f %%; test loss %.4f, top-1 %.2f %%%s; learning rate %.3g, "
            "%.0f images/s, %.1f s, time left %s",
            metrics["epoch"],
            epochs,
            metrics["train_loss"],
            metrics["train_top1"],
            metrics["test_loss"],
            metrics["test_top1"],
            " (best so far)" if improved else "",
            metrics["learning_rate"],
            metrics["images_per_second"],
            metrics["seconds"],
            timedelta(seconds=round(seconds * (epochs - metrics["epoch"]))),
        )


def _read_resumable(checkpoint: Path, config: Config) -> dict[str, Any]:
    payload = read_checkpoint(checkpoint)
    if "training" not in payload:
        raise InputError(f"{checkpoint} holds a network without the state to resume from; use the run's last.pt")
    check_same_run(Config.from_dict(payload["config"]), config, checkpoint)
    return payload
