"""What a run shows as it goes: the progress bar and the log lines."""

import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from gac.config import Config
from gac.data import DataInfo
from gac.execution.device import describe_precision
from gac.execution.distributed import SINGLE_PROCESS, Ranks
from gac.models import describe
from gac.models.ms_resnet import MSResNet

logger = logging.getLogger("gac")


class EpochProgress:
    """Progress of one epoch: a bar with the time left on a terminal, a line every 30 s elsewhere.

    Args:
        title: Shown in front.
        batches: Batches of the epoch.
        done: Batches done before.
        visible: Whether anything is shown at all.
    """

    LINE_SECONDS = 30.0

    def __init__(self, title: str, batches: int, done: int, visible: bool = True) -> None:
        self.title = title
        self.batches = batches
        self.done = done
        self._visible = visible
        self._bar: tqdm | None = None
        self._images = 0
        self._shown_images = 0
        self._shown = time.perf_counter()

    def __enter__(self) -> "EpochProgress":
        # None if it was closed.
        if self._visible and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(
                desc=self.title,
                total=self.batches,
                initial=self.done,
                unit="batch",
                leave=False,
                dynamic_ncols=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, images: int) -> None:
        """Count one more batch of ``images`` images."""
        self.done += 1
        self._images += images
        if self._bar is not None:
            self._bar.update()

    def show(self, loss: float, top1: float) -> None:
        """Show the mean loss and the top-1 accuracy in percent so far: on the bar, or in a line if one is due."""
        now = time.perf_counter()
        elapsed = now - self._shown
        if not self._visible or (self._bar is None and elapsed < self.LINE_SECONDS):
            return
        rate = (self._images - self._shown_images) / elapsed
        self._shown_images, self._shown = self._images, now
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, top-1 {top1:.2f} %, {rate:.0f} images/s", refresh=False)
        else:
            logger.info(
                "%s: batch %d of %d, loss %.4f, top-1 %.2f %%, %.0f images/s",
                self.title,
                self.done,
                self.batches,
                loss,
                top1,
                rate,
            )


def log_start(
    config: Config,
    info: DataInfo,
    network: MSResNet,
    batches: int,
    device: torch.device,
    folder: Path,
    ranks: Ranks = SINGLE_PROCESS,
) -> None:
    """Log the data set, the network and the device; ``batches`` is the number of batches in an epoch."""
    logger.info(
        "%s: %d training and %d test images, %s%d x %d x %d, %d classes",
        info.name,
        info.train_size,
        info.test_size,
        f"{info.frames} frames of " if info.frames else "",
        info.channels,
        info.height,
        info.width,
        info.num_classes,
    )
    for line in describe(network):
        logger.info("%s: %s", config.model.name, line)
    logger.info(
        "%d epochs of %d batches on %s, precision %s; writing to %s",
        config.train.epochs,
        batches,
        device if ranks.size == 1 else f"{ranks.size} x {device.type}",
        describe_precision(device, config.train.amp),
        folder,
    )


def log_epoch(metrics: Mapping[str, Any], epochs: int, improved: bool, seconds: float) -> None:
    """Log the results of an epoch; ``epochs`` is their number and ``seconds`` what an epoch takes with evaluation."""
    logger.info(
        "epoch %d/%d: train loss %.4f, top-1 %.2f %%; test loss %.4f, top-1 %.2f %%%s%s; learning rate %.3g, "
        "%.0f images/s, %.1f s, time left %s%s",
        metrics["epoch"],
        epochs,
        metrics["train_loss"],
        metrics["train_top1"],
        metrics["test_loss"],
        metrics["test_top1"],
        f", of the averaged weights {metrics['test_top1_ema']:.2f} %" if "test_top1_ema" in metrics else "",
        " (best so far)" if improved else "",
        metrics["learning_rate"],
        metrics["images_per_second"],
        metrics["seconds"],
        timedelta(seconds=round(seconds * (epochs - metrics["epoch"]))),
        f"; loss scaling skipped {metrics['skipped_steps']} steps" if metrics["skipped_steps"] else "",
    )
