"""From the configuration to loaders."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from gac.config import EVENT_SETS, DataConfig
from gac.data.arrays import ArrayLoader, ArraySet
from gac.data.augment import Augmentation, Compose, CropAndFlip, Cutout, Erasing, Policy, Roll, mean_color
from gac.data.interface import WHOLE, Data, DataInfo, Loader, Shard, digest
from gac.data.normalization import Normalization
from gac.data.npz import load_npz
from gac.data.synthetic import load_synthetic
from gac.errors import InputError, first_few

logger = logging.getLogger("gac")

_SPLITS = ("train", "test")


def build_data(
    config: DataConfig,
    *,
    device: torch.device | str,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    normalize: bool = True,
    splits: Collection[Literal["train", "test"]] = _SPLITS,
    shard: Shard = WHOLE,
    trained_on: DataInfo | None = None,
    unlabelled: bool = False,
    frames: int | None = None,
) -> Data:
    """Open a data set and make the loaders of the splits asked for.

    Training batches are shuffled and augmented as functions of ``seed`` and the position in the run; test
    batches are the images in their fixed order. ``normalize`` subtracts the set's mean and divides by its
    standard deviation, both in ``info``; without it images are intensities in [0, 1], which rate, latency and
    phase coding need. With ``splits=("test",)`` the training images need not be there. Batch sizes are those of
    all ranks together; of each batch the loaders yield ``shard``. A network sees images as it was trained: with
    ``trained_on`` images are normalised by that mean and std, and a test set need not say them, nor its classes. With
    ``unlabelled`` a folder of images without class folders is taken too; ``info`` then says 0 classes. Sets of events
    are cut into as many frames as in ``trained_on``, else into ``frames``: one for each time step.

    Raises:
        InputError: If files are missing or damaged, or an argument is out of range.
    """
    _check_arguments(batch_size, eval_batch_size, seed, splits)
    device = torch.device(device)
    if config.name == "imagefolder":
        # Not imported above, here and below: torchvision and scikit-learn take longer than this package.
        from gac.data import class_folders, image_folder

        folders = class_folders.open_folders(config.root, splits, unlabelled)
        info = image_folder.describe(config, folders)
    else:
        arrays = _load_arrays(config, splits, trained_on, frames)
        info = _arrays_info(config, arrays, splits)
    if trained_on is not None and trained_on.channels == info.channels:
        info = replace(info, mean=trained_on.mean, std=trained_on.std)
    if shard.rank == 0:
        _warn_of_labels(
            info,
            {split: folders[split].labels for split in splits}
            if config.name == "imagefolder"
            else {split: arrays.splits[split].labels.numpy() for split in splits},
        )
        if "train" in splits:
            _warn_of_options(config)
        if config.name in EVENT_SETS:
            from gac.data.event_sets import warn_of_events

            warn_of_events(config, info)
    if not normalize:
        info = replace(info, mean=(0.0,) * info.channels, std=(1.0,) * info.channels)
    normalization = Normalization(info.mean, info.std, device)

    def loader(split: str) -> Loader | None:
        if split not in splits:
            return None
        training = split == "train"
        options = {
            "batch_size": batch_size if training else eval_batch_size,
            "normalization": normalization,
            "device": device,
            "seed": seed,
            "shuffle": training,
            "shard": shard,
        }
        if config.name == "imagefolder":
            if training:
                transform = image_folder.train_transform(config, info.mean)
            else:
                transform = image_folder.evaluation_transform(config)
            options |= {"workers": config.workers, "replace_unreadable": training}
            return image_folder.ImageFolderLoader(folders[split], transform, **options)
        augment = _augmentation(config, info.mean) if training else None
        return ArrayLoader(arrays.splits[split], augment=augment, **options)

    return Data(train=loader("train"), test=loader("test"), info=info)


def _warn_of_labels(info: DataInfo, labels: Mapping[str, np.ndarray]) -> None:
    """Say what is legal but hardly meant."""
    if info.num_classes == 1:
        logger.warning("data set %s has a single class: every network scores 100 %%", info.name)
    for split, kind in (("train", "training"), ("test", "test")):
        if split not in labels:
            continue
        missing = np.setdiff1d(np.arange(info.num_classes), labels[split])
        if split == "train" and missing.tolist() == [0]:
            logger.warning("no training image has the label 0: if the labels count from 1, subtract 1")
        elif len(missing):
            few = first_few([repr(info.class_names[k]) if info.class_names else str(k) for k in missing])
            logger.warning("%d of the %d classes have no %s images: %s", len(missing), info.num_classes, kind, few)


def _warn_of_options(config: DataConfig) -> None:
    """Say which options were set and are none of this data set's."""
    for option, does_nothing in (
        ("roll", config.roll != 0 and config.name == "imagefolder"),
        ("event_pool", config.event_pool != 1 and config.name not in EVENT_SETS),
    ):
        if does_nothing:
            logger.warning("data.%s %d does nothing with data.name %s", option, getattr(config, option), config.name)


