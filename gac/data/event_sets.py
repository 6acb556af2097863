"""Event cameras' data sets through SpikingJelly: events that are counted into one frame for each time step."""

import hashlib
import logging
import math
import shutil
import tarfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from spikingjelly import configure
from torch import Tensor
from torchvision.datasets.utils import check_integrity

from gac.config import EVENT_SETS, DataConfig
from gac.data.arrays import ArraySet, Split
from gac.data.interface import DataInfo
from gac.data.normalization import pixel_statistics
from gac.data.npz import UNREADABLE
from gac.errors import InputError, first_few
from gac.files import user_path
from gac.memory import check_fits

if TYPE_CHECKING:
    from spikingjelly.datasets.base import NeuromorphicDatasetFolder

    _Opened = Mapping[str | None, NeuromorphicDatasetFolder]

logger = logging.getLogger("gac")

_OFFICIALLY_SPLIT = ("dvs128gesture",)
_SIZES = {"cifar10dvs": {"train": 9000, "test": 1000}, "dvs128gesture": {"train": 1176, "test": 288}}
_WHITE = 255
# What reading archives and converting what is in them raises for damaged ones.
_UNUSABLE = (*UNREADABLE, tarfile.TarError)


class _Sample(NamedTuple):
    """A file of events or of frames; ``name`` is class/file without the ending, the same for both."""

    name: str
    path: Path
    label: int


def load_event_set(
    config: DataConfig, frames: int | None, splits: Collection[str], trained_on: DataInfo | None = None
) -> ArraySet:
    """Return a data set of events as frames, uint8 [N, T, 2, H, W]: how many events of each polarity a pixel had.

    SpikingJelly downloads and converts the set in ``config.root`` where that has not been done, cuts the events of each
    sample into T parts of equal number, and keeps the frames beside them. T is ``frames``, or that of the data
    ``trained_on``. Counts of squares of ``config.event_pool`` pixels a side are added up; more than 255 count as 255.
    Mean and standard deviation are those of each polarity over all pixels and frames of the training samples, or those
    of ``trained_on``. DVS128 Gesture has an official split; the others are split by :func:`choose_test`.

    Raises:
        InputError: If the set is not there and cannot be downloaded, if files are damaged, or if it does not fit the
            memory.
    """
    if trained_on is not None and trained_on.frames is not None:
        frames = trained_on.frames
    if frames is None:
        raise InputError(f"data set {config.name} is cut into one frame for each time step: say how many there are")
    kind = _spikingjelly(config.name)
    height, width = kind.get_H_W()
    if height % config.event_pool or width % config.event_pool:
        common = math.gcd(height, width)
        allowed = ", ".join(str(side) for side in range(1, common + 1) if common % side == 0)
        raise InputError(
            f"data.event_pool {config.event_pool} does not divide the {height} x {width} pixels of {config.name}: take"
            f" one of {allowed}"
        )
    # As float64, in each thread that makes frames.
    check_fits(
        f"cutting samples of {config.name} into {frames} frames of {height} x {width}",
        configure.max_threads_number_for_datasets_preprocess * frames * 2 * height * width * 8,
        "choose a smaller model.T",
    )
    try:
        class_names, samples = _prepared(kind, config, frames)
    except PermissionError as error:
        raise InputError(f"{error.filename}: {error.strerror}; let this user read and write data.root") from error
    arrays: dict[str, Split] = {}
    needed = {*splits} if trained_on is not None else {*splits, "train"}
    for split in sorted(needed):
        shape = frames, 2, height // config.event_pool, width // config.event_pool
        images = _load(samples[split], shape, config, (height, width))
        arrays[split] = Split(images, torch.tensor([sample.label for sample in samples[split]]))
    mean, std = pixel_statistics(arrays["train"].images) if trained_on is None else (trained_on.mean, trained_on.std)
    if 0 in std:
        raise InputError(
            f"all pixels of polarity {std.index(0)} of {config.name} in {config.root} are equal, which cannot be"
            " normalised: look at the files in events_np"
        )
    return ArraySet(
        splits={split: arrays[split] for split in splits},
        num_classes=len(class_names),
        class_names=class_names,
        mean=mean,
        std=std,
        split=split_digest({split: [sample.name for sample in each] for split, each in samples.items()}),
    )


