"""The training loop: from a configuration to a folder with a trained network."""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gac.analysis.firing import FiringRates
from gac.analysis.gates import GateMeans
from gac.checkpoint import load_weights, write_checkpoint
from gac.config import Config
from gac.data import Data
from gac.data.interface import check_readable
from gac.errors import InputError
from gac.evaluation.evaluate import Evaluation, EvaluationStep, evaluate
from gac.execution import random_state
from gac.execution.device import memory_format, network_input
from gac.execution.distributed import SINGLE_PROCESS, Ranks, shared_fields
from gac.execution.environment import describe_backend
from gac.files import writing
from gac.training.checkpoints import CheckpointInterval, StateAdapter
from gac.training.distillation import make_distillation
from gac.training.ema import MovingAverage
from gac.training.epoch_metrics import epoch_metrics
from gac.training.freezing import training_mode
from gac.training.mixing import Mixing
from gac.training.optim import learning_rate_at, load_optimizer, make_optimizer, parameter_groups, set_learning_rate
from gac.training.position import Position
from gac.training.progress import EpochProgress, log_epoch, log_start
from gac.training.resumed import check_progress, check_state
from gac.training.run_folder import Metric, RunFolder, check_same_data
from gac.training.self_check import check_replays
from gac.training.setup import (
    check_memory,
    choose_device,
    choose_graphs,
    create_network,
    load_initial_weights,
    open_data,
)
from gac.training.signals import Interrupted, Interruption
from gac.training.step import TrainingStep
from gac.training.totals import Readback, Totals, check_totals, check_weights
from gac.version import versions

logger = logging.getLogger("gac")


def train(
    config: Config,
    output: str | Path,
    resume: str | None = None,
    part: Callable[[Data], Data] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    after_step: Callable[["Trainer"], None] = lambda trainer: None,
) -> None:
    """Train as ``config`` says and write all results to the folder ``output``.

    The folder gets config.yaml, metrics.jsonl (one line per epoch), last.pt (the newest state, to resume from) with
    older ones beside it, best.pt (the network with the highest test accuracy; its entry "weights" says whether it holds
    the trained weights, "raw", or their moving average, "ema") and TensorBoard's event files. Accuracies are in
    percent; the training accuracy counts the labels that images had before CutMix and mixup.

    Args:
        config: The run.
        output: Its folder.
        resume: "auto" to continue from the newest intact checkpoint in ``output``, if there is one, the path of a
            last.pt to continue from that one, or None to start afresh.
        part: Selects the part of the data set to use; by default all of it.
        ranks: The processes of the run, each of which calls this; only rank 0 reads and writes the folder.
        after_step: Called after every training step.

    Raises:
        InputError: For input that cannot be used, and for an output folder that holds another run.
        Interrupted: After SIGINT or SIGTERM, once last.pt is written.
        TrainingDiverged: When the loss, a gradient or a weight is not finite any more; the checkpoints stay as they
            were.
        ResultsNotWritten: When the disk is full or the folder can no longer be written.
    """
    folder = RunFolder(Path(output))
    with Interruption(ranks.largest, second_kills=not ranks.launched) as interruption, closing(folder.lock):
        Trainer(config, folder, resume, interruption, part, ranks, after_step).run()