def _check_arguments(batch_size: int, eval_batch_size: int, seed: int, splits: Collection[str]) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("eval_batch_size", eval_batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}; got {value}")
    if not splits or not set(splits) <= set(_SPLITS):
        raise InputError(f"splits must be train, test or both; got {', '.join(splits) or 'none'}")


def _load_arrays(
    config: DataConfig, splits: Collection[str], trained_on: DataInfo | None, frames: int | None
) -> ArraySet:
    match config.name:
        case "digits":
            from gac.data.digits import load_digits

            return load_digits()
        case "cifar10" | "cifar100":
            from gac.data.cifar import load_cifar

            return load_cifar(config.name, config.root, download=config.download, splits=splits)
        case "npz":
            return load_npz(config.root, splits, trained_on)
        case name if name in EVENT_SETS:
            from gac.data.event_sets import load_event_set

            return load_event_set(config, frames, splits, trained_on)
        case "synthetic":
            return load_synthetic(
                images=config.synthetic_images,
                classes=config.synthetic_classes,
                image_size=config.image_size,
            )
        case _:
            raise AssertionError(f"{config.name} is not held as arrays")


def _augmentation(config: DataConfig, mean: Sequence[float]) -> Augmentation | None:
    steps: list[Augmentation] = []
    if config.crop_padding or config.horizontal_flip:
        steps.append(CropAndFlip(config.crop_padding, config.horizontal_flip))
    if config.roll:
        steps.append(Roll(config.roll))
    if config.augment != "off":
        if len(mean) not in (1, 3):
            raise InputError(
                f"data.augment {config.augment} is for grey or RGB images, and data set {config.name} has {len(mean)}"
                " channels: set data.augment to off"
            )
        steps.append(Policy(config.augment, config.augment_group))
    if config.cutout:
        steps.append(Cutout(config.cutout, mean_color(mean)))
    if config.random_erasing > 0:
        steps.append(Erasing(config.random_erasing, mean_color(mean)))
    return Compose(steps) if steps else None


def _arrays_info(config: DataConfig, arrays: ArraySet, splits: Collection[str]) -> DataInfo:
    sizes = {split: len(arrays.splits[split].labels) for split in splits}
    *frames, channels, height, width = next(iter(arrays.splits.values())).images.shape[1:]
    return DataInfo(
        name=config.name,
        num_classes=arrays.num_classes,
        channels=channels,
        height=height,
        width=width,
        class_names=arrays.class_names,
        train_size=sizes.get("train"),
        test_size=sizes.get("test"),
        mean=arrays.mean,
        std=arrays.std,
        train_labels=digest(arrays.splits["train"].labels.numpy()) if "train" in splits else None,
        frames=frames[0] if frames else None,
        split=arrays.split,
    )