def choose_test(names: Sequence[str]) -> list[str]:
    """Return which samples of a class are the test samples: the tenth whose names have the smallest SHA-256.

    ``names`` are "class/file" without the file's ending. The tenth is rounded down, but is one sample at least. So the
    split is the same everywhere, and depends neither on other classes nor on a generator of random numbers; CIFAR10-DVS
    and N-Caltech101 come without one.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return ordered[: max(1, len(ordered) // 10)]


def split_digest(names: Mapping[str, Sequence[str]]) -> str:
    """Return a number that tells other splits of a set apart: SHA-256 of the lines "split class/file"."""
    lines = [f"{split} {name}\n" for split in sorted(names) for name in sorted(names[split])]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def warn_of_events(config: DataConfig, info: DataInfo) -> None:
    """Say what is legal but hardly meant with a set of events."""
    for split, size in (("train", info.train_size), ("test", info.test_size)):
        complete = _SIZES.get(config.name, {}).get(split, size)
        if size is not None and size != complete:
            logger.warning(
                "%s in %s has %d %s samples and the complete set %d: scores do not compare with those of others",
                *(config.name, config.root, size, split, complete),
            )
    if config.name == "dvs128gesture" and config.horizontal_flip and info.train_size is not None:
        logger.warning(
            "data.horizontal_flip makes a gesture of the left hand one of the right hand, which is another class of"
            " dvs128gesture: set it to false"
        )


def _spikingjelly(name: str) -> type["NeuromorphicDatasetFolder"]:
    # Importing them takes more than a second, as audio and plots come along.
    from spikingjelly.datasets import CIFAR10DVS, DVS128Gesture, NCaltech101

    return dict(zip(EVENT_SETS, (CIFAR10DVS, DVS128Gesture, NCaltech101), strict=True))[name]


def _prepared(
    kind: type["NeuromorphicDatasetFolder"], config: DataConfig, frames: int
) -> tuple[tuple[str, ...], dict[str, list[_Sample]]]:
    """Return the classes and, for each split, the files of frames, made now if they are not there."""
    root = user_path(config.root, "data.root")
    classes, of_events = _divided(_events(kind, config, root), root / "events_np")
    folder = root / f"frames_number_{frames}_split_by_number"
    is_new = not folder.exists()
    if is_new:
        logger.info("%s: cutting each sample into %d frames, once, into %s", config.name, frames, folder)
    _check_finished(folder, folder)
    try:
        opened = _open(kind, config, root, {"data_type": "frame", "frames_number": frames, "split_by": "number"})
    except _UNUSABLE as error:
        _check_own(error, folder)
        if not is_new:
            raise InputError(f"{folder}: {error}; delete it, and it is made again") from error
        # SpikingJelly has tried all files before it says that one of them failed.
        done = {path.relative_to(folder) for path in folder.rglob("*.npz")}
        events = root / "events_np"
        files = [sample.path for split in of_events.values() for sample in split]
        bad = [str(path) for path in files if path.relative_to(events) not in done]
        shutil.rmtree(folder, ignore_errors=True)
        _marker(folder).unlink(missing_ok=True)
        raise InputError(
            f"{first_few(bad) or root} cannot be cut into frames: {error}; files of events have arrays t, x, y and p,"
            " and the disk has to have room for the frames"
        ) from error
    _, of_frames = _divided(opened, folder)
    names = [
        {split: [sample.name for sample in each] for split, each in files.items()} for files in (of_events, of_frames)
    ]
    if names[0] != names[1]:
        raise InputError(
            f"{folder} was made of other files than those in {root / 'events_np'}: delete it, and it is made again"
        )
    return classes, of_frames


def _events(kind: type["NeuromorphicDatasetFolder"], config: DataConfig, root: Path) -> "_Opened":
    """Return the files of events, made now from the archives of the set if they are not there."""
    events, archives, extracted = (root / name for name in ("events_np", "download", "extract"))
    can_download = kind.downloadable() and config.download
    if can_download:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"data.root {root} cannot be made: {error.strerror}; choose another one") from error
    is_new = not events.exists()
    missing = []
    if is_new and not _marker(events).exists():
        files = kind.resource_url_md5()
        missing = [(name, url) for name, url, md5 in files if not check_integrity(archives / name, md5)]
        if missing and not can_download:
            how = " or give --data.download true" if kind.downloadable() else " (SpikingJelly cannot download them)"
            raise InputError(
                f"data set {config.name} is not in {root}: name the folder that holds its events_np with --data.root,"
                f" or put its archives into {archives}{how}; missing there or damaged: {_sources(missing)}"
            )
        logger.info("%s: making %s of the archives, once; that takes a while", config.name, events)
    _check_finished(events, events, extracted)
    try:
        return _open(kind, config, root, {})
    except _UNUSABLE as error:
        _check_own(error, events)
        if not is_new:
            where = " in each of train and test" if config.name in _OFFICIALLY_SPLIT else ""
            raise InputError(
                f"{events}: {error}; it needs one folder for each class{where}, of files with the arrays t, x, y and p"
            ) from error
        if extracted.exists() or events.exists():
            remedy = f"delete {_marker(events)} and what there is of {events} and {extracted}, and start again"
        else:
            # Only archives have been written so far, and they are checked before they are used.
            _marker(events).unlink(missing_ok=True)
            remedy = f"start again{f', or put by hand into {archives} {_sources(missing)}' if missing else ''}"
        raise InputError(f"data set {config.name} could not be made in {root}: {error}; {remedy}") from error


def _marker(made: Path) -> Path:
    """Return the file that is there while SpikingJelly makes a folder."""
    return made.with_name(f"{made.name}.building")


def _check_finished(made: Path, *parts: Path) -> None:
    """Raise InputError if SpikingJelly's mark says that a folder is being made, or was when something stopped it."""
    marker = _marker(made)
    if marker.exists():
        raise InputError(
            f"{made} was not finished, or another process is making it: unless one is, delete {marker} and what there"
            f" is of {' and '.join(map(str, parts))}, and start again"
        )


