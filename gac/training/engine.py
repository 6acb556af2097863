"""The training loop, from a configuration to a folder with a trained network."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from gac.checkpoint import write_checkpoint
from gac.config import Config
from gac.data import Data, build_data
from gac.data.interface import check_readable
from gac.data.seeding import Stream, derive_seed
from gac.errors import InputError
from gac.evaluation.evaluate import Evaluation, EvaluationStep, evaluate
from gac.evaluation.firing import FiringRates
from gac.execution import random_state
from gac.execution.cuda_graph import Replayed, check_capturable, select_capture
from gac.execution.device import check_precision, memory_format, select_device
from gac.execution.distributed import SINGLE_PROCESS, Ranks, shared_fields
from gac.files import writing
from gac.models import create_model
from gac.models.batch_norm import BatchNorm2d
from gac.models.ms_resnet import MSResNet
from gac.training.checkpoints import CheckpointInterval
from gac.training.ema import MovingAverage
from gac.training.mixing import Mixing
from gac.training.optim import (
    learning_rate_at,
    load_optimizer,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from gac.training.progress import EpochProgress, log_epoch, log_start
from gac.training.run_folder import RunFolder, append_metrics, check_same_data, check_same_run, write_metrics
from gac.training.signals import Interrupted, Interruption
from gac.training.step import TrainingStep
from gac.training.totals import Readback, Totals, check_totals, check_weights, over_ranks
from gac.version import versions

logger = logging.getLogger("gac")


@dataclass
class Position:
    """Where a run is; together with the weights, the optimiser and the generators all that resuming needs."""

    epoch: int = 0
    """Complete epochs, evaluation included."""
    batch: int = 0
    """Batches done of the epoch in progress."""
    step: int = 0
    """Batches done in all."""
    seconds: float = 0.0
    """Seconds spent training in the epoch in progress."""
    skipped_images: int = 0
    """Images of the epoch in progress that could not be read."""
    mix_epoch: bool | None = None
    """With train.cutmix epoch: whether the batches of this epoch are mixed; None before it is decided."""
    best_top1: float = -math.inf
    """Highest test accuracy so far, in percent."""


def train(
    config: Config,
    output: str | Path,
    resume: str | None = None,
    part: Callable[[Data], Data] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> None:
    """Train as ``config`` says and write everything to the folder ``output``.

    The folder gets config.yaml, metrics.jsonl (a line an epoch), last.pt (the newest state, to resume from) with
    older ones beside it, best.pt (the network with the highest test accuracy; its entry "weights" says whether they are
    those trained, "raw", or their moving average, "ema") and TensorBoard's event files. Accuracies are in percent; the
    training accuracy counts the labels that images had before CutMix and mixup.

    Args:
        config: The run.
        output: Its folder.
        resume: "auto" to continue the newest checkpoint in ``output`` that is whole, if there is one, the path of a
            last.pt to continue that one, or None to start afresh.
        part: Returns what to use of the data set; by default all of it.
        ranks: The processes of the run, each of which calls this; rank 0 reads and writes the folder.

    Raises:
        InputError: For input that cannot be used, and for an output folder that holds another run.
        Interrupted: After SIGINT or SIGTERM, once last.pt is written.
        TrainingDiverged: When the loss, a gradient or a weight is no longer finite; the checkpoints stay as they were.
        ResultsNotWritten: When the disk is full or the folder can no longer be written.
    """
    folder = RunFolder(Path(output))
    with Interruption(ranks.largest, second_kills=not ranks.launched) as interruption, closing(folder.lock):
        Trainer(config, folder, resume, interruption, part, ranks).run()


class Trainer:
    """One run: what :func:`train` builds and drives."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        resume: str | None,
        interruption: Interruption,
        part: Callable[[Data], Data] | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.folder = folder
        self.interruption = interruption
        ranks.check_equal(shared_fields(config))
        self.device = ranks.together(self._select_device)
        # Before anything slow, so that a wrong path or a changed configuration is known at once.
        resumed = ranks.from_first(lambda: self._read_checkpoint(resume))

        random_state.seed_everything(config.train.seed)
        self.data = ranks.together(lambda: self._open_data(part), in_turn=config.data.download)
        info = self.data.info
        self._sizes = {"training images": info.train_size, "test images": info.test_size, "classes": info.num_classes}
        ranks.check_equal(self._sizes)
        if resumed is not None:
            ranks.together(lambda: check_same_data(resumed[1]["training"], self._sizes, resumed[0]))
        self.batches = len(self.data.train)
        self.network = ranks.together(self._create_network)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.memory_format = memory_format(config.train, self.device)
        self.network.to(self.device, memory_format=self.memory_format)
        self.average = MovingAverage(self.network, config.train.ema_decay) if config.train.ema_decay > 0 else None
        self.optimizer = make_optimizer(parameter_groups(self.network, config.train), config.train, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.amp == "fp16")
        self.step = TrainingStep(
            self.network, self.optimizer, self.scaler, config.train, self.device, self.average, ranks
        )
        # One for all, so that evaluation runs in the memory of the training step.
        capture = select_capture(config.train.cuda_graph, self.device)
        self._replayed_step = None if capture is None else Replayed(self.step, capture)
        evaluation = (self.device, config.train.amp, config.train.channels_last, capture)
        self._score = EvaluationStep(self.network, *evaluation)
        self._score_average = None if self.average is None else EvaluationStep(self.average.network, *evaluation)
        self.mixing = Mixing(config.train, self.data.info.num_classes, ranks)
        self.firing_rates = FiringRates(self.network, ranks)
        self.interval = CheckpointInterval(config.train.checkpoint_minutes, config.train.checkpoint_steps)
        self.position = Position()
        self.history: list[dict[str, float]] = []
        # Rank 0's alone.
        self.writer: SummaryWriter | None = None

        ranks.from_first(lambda: folder.create(config))
        log_start(config, self.data.info, self.network, self.batches, self.device, folder.path, ranks)
        if resumed is not None:
            self._restore(*resumed)
        elif resume is not None:
            logger.info("there is no %s: starting afresh", folder.checkpoints.newest)
        ranks.from_first(self._begin_metrics)

    def _select_device(self) -> torch.device:
        device = select_device(self.config.device, self.ranks)
        check_precision(device, self.config.train.amp)
        if self.config.train.cuda_graph:
            check_capturable(self.config.model)
        if self.config.train.cuda_graph and self.ranks.size > 1:
            raise InputError(
                f"train.cuda_graph replays the steps of one process, and there are {self.ranks.size}: leave it off"
            )
        return device

    def _read_checkpoint(self, resume: str | None) -> tuple[Path, dict[str, Any]] | None:
        self.folder.enter()
        resumed = self.folder.checkpoint_to_resume(resume)
        if resumed is not None:
            check_same_run(resumed[1], self.config, resumed[0])
        return resumed

    def _open_data(self, part: Callable[[Data], Data] | None) -> Data:
        config, ranks = self.config, self.ranks.size
        data = build_data(
            config.data,
            device=self.device,
            batch_size=config.train.batch_size,
            eval_batch_size=config.train.eval_batch_size,
            seed=config.train.seed,
            normalize=config.model.takes_normalized_images,
            shard=self.ranks.shard,
        )
        smallest = data.train.size % config.train.batch_size or config.train.batch_size
        if smallest < ranks:
            raise InputError(
                f"{ranks} processes cannot share a batch of {smallest} images, which train.batch_size"
                f" {config.train.batch_size} leaves of {data.train.size}: choose another train.batch_size or start"
                " fewer processes"
            )
        return data if part is None else part(data)

    def _create_network(self) -> MSResNet:
        network = create_model(
            num_classes=self.data.info.num_classes,
            in_channels=self.data.info.channels,
            **asdict(self.config.model),
        )
        network.set_checkpoint_activations(self.config.train.checkpoint_activations)
        for module in network.modules():
            if isinstance(module, BatchNorm2d):
                module.synchronized = self.config.train.sync_batch_norm and self.ranks.size > 1
        return network

    def _begin_metrics(self) -> None:
        with writing(self.folder.metrics):
            write_metrics(self.folder.metrics, self.history)

    def _open_writer(self) -> None:
        with writing(self.folder.path):
            self.writer = SummaryWriter(self.folder.path, purge_step=self.position.epoch + 1)

    def _close_writer(self) -> None:
        if self.writer is not None:
            # It raises what its thread met once more.
            with writing(self.folder.path):
                self.writer.close()

    def run(self) -> None:
        """Train the epochs that are left; see :func:`train`."""
        epochs = self.config.train.epochs
        if self.position.epoch == epochs:
            logger.info("all %d epochs are done: nothing to do", epochs)
            return
        self.ranks.from_first(self._open_writer)
        try:
            while self.position.epoch < epochs:
                self._train_epoch()
                self._finish_epoch(*self._evaluate())
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
        finally:
            self._close_writer()
        logger.info("best test top-1 %.2f %%, in %s", self.position.best_top1, self.folder.best)

    def _train_epoch(self) -> None:
        position, totals = self.position, self.step.totals
        if position.mix_epoch is None:
            position.mix_epoch = self.mixing.draw_for_epoch(position.epoch)
        self.network.train()
        readback, suspect = Readback(totals.tensor), False

        def poll() -> tuple[float, float] | None:
            nonlocal suspect
            values = readback.poll()
            if values is None:
                return None
            now = Totals(*values)
            suspect = not now.healthy
            return now.mean_loss, now.top1

        title = f"epoch {position.epoch + 1}/{self.config.train.epochs}"
        epoch = self.data.train.epoch(position.epoch, start=position.batch)
        started, seconds_before = time.perf_counter(), position.seconds
        skipped_before = position.skipped_images

        def count() -> None:
            # Waits for the device, so that the clock stops when the work is done.
            totals.read()
            position.seconds = seconds_before + time.perf_counter() - started
            position.skipped_images = skipped_before + self.data.train.skipped

        with EpochProgress(title, self.batches, position.batch, poll, self.ranks.is_main) as progress:
            try:
                for images, labels in self.interruption.watch(epoch):
                    self._train_step(images, labels)
                    progress.update(self.step.batch_images or len(labels))
                    # The clocks of the ranks differ, and so may what they have seen of their own images.
                    due, suspect = self.ranks.largest(self.interval.due(position.step) and self.ranks.is_main, suspect)
                    if suspect:
                        self._check_health()
                    if due:
                        count()
                        self._save()
            except Interrupted:
                count()
                raise
            # After another error the device may never finish: NCCL waits for a rank that is gone.
            count()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        train, position = self.config.train, self.position
        set_learning_rate(self.optimizer, learning_rate_at(train, position.epoch, position.batch, self.batches))
        images, targets = self.mixing(images, labels, position.epoch, position.mix_epoch)
        images = images.contiguous(memory_format=self.memory_format)
        if self.ranks.size > 1:
            done = position.batch * train.batch_size
            self.step.batch_images = min(train.batch_size, self.data.train.size - done)
        try:
            with self._own_noise():
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

    def _evaluate(self) -> tuple[Evaluation, Evaluation | None]:
        """Score the network and the average of its weights, if there is one, on the test set."""
        # Before the evaluation: its figures mean nothing if the weights are not finite.
        self._check_health()
        if self.average is not None:
            self.ranks.first_buffers(self.average.network)
        # Rate coding draws random numbers: an abandoned evaluation must leave none drawn, as resuming repeats it.
        before = random_state.capture(self.device)
        try:
            batches = self.firing_rates.watch(self.interruption.watch(self.data.test.epoch(0)))
            with self._own_noise():
                test = evaluate(self._score, batches, self.ranks)
            if self._score_average is None:
                return test, None
            batches = self.interruption.watch(self.data.test.epoch(0))
            with self._own_noise():
                return test, evaluate(self._score_average, batches, self.ranks)
        except Interrupted:
            random_state.restore(before, self.device)
            raise

    def _own_noise(self) -> AbstractContextManager:
        """Return a context in which random numbers of the network's are not those of the other ranks.

        A single process draws them from the generators that all else is drawn from. Of several ranks those generators
        must stay equal, or CutMix's coins would differ.
        """
        if self.ranks.size == 1:
            return nullcontext()
        place = self.position.step, self.ranks.rank, int(self.network.training)
        return random_state.apart(derive_seed(self.config.train.seed, Stream.RANK_NOISE, *place), self.device)

    def _finish_epoch(self, test: Evaluation, average: Evaluation | None) -> None:
        position, totals = self.position, self._totals()
        skipped, test_skipped = self._sum(position.skipped_images, self.data.test.skipped)
        self.ranks.together(lambda: check_readable("training", skipped, self.data.train.size))
        self.ranks.together(lambda: check_readable("test", test_skipped, self.data.test.size))
        metrics = {
            "epoch": position.epoch + 1,
            "step": position.step,
            "train_loss": totals.mean_loss,
            "train_top1": totals.top1,
            "test_loss": test.loss,
            "test_top1": test.top1,
            "test_top5": test.top5,
            **({} if average is None else {"test_loss_ema": average.loss, "test_top1_ema": average.top1}),
            "learning_rate": learning_rate_at(self.config.train, position.epoch, self.batches - 1, self.batches),
            "skipped_steps": int(totals.skipped),
            "skipped_images": skipped,
            "test_skipped_images": test_skipped,
            "images_per_second": totals.images / position.seconds,
            "seconds": position.seconds,
        }
        rates = self.firing_rates.read()
        scores = {"raw": test} if average is None else {"raw": test, "ema": average}
        better = max(scores, key=lambda weights: scores[weights].top1)
        improved = scores[better].top1 > position.best_top1
        self.history.append(metrics)
        self.position = Position(
            epoch=position.epoch + 1,
            step=position.step,
            best_top1=max(scores[better].top1, position.best_top1),
        )
        self.step.totals.begin_epoch()
        # In this order: whatever a crash leaves behind, last.pt is never ahead of the other files.
        self.ranks.from_first(lambda: self._write_results(metrics, rates, better if improved else None))
        self._save()
        evaluating = sum(score.images / score.images_per_second for score in scores.values())
        log_epoch(metrics, self.config.train.epochs, improved, position.seconds + evaluating)

    def _write_results(
        self, metrics: dict[str, float], rates: dict[str, float], best: Literal["raw", "ema"] | None
    ) -> None:
        """Write metrics, firing rates and, if it is the ``best`` so far, the network with these weights."""
        with writing(self.folder.metrics):
            append_metrics(self.folder.metrics, metrics)
        with writing(self.folder.path):
            for name, value in metrics.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, metrics["epoch"])
            for layer, rate in rates.items():
                self.writer.add_scalar(f"firing_rate/{layer}", rate, metrics["epoch"])
            self.writer.flush()
        if best is not None:
            with writing(self.folder.best):
                write_checkpoint(self.folder.best, self._payload(best))

    def _totals(self) -> Totals:
        """Return the totals of all ranks; waits for the device."""
        return over_ranks(self.ranks.gather(self.step.totals.read()))

    def _sum(self, *counts: int) -> list[int]:
        """Return the sum of each count over the ranks."""
        return [sum(each) for each in zip(*self.ranks.gather(counts), strict=True)]

    def _check_health(self) -> None:
        """Raise TrainingDiverged on all ranks unless every loss, gradient and weight is finite; waits for the device.

        Afterwards the network's running statistics are those of rank 0, on which alone they count.
        """
        self.ranks.first_buffers(self.network)
        check_totals(self._totals(), self.config.train, self.batches)
        check_weights(self.network, self.position.step, self.config.train, self.batches)

    def _save(self) -> None:
        """Write last.pt, unless a number in it is not finite."""
        self._check_health()
        (skipped,) = self._sum(self.position.skipped_images)
        training = {
            "position": asdict(replace(self.position, skipped_images=skipped)),
            "totals": torch.tensor(self._totals(), dtype=torch.float64),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_state": random_state.capture(self.device),
            **({} if self.average is None else {"average": self.average.state_dict()}),
            "history": self.history,
            "ranks": self.ranks.size,
            "data": self._sizes,
        }
        payload = {**self._payload(), "training": training}
        self.ranks.from_first(lambda: self.folder.checkpoints.write(payload, self.config.train.keep_checkpoints))
        self.interval.restart()

    def _payload(self, weights: Literal["raw", "ema"] = "raw") -> dict[str, Any]:
        network = self.network if weights == "raw" else self.average.network
        return {
            "model": network.state_dict(),
            "weights": weights,
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
        totals = Totals(*training["totals"].tolist())
        if not self.ranks.is_main:
            # The sums so far are rank 0's, whatever rank they came from.
            self.position.skipped_images = 0
            totals = totals._replace(images=0.0, loss=0.0, correct=0.0)
        self.step.totals.load(totals)
        self.history = training["history"]
        load_optimizer(self.optimizer, training["optimizer"], self.device)
        self.scaler.load_state_dict(training["scaler"])
        if self.average is not None:
            self.average.load_state_dict(training["average"])
        random_state.restore(training["random_state"], self.device)
        if checkpoint.resolve().parent != self.folder.path.resolve():
            # The best network so far is in another folder; this one keeps the best of what follows.
            self.position.best_top1 = -math.inf
        if (before := training.get("ranks", 1)) != self.ranks.size:
            logger.info("this run had %d processes and goes on with %d", before, self.ranks.size)
        logger.info("resuming %s after %d epochs and %d batches", checkpoint, self.position.epoch, self.position.batch)