class Trainer:
    """One training run; :func:`train` documents the arguments."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        resume: str | None,
        interruption: Interruption,
        part: Callable[[Data], Data] | None = None,
        ranks: Ranks = SINGLE_PROCESS,
        after_step: Callable[["Trainer"], None] = lambda trainer: None,
    ) -> None:
        # What the run folder and its checkpoints hold does not depend on a later version's presets.
        self.config = config = ranks.together(config.with_neuron)
        self.ranks = ranks
        self.folder = folder
        self.interruption = interruption
        self.after_step = after_step
        ranks.check_equal(shared_fields(config))
        self.device = ranks.together(lambda: choose_device(config, ranks))
        # Before anything slow, so that a wrong path or a changed configuration is reported at once.
        resumed = ranks.on_main(lambda: folder.open(config, resume))

        random_state.seed_everything(config.train.seed)
        self.data = ranks.together(
            lambda: open_data(config, self.device, part, ranks), in_turn=config.data.writes_files
        )
        info = self.data.info
        ranks.check_equal(info.to_dict())
        if resumed is not None:
            ranks.together(lambda: check_same_data(resumed[1], info, resumed[0]))
        self.batches = len(self.data.train)
        ranks.together(lambda: check_memory(config, self.data, self.device, ranks))
        self.network = ranks.together(lambda: create_network(config, self.data, ranks))
        if config.train.init is not None and resumed is None:
            ranks.together(lambda: load_initial_weights(self.network, config))
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.memory_format = memory_format(config.train, self.device)
        self.network.to(self.device, memory_format=self.memory_format)
        self.distillation = ranks.together(
            lambda: make_distillation(config.train, info, self.device, self.memory_format)
        )
        self.average = MovingAverage(self.network, config.train.ema_decay) if config.train.ema_decay > 0 else None
        self.optimizer = make_optimizer(parameter_groups(self.network, config.train), config.train, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.amp == "fp16")
        self.step = TrainingStep(
            self.network, self.optimizer, self.scaler, config.train, self.device, self.average, ranks, self.distillation
        )
        self._graphs = choose_graphs(config, self.device, ranks, *self.step.networks)
        self._replayed_step = None if self._graphs is None else self._graphs.replaying(self.step, self.step.abandon)
        evaluation = (self.device, config.train.amp, config.train.channels_last, self._graphs)
        self.networks = {"raw": self.network, **({} if self.average is None else {"ema": self.average.network})}
        self._scored = {weights: EvaluationStep(each, *evaluation) for weights, each in self.networks.items()}
        self.mixing = Mixing(config.train, info.num_classes, ranks)
        self.firing_rates = FiringRates(self.network, ranks)
        self.gate_means = GateMeans(self.network, ranks)
        self.interval = CheckpointInterval(config.train.checkpoint_minutes, config.train.checkpoint_steps)
        self.position = Position()
        self.history: list[dict[str, Metric]] = []

        # Before the folder is made: a state that cannot be resumed leaves nothing behind.
        if resumed is not None:
            ranks.together(lambda: self._restore(*resumed))
        if self._graphs is not None and self.position.epoch < config.train.epochs:
            check_replays(self._graphs, self.step, config, self.data)
        ranks.on_main(lambda: folder.create(config))
        log_start(config, info, self.network, self.batches, self.device, folder.path, ranks)
        if resumed is not None:
            self._log_resumed(*resumed)
        elif resume is not None:
            logger.info("there is no %s: starting afresh", folder.checkpoints.newest)
        ranks.on_main(lambda: folder.begin_metrics(self.history))

    def _states(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the network, by its name there."""
        # Not an attribute: a cycle of references would keep the workers of a DataLoader alive when a run has ended.
        return {
            "position": StateAdapter(lambda: self.position.state_dict(self.ranks), self._load_position),
            "totals": self.step.totals,
            "optimizer": StateAdapter(
                self.optimizer.state_dict, lambda state: load_optimizer(self.optimizer, state, self.device)
            ),
            "scaler": self.scaler,
            "random_state": StateAdapter(
                lambda: random_state.capture(self.device), lambda state: random_state.restore(state, self.device)
            ),
            **({} if self.average is None else {"average": self.average}),
            **({} if self.distillation is None else {"distillation": self.distillation}),
            "history": StateAdapter(lambda: self.history, self.history.extend),
        }

    def run(self) -> None:
        """Train the epochs that are left; see :func:`train`."""
        epochs = self.config.train.epochs
        if self.position.epoch == epochs:
            logger.info("all %d epochs are done: nothing to do", epochs)
            return
        self.ranks.on_main(lambda: self.folder.open_events(self.position.epoch))
        try:
            with _without_old_objects():
                while self.position.epoch < epochs:
                    self._train_epoch()
                    self._finish_epoch(self._evaluate())
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
            self.folder.close_events()
        if self.position.best_top1 > -math.inf:
            logger.info("best test top-1 %.2f %%, in %s", self.position.best_top1, self.folder.best)

    def _train_epoch(self) -> None:
        position = self.position
        if position.mix_epoch is None:
            position.mix_epoch = self.mixing.draw_for_epoch(position.epoch)
        training_mode(self.network, self.config.train)
        batches = self.data.train.epoch(position.epoch, start=position.batch)
        readback = Readback(self.step.totals.tensor)
        title = f"epoch {position.epoch + 1}/{self.config.train.epochs}"
        started, before = time.perf_counter(), replace(position)
        with EpochProgress(title, self.batches, position.batch, self.ranks.is_main) as progress:
            try:
                for images, labels in self.interruption.watch(batches):
                    self.train_step(images, labels)
                    self.after_step(self)
                    progress.update(self.step.batch_images or len(labels))
                    totals = Totals() if (values := readback.poll()) is None else Totals(*values)
                    if totals.images:
                        progress.show(totals.mean_loss, totals.top1)
                    # The clocks of the ranks differ, and each has seen only its own images.
                    due, suspect = self.ranks.largest(
                        self.ranks.is_main and self.interval.due(position.step), not totals.healthy
                    )
                    if suspect:
                        self._check_health()
                    if due:
                        self._measure_epoch(started, before)
                        self._save()
            except Interrupted:
                self._measure_epoch(started, before)
                raise
            # After any other error the device may never finish: NCCL waits for a rank that is gone.
            self._measure_epoch(started, before)

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """Train on the next batch of the epoch, as the loader yields it."""
        train, position = self.config.train, self.position
        set_learning_rate(self.optimizer, learning_rate_at(train, position.epoch, position.batch, self.batches))
        images, targets = self.mixing(images, labels, position.epoch, position.mix_epoch)
        images = network_input(images, self.memory_format)
        if self.ranks.size > 1:
            done = position.batch * train.batch_size
            self.step.batch_images = min(train.batch_size, self.data.train.size - done)
        step = self.step
        if self._replayed_step is not None:
            if self.step.has_hooks():
                self._graphs.warn_of_hooks()
            else:
                step = self._replayed_step
        with self.own_noise():
            step(images, targets, labels)
        position.batch += 1
        position.step += 1

    def _measure_epoch(self, started: float, before: Position) -> None:
        """Update the seconds and skipped images of the position, which was ``before`` when the clock was started."""
        # Waits for the device, so that the clock stops when the work is done.
        self.step.totals.read()
        self.position.seconds = before.seconds + time.perf_counter() - started
        self.position.skipped_images = before.skipped_images + self.data.train.skipped

    def _evaluate(self) -> dict[str, Evaluation]:
        """Score the network ("raw") and the average of its weights ("ema"), if there is one, on the test set."""
        # Scores mean nothing unless the weights are finite.
        self._check_health()
        if self.average is not None:
            self.ranks.broadcast_buffers(self.average.network)
        # Rate coding draws random numbers. Resuming repeats an interrupted evaluation, which must draw the same ones.
        before = random_state.capture(self.device)
        scores = {}
        try:
            for weights, step in self._scored.items():
                batches = self.interruption.watch(self.data.test.epoch(0))
                if weights == "raw":
                    batches = self.gate_means.watch(self.firing_rates.watch(batches))
                with self.own_noise():
                    scores[weights] = evaluate(step, batches, self.ranks)
        except Interrupted:
            random_state.restore(before, self.device)
            raise
        return scores

    def own_noise(self) -> AbstractContextManager:
        """Return a context in which the network draws other random numbers on each rank."""
        place = self.position.step, self.ranks.rank, int(self.network.training)
        return random_state.own_of_rank(self.ranks, self.device, self.config.train.seed, *place)

    def _finish_epoch(self, scores: dict[str, Evaluation]) -> None:
        position, totals = self.position, self.step.totals.over_ranks()
        skipped, test_skipped = self.ranks.sum(position.skipped_images, self.data.test.skipped)
        self.ranks.together(lambda: check_readable("training", skipped, self.data.train.size))
        self.ranks.together(lambda: check_readable("test", test_skipped, self.data.test.size))
        backend = describe_backend(self.network, self.device)["backend"]
        graphs = self._graphs is not None and self._graphs.in_use and not self.step.has_hooks()
        metrics = epoch_metrics(
            self.config.train, position, totals, scores, self.batches, skipped, test_skipped, backend, graphs
        )
        measured = {f"firing_rate/{layer}": rate for layer, rate in self.firing_rates.read().items()}
        measured |= {f"gate/{step}": mean for step, mean in self.gate_means.read().items()}
        top1 = {weights: score.top1 for weights, score in scores.items() if math.isfinite(score.loss)}
        if len(top1) < len(scores):
            logger.warning(
                "epoch %d: outputs for test images are not finite, so that their accuracy means nothing and best.pt"
                " does not get these weights; with train.amp fp16 they may be too large for it",
                position.epoch + 1,
            )
        better = max(top1, key=top1.__getitem__, default=None)
        improved = better is not None and top1[better] > position.best_top1
        self.history.append(metrics)
        self.position = position.next_epoch(top1.get(better, -math.inf))
        self.step.totals.begin_epoch()
        # In this order: whatever a crash leaves behind, last.pt is never ahead of the other files.
        self.ranks.on_main(lambda: self._write_results(metrics, measured, better if improved else None))
        self._save()
        evaluating = sum(score.images / score.images_per_second for score in scores.values())
        log_epoch(metrics, self.config.train.epochs, improved, position.seconds + evaluating)

    def _write_results(
        self, metrics: dict[str, Metric], measured: dict[str, float], best: Literal["raw", "ema"] | None
    ) -> None:
        """Write metrics, what was measured inside and, if it is the ``best`` so far, the network with these weights."""
        self.folder.write_epoch(metrics, measured)
        if best is not None:
            with writing(self.folder.best):
                write_checkpoint(self.folder.best, self._payload(best))

    def _check_health(self) -> None:
        """Raise TrainingDiverged on all ranks unless every loss, gradient and weight is finite; waits for the device.

        Gives the network of every rank the running statistics of rank 0, the only ones that are saved.
        """
        self.ranks.broadcast_buffers(self.network)
        check_totals(self.step.totals.over_ranks(), self.config.train, self.batches)
        check_weights(self.network, self.position.step, self.config.train, self.batches)

    def _save(self) -> None:
        """Write last.pt, unless a number in it is not finite."""
        self._check_health()
        training = {name: part.state_dict() for name, part in self._states().items()}
        training["ranks"] = self.ranks.size
        payload = {**self._payload(), "training": training}
        self.ranks.on_main(lambda: self.folder.checkpoints.write(payload, self.config.train.keep_checkpoints))
        self.interval.restart()

    def _payload(self, weights: Literal["raw", "ema"] = "raw") -> dict[str, Any]:
        return {
            "model": self.networks[weights].state_dict(),
            "weights": weights,
            "config": self.config.to_dict(),
            "data": self.data.info.to_dict(),
            "num_classes": self.data.info.num_classes,
            "in_channels": self.data.info.channels,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "metrics": self.history[-1] if self.history else {},
            "versions": versions(),
            **describe_backend(self.network, self.device),
        }

    def _restore(self, checkpoint: Path, payload: dict[str, Any]) -> None:
        training = payload["training"]
        try:
            load_weights(self.network, payload.get("model"))
            for name, part in self._states().items():
                if name not in training:
                    raise InputError(f"its entry training.{name} is missing")
                check_state(name, training[name], part.state_dict)
                part.load_state_dict(training[name])
            check_state("ranks", training.get("ranks", 1), dict)
            check_progress(asdict(self.position), self.history, self.config.train.epochs, self.batches)
            if self.position.step:
                # The rate of the last step: whoever writes the state before the next one finds it there.
                last = divmod(self.position.step - 1, self.batches)
                set_learning_rate(self.optimizer, learning_rate_at(self.config.train, *last, self.batches))
        except InputError as error:
            raise InputError(f"cannot resume {checkpoint}: {error}") from error
        if self.ranks.is_main and self.position.epoch > 0:
            self._compare_with_best()

    def _compare_with_best(self) -> None:
        """Let best.pt be the best of what follows, with a warning, unless it is the best of what is done."""
        epoch = self.folder.best_epoch()
        if epoch is None or epoch > self.position.epoch:
            # It is in another folder, lost, or overwritten after the checkpoint that the run resumes from.
            what = "is missing or damaged" if epoch is None else f"is of epoch {epoch}, which comes again"
            logger.warning("%s %s: it will be the best of the epochs that follow", self.folder.best, what)
            self.position.best_top1 = -math.inf

    def _log_resumed(self, checkpoint: Path, payload: dict[str, Any]) -> None:
        if (before := payload["training"].get("ranks", 1)) != self.ranks.size:
            logger.info("this run had %s processes and goes on with %d", before, self.ranks.size)
        logger.info("resuming %s after %d epochs and %d batches", checkpoint, self.position.epoch, self.position.batch)

    def _load_position(self, state: dict[str, Any]) -> None:
        self.position = Position.from_state(state, self.ranks)


@contextmanager
def _without_old_objects() -> Iterator[None]:
    """Keep the garbage collector off the objects that there are, which live as long as the block.

    Else it goes through all those of torch and of this package again and again. After the block it sees all objects,
    those too that the caller had frozen.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