def _check_own(error: Exception, made: Path) -> None:
    """Raise InputError if an error is that another process has begun to make a folder, which is not to be touched."""
    if str(_marker(made)) in str(error):
        raise InputError(f"another process has begun to make {made}: wait until it has ended") from error


def _sources(missing: Sequence[tuple[str, str]]) -> str:
    """Return names of archives and the addresses that SpikingJelly knows for them, in words."""
    if len({url for _, url in missing}) == 1:
        return f"{', '.join(name for name, _ in missing)} from {missing[0][1]}"
    return first_few([f"{name} from {url}" for name, url in missing])


def _open(
    kind: type["NeuromorphicDatasetFolder"], config: DataConfig, root: Path, options: Mapping[str, object]
) -> "_Opened":
    """Let SpikingJelly make what is missing, and return the set: in its splits, or under None if it has none."""
    if config.name in _OFFICIALLY_SPLIT:
        return {split: kind(root, train=split == "train", **options) for split in ("train", "test")}
    return {None: kind(root, **options)}


def _divided(opened: "_Opened", folder: Path) -> tuple[tuple[str, ...], dict[str, list[_Sample]]]:
    """Return the classes, and the files of each split by class and name."""
    first, *others = ((tuple(each.classes), _samples(each)) for each in opened.values())
    classes, samples = first
    if others:
        if others[0][0] != classes:
            raise InputError(f"train and test in {folder} have to have the same class folders")
        return classes, {"train": samples, "test": others[0][1]}
    test: set[str] = set()
    for label, name in enumerate(classes):
        of_class = [sample.name for sample in samples if sample.label == label]
        if len(of_class) < 2:
            raise InputError(f"class {name} in {folder} needs two samples, one to train on and one to test")
        test |= {*choose_test(of_class)}
    return classes, {
        "train": [sample for sample in samples if sample.name not in test],
        "test": [sample for sample in samples if sample.name in test],
    }


def _samples(opened: "NeuromorphicDatasetFolder") -> list[_Sample]:
    paths = [(Path(path), label) for path, label in opened.samples]
    return [_Sample(path.relative_to(opened.root).with_suffix("").as_posix(), path, label) for path, label in paths]


def _load(
    samples: Sequence[_Sample], shape: tuple[int, int, int, int], config: DataConfig, sensor: tuple[int, int]
) -> Tensor:
    """Return the frames of all samples, uint8 [N, *shape]."""
    from spikingjelly.datasets.utils import load_npz_frames

    check_fits(
        f"data set {config.name}, {len(samples)} samples of {shape[0]} frames of {shape[2]} x {shape[3]}",
        len(samples) * math.prod(shape),
        "choose a larger data.event_pool or a smaller model.T",
    )
    images = torch.empty(len(samples), *shape, dtype=torch.uint8)
    side = config.event_pool

    def load(number: int) -> int:
        """Fill in a sample and return how many of its counts were too large."""
        path = samples[number].path
        try:
            counts = load_npz_frames(path)
        except _UNUSABLE as error:
            raise InputError(
                f"{path} cannot be read ({error}): delete its frames_number folder, and it is made again"
            ) from error
        if counts.shape != (*shape[:2], *sensor):
            raise InputError(
                f"{path} has frames of shape {list(counts.shape)}, not {[*shape[:2], *sensor]}: delete its"
                " frames_number folder, and it is made again"
            )
        counts = counts.reshape(*shape[:3], side, shape[3], side).sum((3, 5))
        images[number] = torch.from_numpy(counts.clip(0, _WHITE).astype(np.uint8))
        return int((counts > _WHITE).sum())

    with ThreadPoolExecutor(configure.max_threads_number_for_datasets_preprocess) as pool:
        clipped = sum(pool.map(load, range(len(samples))))
    if clipped:
        logger.info(
            "%s: %d of %d counts of events are above %d and taken for it", config.name, clipped, images.numel(), _WHITE
        )
    return images
