"""The lines that a run writes when it begins and after every epoch."""

import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch

from gac.config import Config
from gac.data import DataInfo
from gac.models import describe
from gac.models.ms_resnet import MSResNet
from gac.training.distributed import ALONE, Ranks
from gac.training.precision import describe_precision

logger = logging.getLogger("gac")


def log_start(
    config: Config,
    info: DataInfo,
    network: MSResNet,
    batches: int,
    device: torch.device,
    folder: Path,
    ranks: Ranks = ALONE,
) -> None:
    """Say what is trained on what; ``batches`` is the number of batches in an epoch."""
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


def log_epoch(metrics: Mapping[str, float], epochs: int, improved: bool, seconds: float) -> None:
    """Say how an epoch of ``epochs`` went; ``seconds`` is what one takes in all."""
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
