"""What eval.py measures and prints."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gac.checkpoint import FixedT, build_network, is_ours
from gac.config import Config
from gac.data import Data, DataInfo, build_data
from gac.data.interface import check_readable, repeated_name
from gac.errors import InputError, quoted
from gac.evaluation.evaluate import Evaluation, EvaluationStep, evaluate
from gac.evaluation.predictions import ClassScore, Predictions, gather
from gac.evaluation.published import PublishedResult, find_published
from gac.evaluation.sample import Collector, Sample, affordable
from gac.execution import random_state
from gac.execution.cuda_graph import check_capturable, select_graphs
from gac.execution.device import check_precision, describe_precision, memory_format, select_device
from gac.execution.distributed import SINGLE_PROCESS, Ranks, shared_fields
from gac.execution.environment import describe_backend
from gac.execution.footprint import check_evaluation
from gac.models.ms_resnet import MSResNet
from gac.version import versions

logger = logging.getLogger("gac")


@dataclass(frozen=True)
class Unscored:
    """What is measured on images without labels."""

    images: int
    images_per_second: float


@dataclass(frozen=True)
class Report:
    """The scores of a checkpoint's network, and what was measured where."""

    checkpoint: str
    epoch: int | None
    weights: str | None
    """"raw" for the trained weights, "ema" for their moving average; None for files that do not say."""
    T: int
    num_classes: int
    parameters: int
    coding: str
    data: str
    device: str
    precision: str
    backend: str
    """What ran the neurons: "cupy", "c" or "torch"."""
    backend_reason: str
    trained_backend: str | None
    """The same in training; None for files that do not say."""
    scores: Evaluation | Unscored
    published: PublishedResult | None
    classes: list[ClassScore] | None
    """In the order of their numbers in the network; None for images without labels, as is ``confusion``."""
    confusion: list[list[int]] | None
    """[label, prediction, number of images] for every pair of class numbers that occurs."""
    config: dict[str, Any]
    versions: dict[str, str]
    predictions: Predictions
    class_names: list[str]
    """Names of the network's classes, or their numbers where it does not know them."""
    sample: Sample | None
    """The network and the images that were kept, if any were asked for; those of this rank."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, without the single predictions and the sample."""
        values = asdict(replace(self, predictions=None, sample=None))
        del values["predictions"], values["class_names"], values["sample"]
        return values

    def write_predictions(self, file: BinaryIO) -> None:
        """Write the class of each image as CSV."""
        self.predictions.write_csv(file, self.class_names, labelled=self.classes is not None)


