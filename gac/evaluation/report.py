"""What eval.py measures and prints."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gac.checkpoint import build_network, is_ours
from gac.config import Config
from gac.data import Data, DataInfo, build_data
from gac.data.interface import check_readable
from gac.data.seeding import Stream, derive_seed
from gac.errors import InputError
from gac.evaluation.evaluate import Evaluation, EvaluationStep, evaluate
from gac.evaluation.published import PublishedResult, find_published
from gac.execution import random_state
from gac.execution.cuda_graph import check_capturable, select_capture
from gac.execution.device import describe_precision, memory_format, select_device
from gac.execution.distributed import SINGLE_PROCESS, Ranks, shared_fields
from gac.models.ms_resnet import MSResNet
from gac.version import versions


@dataclass(frozen=True)
class Report:
    """The scores of a checkpoint's network and what they were measured on."""

    checkpoint: str
    epoch: int | None
    weights: str | None
    """"raw" for those trained, "ema" for their moving average; None for files that do not say."""
    T: int
    num_classes: int
    parameters: int
    coding: str
    data: str
    device: str
    precision: str
    scores: Evaluation
    published: PublishedResult | None
    config: dict[str, Any]
    versions: dict[str, str]


def evaluate_checkpoint(
    path: Path, payload: dict[str, Any], config: Config, T: int | None = None, ranks: Ranks = SINGLE_PROCESS
) -> Report:
    """Score the network of a checkpoint on a test set.

    Precision is the training run's where the device has it; the CPU evaluates in float32 what was trained in
    fp16.

    Args:
        path: The checkpoint, for messages.
        payload: Its content, from ``read_checkpoint``.
        config: The data set and the device; for our checkpoints the training run's with overrides applied.
        T: Number of time steps for networks without gated attention; by default the one they were trained with.
        ranks: The processes that share the images; every one of them gets the report.

    Raises:
        InputError: If the network does not fit the data set, or one of them cannot be used.
    """
    ranks.check_equal({**shared_fields(config), "model.T": T})
    device, network, data = ranks.together(lambda: _open(path, payload, config, T, ranks), config.data.download)
    ranks.check_equal({"test images": data.test.size})
    ours = is_ours(payload)
    amp = config.train.amp if ours else "off"
    if amp == "fp16" and device.type != "cuda":
        amp = "off"
    # Rate coding must not draw the same numbers for the images of every rank.
    seed = derive_seed(config.train.seed, Stream.RANK_NOISE, ranks.rank)
    with random_state.apart(seed, device) if ranks.size > 1 else nullcontext():
        capture = select_capture(config.train.cuda_graph, device)
        step = EvaluationStep(network, device, amp, config.train.channels_last, capture)
        scores = evaluate(step, data.test.epoch(0), ranks)
    ranks.together(lambda: check_readable("test", data.test.size - scores.images, data.test.size))
    return Report(
        checkpoint=str(path),
        epoch=payload.get("epoch") if ours else None,
        weights=payload.get("weights") if ours else None,
        T=network.T,
        num_classes=network.num_classes,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        coding=network.coding_name,
        data=data.info.name,
        device=str(device) if ranks.size == 1 else f"{ranks.size} x {device.type}",
        precision=describe_precision(device, amp),
        scores=scores,
        published=find_published(network, _published_name(data.info, scores.images)),
        # The authors' files do not hold the configuration that they were trained with.
        config=config.to_dict() if ours else {"data": asdict(config.data), "device": config.device},
        versions=versions(),
    )


def _open(
    path: Path, payload: dict[str, Any], config: Config, T: int | None, ranks: Ranks
) -> tuple[torch.device, MSResNet, Data]:
    """Return the device, the network on it, and the data set. Raises InputError."""
    device = select_device(config.device, ranks)
    if config.train.cuda_graph:
        check_capturable(config.model)
    try:
        network = build_network(payload, T)
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from error
    network.set_backend(config.model.backend)
    data = build_data(
        config.data,
        device=device,
        batch_size=config.train.batch_size,
        eval_batch_size=config.train.eval_batch_size,
        seed=config.train.seed,
        normalize=config.model.takes_normalized_images,
        splits=("test",),
        shard=ranks.shard,
    )
    _check_fit(path, network, data.info)
    return device, network.to(device, memory_format=memory_format(config.train, device)), data


def format_report(report: Report) -> str:
    """Return the report as a small table."""
    scores = report.scores
    average = ", moving average of the weights" if report.weights == "ema" else ""
    epoch = "" if report.epoch is None else f" (after epoch {report.epoch}{average})"
    rows = [
        ("checkpoint", f"{report.checkpoint}{epoch}"),
        ("network", f"{report.parameters / 1e6:.3f} M parameters, {report.coding} coding, T={report.T}"),
        ("data", f"{report.data}, {scores.images} test images, {report.num_classes} classes"),
        ("run", f"{report.precision} on {report.device}, {scores.images_per_second:.0f} images/s"),
        ("top-1", f"{scores.top1:6.2f} %  ({scores.correct} of {scores.images} right)"),
        *((f"  t = 1..{t}", f"{top1:6.2f} %") for t, top1 in enumerate(scores.top1_by_time, 1)),
        (f"top-{min(5, report.num_classes)}", f"{scores.top5:6.2f} %"),
        ("loss", f"{scores.loss:.4f}"),
    ]
    if report.published is not None:
        difference = scores.top1 - report.published.top1
        rows.append(
            (
                "published",
                f"{report.published.top1:6.2f} %  ({difference:+.2f}; {report.published.source})",
            )
        )
    return "\n".join(f"{name:<12}{value}" for name, value in rows)


def _check_fit(path: Path, network: MSResNet, info: DataInfo) -> None:
    for what, has, needs in (
        ("classes", network.num_classes, info.num_classes),
        ("image channels", network.in_channels, info.channels),
    ):
        if has != needs:
            raise InputError(
                f"checkpoint {path} is for {has} {what}, data set {info.name} has {needs}:"
                " name the data set it was trained on with --data.name and --data.root"
            )


def _published_name(info: DataInfo, images: int) -> str:
    # Folders do not say what they hold; ImageNet's validation set has this size. Published figures are those of all of
    # it: with an image that could not be read there is nothing to compare.
    is_imagenet = (info.name, info.num_classes, images) == ("imagefolder", 1000, 50_000)
    return "imagenet" if is_imagenet else info.name
