"""The training loop, from a configuration to a folder with a trained network."""

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

from gac.checkpoint import write_checkpoint
from gac.config import Config
from gac.data import build_data
from gac.errors import InputError
from gac.models import create_model
from gac.training import random_state
from gac.training.checkpoints import Cadence
from gac.training.cuda_graph import Replayed
from gac.training.device import select_device
from gac.training.evaluate import Evaluation, evaluate
from gac.training.firing import FiringRates
from gac.training.health import check_totals, check_weights
from gac.training.log import log_epoch, log_start
from gac.training.metrics_file import append_metrics, write_metrics
from gac.training.optim import learning_rate_at, load_optimizer, make_optimizer, set_learning_rate
from gac.training.position import Position
from gac.training.precision import check_precision
from gac.training.progress import EpochProgress
from gac.training.run_folder import RunFolder, check_same_run
from gac.training.signals import Interrupted, Interruption
from gac.training.step import TrainingStep
from gac.training.totals import Readback, Totals
from gac.training.versions import versions
from gac.training.writing import writing

logger = logging.getLogger("gac")


def train(config: Config, output: str | Path, resume: str | None = None) -> None:
    """Train as ``config`` says and write everything to the folder ``output``.

    The folder gets config.yaml, metrics.jsonl (a line an epoch), last.pt (the newest state, to resume from) with
    older ones beside it, best.pt (the network with the highest test accuracy) and TensorBoard's event files.
    Accuracies are in percent; the training accuracy counts the labels that images had before CutMix.

    Args:
        config: The run.
        output: Its folder.
        resume: "auto" to continue the newest checkpoint in ``output`` that is whole, if there is one, the path of a
            last.pt to continue that one, or None to start afresh.

    Raises:
        InputError: For input that cannot be used, and for an output folder that holds another run.
        Interrupted: After SIGINT or SIGTERM, once last.pt is written.
        TrainingDiverged: When the loss, a gradient or a weight is no longer finite; the checkpoints stay as they were.
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
        resumed = folder.checkpoint_to_resume(resume)
        if resumed is not None:
            check_same_run(resumed[1], config, resumed[0])

        random_state.seed_everything(config.train.seed)
        self.data = build_data(
            config.data,
            device=self.device,
            batch_size=config.train.batch_size,
            eval_batch_size=config.train.eval_batch_size,
            seed=config.train.seed,
            normalize=config.model.takes_normalized_images,
        )
        self.batches = len(self.data.train)
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
        self.step = TrainingStep(self.network, self.optimizer, self.scaler, config.train, self.device)
        replays = config.train.cuda_graph and self.device.type == "cuda"
        self._replayed_step = Replayed(self.step, self.device) if replays else None
        self.cutmix = v2.CutMix(alpha=config.train.cutmix_beta, num_classes=self.data.info.num_classes)
        self.firing_rates = FiringRates(self.network)
        self.cadence = Cadence(config.train.checkpoint_minutes, config.train.checkpoint_steps)
        self.position = Position()
        self.history: list[dict[str, float]] = []

        folder.create(config)
        log_start(config, self.data.info, self.network, self.batches, self.device, folder.path)
        if resumed is not None:
            self._restore(*resumed)
        elif resume is not None:
            logger.info("there is no %s: starting afresh", folder.checkpoints.newest)
        with writing(folder.metrics):
            write_metrics(folder.metrics, self.history)

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
                    self._finish_epoch(writer, self._evaluate())
            except Interrupted as interrupted:
                self._save()
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
        position, totals = self.position, self.step.totals
        if position.mix_epoch is None and self.config.train.cutmix == "epoch":
            position.mix_epoch = self._toss_cutmix_coin()
        self.network.train()
        readback = Readback(totals.tensor)

        def poll() -> tuple[float, float] | None:
            values = readback.poll()
            if values is None:
                return None
            now = Totals(*values)
            check_totals(now, self.config.train, self.batches)
            return now.mean_loss, now.top1

        title = f"epoch {position.epoch + 1}/{self.config.train.epochs}"
        epoch = self.data.train.epoch(position.epoch, start=position.batch)
        started, seconds_before = time.perf_counter(), position.seconds
        with EpochProgress(title, self.batches, position.batch, poll) as progress:
            try:
                for images, labels in self.interruption.watch(epoch):
                    self._train_step(images, labels)
                    progress.update(len(labels))
                    if self.cadence.due(position.step):
                        position.seconds = seconds_before + time.perf_counter() - started
                        self._save()
            finally:
                # Waits for the device, so that the clock stops when the work is done.
                totals.read()
                position.seconds = seconds_before + time.perf_counter() - started

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        train, position = self.config.train, self.position
        set_learning_rate(self.optimizer, learning_rate_at(train, position.epoch, position.batch, self.batches))
        targets = labels
        if position.mix_epoch or (train.cutmix == "batch" and self._toss_cutmix_coin()):
            images, targets = self.cutmix(images, labels)
        images = images.contiguous(memory_format=self.memory_format)
        try:
            (self._replayed_step or self.step)(images, targets, labels)
        except ValueError as error:
            if not str(error).startswith("Expected more than 1 value per channel when training"):
                raise
            height, width = images.shape[-2:]
            raise InputError(
                f"BatchNorm cannot train on a single value per channel, which a batch of {len(images)} image of"
                f" {height} x {width} pixels leaves at model.T {self.config.model.T}: choose a train.batch_size that"
                f" leaves no single image at the end of {self.data.info.train_size}, or larger images"
            ) from error
        position.batch += 1
        position.step += 1

    def _evaluate(self) -> Evaluation:
        # Before the evaluation: its figures mean nothing if the weights are not finite.
        self._check_health()
        batches = self.firing_rates.watch(self.interruption.watch(self.data.test.epoch(0)))
        # Rate coding draws random numbers: an abandoned evaluation must leave none drawn, as resuming repeats it.
        before = random_state.capture(self.device)
        try:
            return evaluate(self.network, batches, self.device, self.config.train.amp)
        except Interrupted:
            random_state.restore(before, self.device)
            raise

    def _finish_epoch(self, writer: SummaryWriter, test: Evaluation) -> None:
        position, totals = self.position, self.step.totals.read()
        metrics = {
            "epoch": position.epoch + 1,
            "step": position.step,
            "train_loss": totals.mean_loss,
            "train_top1": totals.top1,
            "test_loss": test.loss,
            "test_top1": test.top1,
            "test_top5": test.top5,
            "learning_rate": learning_rate_at(self.config.train, position.epoch, self.batches - 1, self.batches),
            "skipped_steps": int(totals.skipped),
            "images_per_second": totals.images / position.seconds,
            "seconds": position.seconds,
        }
        rates = self.firing_rates.read()
        improved = test.top1 > position.best_top1
        self.history.append(metrics)
        self.position = Position(
            epoch=position.epoch + 1,
            step=position.step,
            best_top1=max(test.top1, position.best_top1),
        )
        self.step.totals.begin_epoch()
        # In this order: whatever a crash leaves behind, last.pt is never ahead of the other files.
        with writing(self.folder.metrics):
            append_metrics(self.folder.metrics, metrics)
        with writing(self.folder.path):
            for name, value in metrics.items():
                if name != "epoch":
                    writer.add_scalar(name, value, metrics["epoch"])
            for layer, rate in rates.items():
                writer.add_scalar(f"firing_rate/{layer}", rate, metrics["epoch"])
            writer.flush()
        if improved:
            with writing(self.folder.best):
                write_checkpoint(self.folder.best, self._payload())
        self._save()
        log_epoch(metrics, self.config.train.epochs, improved, position.seconds + test.images / test.images_per_second)

    def _toss_cutmix_coin(self) -> bool:
        return torch.rand(()).item() < self.config.train.cutmix_probability

    def _check_health(self) -> None:
        """Raise TrainingDiverged unless every loss, gradient and weight is finite; waits for the device."""
        check_totals(self.step.totals.read(), self.config.train, self.batches)
        check_weights(self.network, self.position.step, self.config.train, self.batches)

    def _save(self) -> None:
        """Write last.pt, unless a number in it is not finite."""
        self._check_health()
        training = {
            "position": asdict(self.position),
            "totals": self.step.totals.tensor,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_state": random_state.capture(self.device),
            "history": self.history,
        }
        self.folder.checkpoints.write({**self._payload(), "training": training}, self.config.train.keep_checkpoints)
        self.cadence.restart()

    def _payload(self) -> dict[str, Any]:
        return {
            "model": self.network.state_dict(),
            "config": self.config.to_dict(),
            "num_classes": self.data.info.num_classes,
            "in_channels": self.data.info.channels,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "metrics": self.history[-1] if self.history else {},
            "versions": versions(),
        }

    def _restore(self, checkpoint: Path, payload: dict[str, Any]) -> None:
        training = payload["training"]
        self.network.load_state_dict(payload["model"])
        self.position = Position(**training["position"])
        self.step.totals.tensor.copy_(training["totals"])
        self.history = training["history"]
        load_optimizer(self.optimizer, training["optimizer"], self.device)
        self.scaler.load_state_dict(training["scaler"])
        random_state.restore(training["random_state"], self.device)
        if checkpoint.resolve().parent != self.folder.path.resolve():
            # The best network so far is in another folder; this one keeps the best of what follows.
            self.position.best_top1 = -math.inf
        logger.info("resuming %s after %d epochs and %d batches", checkpoint, self.position.epoch, self.position.batch)