def evaluate_checkpoint(
    path: Path,
    payload: dict[str, Any],
    config: Config,
    asked: Mapping[str, Any] = MappingProxyType({}),
    ranks: Ranks = SINGLE_PROCESS,
    *,
    amp: str | None = None,
    unlabelled: bool = False,
    sample: int = 0,
) -> Report:
    """Score the network of a checkpoint on a test set.

    Args:
        path: The checkpoint, for messages.
        payload: Its content, from ``read_checkpoint``.
        config: The data set and the device; for our checkpoints the training run's with overrides applied.
        asked: coding and neuron as :func:`gac.checkpoint.build_network` takes them, where the file does not say, and
            T, the number of time steps to score. Where the T of training is part of the network (gated attention,
            latency, phase) these are the first of its outputs; else it runs for so many.
        ranks: The processes that share the images; each of them gets the report.
        amp: The precision asked for; None for that of the training run, but float32 for fp16 on a device that does not
            compute in it.
        unlabelled: Whether images without labels are taken, which are not scored.
        sample: Keep up to so many of the images, evenly spread over the test set, with the network.

    Raises:
        InputError: If the network does not fit the data set, or one of them cannot be used.
    """
    ranks.check_equal(shared_fields(config) | {f"model.{name}": value for name, value in asked.items()})
    opened = ranks.together(
        lambda: open_evaluation(path, payload, config, asked, ranks, amp, unlabelled), config.data.writes_files
    )
    device, network, data, labels, names = opened
    steps = asked.get("T", network.T)
    ranks.check_equal({"test images": data.test.size, "classes": data.info.num_classes})
    ours = is_ours(payload)
    batches = data.test.epoch(0)
    if labels is not None:
        batches = as_trained(batches, torch.tensor(labels, device=device))
    classes = []
    collector = None
    if sample:
        collector = Collector(affordable(sample, data.info, device), data.test.size // ranks.size, classes)
        batches = collector.watch(batches)
    if amp is None:
        amp = config.train.amp if ours and (config.train.amp != "fp16" or device.type == "cuda") else "off"
    if device.type == "cpu":
        ranks.together(lambda: check_evaluation(network, data, config.train, ranks, amp))
    # Rate coding must not draw the same numbers for the images of every rank.
    with random_state.own_of_rank(ranks, device, config.train.seed, ranks.rank):
        # "auto" is for training: one pass over a test set is too short to be worth captures.
        graphs = select_graphs(config.train.cuda_graph is True, device)
        step = EvaluationStep(network, device, amp, config.train.channels_last, graphs, steps)
        scores = evaluate(step, batches, ranks, classes)
    ranks.together(lambda: check_readable("test", data.test.size - scores.images, data.test.size))
    predictions = gather(data.test.yielded(), classes, ranks)
    precision = describe_precision(device, amp)
    ranks.together(lambda: _check_finite(path, predictions, precision))
    is_labelled = data.info.num_classes > 0
    published = find_published(network, _published_name(data.info, scores.images)) if steps == network.T else None
    kept = None
    if collector is not None and collector.places:
        images = *collector.images_and_labels(), collector.places, collector.mistakes
        run = device, amp, step.order, config.train.eval_batch_size, config.train.seed
        kept = Sample(network.eval(), *images, data.info, *run, steps, ranks.size)
    return Report(
        checkpoint=str(path),
        epoch=payload.get("epoch") if ours else None,
        weights=payload.get("weights") if ours else None,
        T=steps,
        num_classes=network.num_classes,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        coding=network.coding_name,
        data=data.info.name,
        device=str(device) if ranks.size == 1 else f"{ranks.size} x {device.type}",
        precision=precision,
        **describe_backend(network, device),
        trained_backend=payload.get("backend") if ours else None,
        scores=scores if is_labelled else Unscored(scores.images, scores.images_per_second),
        published=published if is_labelled else None,
        classes=predictions.by_class(names) if is_labelled else None,
        confusion=predictions.confusion() if is_labelled else None,
        # The authors' files do not hold the configuration that they were trained with.
        config=config.to_dict() if ours else {"data": asdict(config.data), "device": config.device},
        versions=versions(),
        predictions=predictions,
        class_names=names,
        sample=kept,
    )


def open_evaluation(
    path: Path,
    payload: dict[str, Any],
    config: Config,
    asked: Mapping[str, Any],
    ranks: Ranks,
    amp: str | None,
    unlabelled: bool,
) -> tuple[torch.device, MSResNet, Data, list[int] | None, list[str]]:
    """Return the device, the network on it, the data set, the network's label for each of its labels, and class names.

    The labels are None where they mean the same. Raises InputError.
    """
    device = select_device(config.device, ranks)
    check_precision(device, amp)
    if config.train.cuda_graph is True:
        check_capturable(config.model)
    try:
        network = _build(payload, asked)
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from error
    network.set_backend(config.model.backend)
    trained_on = _trained_on(path, payload, network)
    if trained_on is None:
        logger.warning(
            "checkpoint %s does not say its classes and normalisation: those of the evaluated data set are used", path
        )
    data = build_data(
        config.data,
        device=device,
        batch_size=config.train.batch_size,
        eval_batch_size=config.train.eval_batch_size,
        seed=config.train.seed,
        normalize=config.model.takes_normalized_images,
        splits=("test",),
        shard=ranks.shard,
        trained_on=trained_on,
        unlabelled=True,
        frames=network.T,
    )
    is_labelled = data.info.num_classes > 0
    if not is_labelled and not unlabelled:
        raise InputError(
            f"{config.data.root} holds images and no folders, so that their classes are not known: write what they are"
            " taken for with --predictions FILE.csv, or name a folder that has val with a folder for each class"
        )
    if not is_labelled:
        logger.info("%s: %d images without labels, to be classified and not scored", config.data.root, data.test.size)
    if network.coding_name == "direct" and "T" in asked and asked["T"] < (data.info.frames or 0):
        # As with a T that is part of the network: the outputs do not depend on later frames.
        network.T = data.info.frames
        logger.info("running all %d time steps and scoring the first %d", network.T, asked["T"])
    _check_fit(path, network, data.info)
    labels = None
    if trained_on is not None:
        if None not in (trained_on.split, data.info.split) and trained_on.split != data.info.split:
            raise InputError(
                f"checkpoint {path} was trained with another split of {trained_on.name}, so that test samples may be"
                " among those it was trained on: name a folder with the samples that the set had then with --data.root"
            )
        try:
            labels = trained_on.labels_of(data.info) if is_labelled else None
        except InputError as error:
            raise InputError(
                f"checkpoint {path} is for other classes than data set {data.info.name} has: {error}; name the data set"
                " it was trained on with --data.name and --data.root"
            ) from None
        if labels is not None:
            logger.warning("the classes of %s are in another order than in training: taken by name", data.info.name)
        sizes = [info.shape for info in (data.info, trained_on)]
        if sizes[0] != sizes[1]:
            logger.warning("the images of %s have %s pixels, those of training had %s", data.info.name, *sizes)
    names = class_names(network, trained_on, data.info)
    return device, network.to(device, memory_format=memory_format(config.train, device)), data, labels, names


def class_names(network: MSResNet, *known: DataInfo | None) -> list[str]:
    """Return the names that the first of the sets gives to the network's classes, or the numbers of these."""
    names = next((each.class_names for each in known if each is not None and each.class_names), None)
    if names is not None and (repeated := repeated_name(names)) is not None:
        logger.warning("several classes are called %r: classes are named by their numbers", repeated)
        names = None
    return list(names or map(str, range(network.num_classes)))


def _check_finite(path: Path, predictions: Predictions, precision: str) -> None:
    """Raise InputError if an output was infinite or not a number, which has no class."""
    if not np.isfinite(predictions.probabilities).all():
        images = np.flatnonzero(~np.isfinite(predictions.probabilities).all(1))
        raise InputError(
            f"checkpoint {path}: the outputs for {len(images)} of {len(predictions.images)} images are not finite in"
            f" {precision}, {predictions.images[images[0]]} the first of them: evaluate with --train.amp off, or"
            " another checkpoint"
        )


def _build(payload: dict[str, Any], asked: Mapping[str, Any]) -> MSResNet:
    """Return the network; its T is that of training where it is part of the network. Raises InputError."""
    try:
        return build_network(payload, **asked)
    except FixedT as fixed:
        if "T" not in asked or asked["T"] > fixed.T:
            raise
    network = build_network(payload, **{name: value for name, value in asked.items() if name != "T"})
    logger.info("running all %d time steps and scoring the first %d", network.T, asked["T"])
    return network


def _trained_on(path: Path, payload: dict[str, Any], network: MSResNet) -> DataInfo | None:
    """Return what a checkpoint says about the data of its training; files of the authors and old ones say nothing."""
    if not is_ours(payload) or "data" not in payload:
        return None
    try:
        info = DataInfo.from_dict(payload["data"])
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from error
    if info.num_classes != network.num_classes:
        raise InputError(
            f"checkpoint {path}: its entry data says {info.num_classes} classes, and its weights are of"
            f" {network.num_classes}"
        )
    return info


def as_trained(batches: Iterable[tuple[Tensor, Tensor]], labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images [B, C, H, W] with ``labels[k]`` in place of each label k of [B]."""
    for images, found in batches:
        yield images, labels[found]


def format_report(report: Report) -> str:
    """Return the report as a small table."""
    scores = report.scores
    if isinstance(scores, Unscored):
        what = f"{scores.images} images without labels"
        accuracies = []
    else:
        what = f"{scores.images} test images"
        accuracies = [
            ("top-1", f"{scores.top1:6.2f} %  ({scores.correct} of {scores.images} right)"),
            *((f"  t = 1..{t}", f"{top1:6.2f} %") for t, top1 in enumerate(scores.top1_by_time, 1)),
            (f"top-{min(5, report.num_classes)}", f"{scores.top5:6.2f} %"),
            ("loss", f"{scores.loss:.4f}"),
        ]
    average = ", moving average of the weights" if report.weights == "ema" else ""
    backend = "" if report.trained_backend is None else f", trained with backend {quoted(report.trained_backend)}"
    epoch = "" if report.epoch is None else f" (after epoch {report.epoch}{average}{backend})"
    rows = [
        ("checkpoint", f"{report.checkpoint}{epoch}"),
        ("network", f"{report.parameters / 1e6:.3f} M parameters, {report.coding} coding, T={report.T}"),
        ("data", f"{report.data}, {what}, {report.num_classes} classes"),
        ("run", f"{report.precision} on {report.device}, {scores.images_per_second:.0f} images/s"),
        ("backend", f"{report.backend} ({report.backend_reason})"),
        *accuracies,
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
        ("time steps", network.T, info.frames or network.T),
        # Images without labels have none.
        ("classes", network.num_classes, info.num_classes or network.num_classes),
        ("image channels", network.in_channels, info.channels),
    ):
        if has != needs:
            raise InputError(
                f"checkpoint {path} is for {has} {what}, data set {info.name} has {needs}:"
                " name the data set it was trained on with --data.name and --data.root"
            )


def _published_name(info: DataInfo, images: int) -> str:
    # A folder does not say what it holds; ImageNet's validation set has this size. Published results are for all of
    # it, so that a test set without the unreadable images is not compared.
    is_imagenet = (info.name, info.num_classes, images) == ("imagefolder", 1000, 50_000)
    return "imagenet" if is_imagenet else info.name
