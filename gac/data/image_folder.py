"""Image sets too large for the device's memory: one folder per class, decoded by worker processes."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

from gac.config import DataConfig
from gac.data.augment import make_policy, mean_color
from gac.data.class_folders import ClassFolders
from gac.data.interface import TOLERATED_PERCENT, WHOLE, DataInfo, Shard, check_start, digest, tolerated
from gac.data.normalization import Normalization
from gac.data.npz import UNREADABLE
from gac.data.seeding import Stream, derive_seed, epoch_order
from gac.data.transfer import copy_ahead
from gac.errors import InputError

logger = logging.getLogger("gac")

# Tags of TIFF files.
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _SIGNED = 258, 339, 2
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def describe(config: DataConfig, folders: Mapping[str, ClassFolders]) -> DataInfo:
    """Return what the loaders of these folders yield; 0 classes for images without labels."""
    sizes = {split: len(folder) for split, folder in folders.items()}
    class_names = next(iter(folders.values())).class_names
    return DataInfo(
        name=config.name,
        num_classes=len(class_names),
        channels=3,
        height=config.image_size,
        width=config.image_size,
        class_names=class_names or None,
        train_size=sizes.get("train"),
        test_size=sizes.get("test"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        train_labels=digest(folders["train"].labels) if "train" in folders else None,
    )


def train_transform(config: DataConfig, mean: Sequence[float] = IMAGENET_MEAN) -> v2.Transform:
    """Random resized crop, then flip, policy and erasing as configured: PIL image to uint8 [3, size, size].

    Erased rectangles get the colour ``mean``, in units where white is 1.
    """
    steps: list[v2.Transform] = [v2.RandomResizedCrop(config.image_size)]
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.augment != "off":
        steps.append(make_policy(config.augment))
    steps.append(v2.PILToTensor())
    if config.random_erasing > 0:
        steps.append(v2.RandomErasing(config.random_erasing, value=mean_color(mean)))
    return v2.Compose(steps)


def evaluation_transform(config: DataConfig) -> v2.Transform:
    """Resize to the shorter side, then centre crop: PIL image to uint8 [3, size, size]."""
    return v2.Compose([v2.Resize(config.resize), v2.CenterCrop(config.image_size), v2.PILToTensor()])


def read_image(path: str) -> Image.Image:
    """Return an image file in RGB, 8 bits a channel; black and white are those of the file's own type of numbers.

    Grey images of 16 or 32 bits keep their range (Pillow's conversion would cut it off at 255); floating-point ones
    range from 0 to 1. As in torchvision, a turn that EXIF data ask for is not made and of several frames the first
    one counts.

    Raises:
        ValueError: If floating-point values are outside [0, 1].
        One of UNREADABLE, Image.DecompressionBombError: If the file is damaged or no image; it depends on the format.
    """
    with Image.open(path) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            return Image.fromarray(np.rint(255 * _brightness(image)).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def _brightness(image: Image.Image) -> np.ndarray:
    """Return a grey image of more than 8 bits as numbers from 0 (black) to 1 (white). Raises ValueError for others."""
    pixels, white = np.asarray(image), 1.0
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode != "F":
        # Where the format has no 32-bit numbers Pillow holds 16-bit ones in the mode for 32 bits.
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
        if bits == 32 and not signed:
            pixels = pixels.view(np.uint32)
        white = 2 ** (bits - signed) - 1
    # NaN is not in the range either.
    if not (pixels.min() >= 0 and pixels.max() <= white):
        raise ValueError(f"its values are not all from 0 to {white}")
    # Pillow turns this round in images of 8 bits only.
    return 1 - pixels / white if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else pixels / white


class _Unreadable(NamedTuple):
    """An image that could not be decoded.

    A value and no exception: DataLoader would raise that again with the worker's traceback as its message.
    """

    number: int
    reason: str
    replaced: bool


class _Sample(NamedTuple):
    image: Tensor | None
    label: int
    unreadable: _Unreadable | None


class _Batch(NamedTuple):
    """Images, uint8 [B, 3, H, W], labels, int64 [B], and which of the images asked for could not be decoded."""

    images: Tensor
    labels: Tensor
    unreadable: list[_Unreadable]


class _Images(Dataset):
    """Decoded images with their labels; the key is (epoch, image number).

    The epoch comes with the key because workers that outlive an epoch hold a copy of this object. An image that cannot
    be decoded is replaced, together with its label, by the first image that can be decoded among the next
    ``substitutes`` in the folders' order, which starts again after the last image.
    """

    def __init__(self, folders: ClassFolders, transform: v2.Transform, seed: int, substitutes: int) -> None:
        self.folders = folders
        self.transform = transform
        self.seed = seed
        self.substitutes = substitutes

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        epoch, number = key
        image = self._decode(number)
        if isinstance(image, Image.Image):
            return _Sample(self._transform(image, epoch, number), int(self.folders.labels[number]), None)
        for step in range(1, self.substitutes + 1):
            other = (number + step) % len(self)
            substitute = self._decode(other)
            if isinstance(substitute, Image.Image):
                unreadable = _Unreadable(number, image, replaced=True)
                return _Sample(self._transform(substitute, epoch, number), int(self.folders.labels[other]), unreadable)
        return _Sample(None, -1, _Unreadable(number, image, replaced=False))

    def _decode(self, number: int) -> Image.Image | str:
        """Return an image in RGB, or why it cannot be decoded."""
        try:
            return read_image(os.fsdecode(self.folders.paths[number]))
        except UnidentifiedImageError:
            return "not an image of a known format"
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            return getattr(error, "strerror", None) or " ".join(str(error).split())

    def _transform(self, image: Image.Image, epoch: int, number: int) -> Tensor:
        # The transforms draw from torch's global generator; without workers that is also the training's.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, Stream.SAMPLE_AUGMENTATION, epoch, number))
            return self.transform(image)


def _collate(samples: Sequence[_Sample]) -> _Batch:
    images = [sample.image for sample in samples if sample.image is not None]
    labels = [sample.label for sample in samples if sample.image is not None]
    return _Batch(
        # Writes into memory that the processes share, which torch.stack would not.
        default_collate(images) if images else torch.empty(0, dtype=torch.uint8),
        torch.tensor(labels, dtype=torch.int64),
        [sample.unreadable for sample in samples if sample.unreadable is not None],
    )


def _outlive_signals(worker: int) -> None:
    """Let a worker survive a Ctrl-C or SIGTERM that is sent to the whole process group.

    The training process needs it to finish the current batch. A SIGTERM from that process itself still ends the
    worker: DataLoader and multiprocessing fall back on it, and multiprocessing would wait forever at exit. Where the
    system does not tell who sent a signal, as on macOS and Windows, every SIGTERM ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Let a signal wait until the end of the context; on Windows it does nothing."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_when_told_by(parent: int) -> None:
    # A signal handler would not learn who sent the signal.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


class _Batches(Sampler[list[tuple[int, int]]]):
    """Keys of ``shard`` of the batches ``start, start + 1, ...`` of ``epoch``, both set before each iteration."""

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool, shard: Shard) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.shard = shard
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.epoch, self.start
        order = epoch_order(self.size, self.seed, epoch) if self.shuffle else torch.arange(self.size)
        for part in self.shard.parts(order[start * self.batch_size :], self.batch_size):
            yield [(epoch, number) for number in part]


class ImageFolderLoader:
    """A :class:`gac.data.Loader` whose images are decoded by ``workers`` processes (0: by this one).

    With ``shuffle`` the order is a function of (seed, epoch), otherwise it is the folder's; random transforms
    are functions of (seed, epoch, image number), whichever worker applies them. Batches travel as bytes and
    are normalised on the device. The workers serve one iteration at a time: beginning an epoch ends an
    unfinished one.

    An image that cannot be decoded is named in a warning, once, and counted in ``skipped``. With
    ``replace_unreadable`` the next image in the folders' order that can be decoded takes its place, which depends only
    on the image number; otherwise its batch is smaller, and an empty batch is not yielded. An epoch raises InputError
    as soon as more images than tolerated could not be decoded. Each rank counts its own images; their sum is checked
    at the end of the epoch (:func:`gac.data.interface.check_readable`).
    """

    def __init__(
        self,
        folders: ClassFolders,
        transform: v2.Transform,
        *,
        batch_size: int,
        workers: int,
        normalization: Normalization,
        device: torch.device,
        seed: int,
        shuffle: bool,
        replace_unreadable: bool,
        shard: Shard = WHOLE,
    ) -> None:
        self.size = len(folders)
        self.device = device
        self.normalization = normalization
        self._folders = folders
        self._replace = replace_unreadable
        self._tolerated = tolerated(self.size)
        self._named: set[int] = set()
        self._unreadable: list[int] = []
        self._batches = _Batches(self.size, batch_size, seed, shuffle, shard)
        self._loader = DataLoader(
            # Among so many images and one more at least one is readable, unless the set is broken.
            _Images(folders, transform, seed, substitutes=self._tolerated if replace_unreadable else 0),
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            collate_fn=_collate,
            worker_init_fn=_outlive_signals,
            # DataLoader would otherwise draw a number from the global generator at every epoch.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def skipped(self) -> int:
        """See :class:`gac.data.Loader`."""
        return len(self._unreadable)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`gac.data.Loader.epoch`."""
        check_start(start, len(self))
        self._unreadable = []
        return self._iterate(epoch, start)

    def yielded(self) -> list[tuple[int, str]]:
        """See :meth:`gac.data.interface.TestLoader.yielded`."""
        unreadable = set(self._unreadable)
        numbers = (number for batch in self._batches for _, number in batch if number not in unreadable)
        return [(number, self._folders.name(number)) for number in numbers]

    def _iterate(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._batches.epoch, self._batches.start = epoch, start
        with _blocked(signal.SIGTERM):
            # Workers inherit the mask, so that none is ended before worker_init_fn has run.
            batches = iter(self._loader)
        for batch in copy_ahead(batches, self.device):
            for unreadable in batch.unreadable:
                self._skip(unreadable)
            if len(batch.labels) > 0:
                yield self.normalization(batch.images), batch.labels

    def _skip(self, image: _Unreadable) -> None:
        self._unreadable.append(image.number)
        path = os.fsdecode(self._folders.paths[image.number])
        if image.number not in self._named:
            self._named.add(image.number)
            instead = (
                "the next image in the folders' order takes its place"
                if self._replace
                else "it is left out, and the scores are those of the other images"
            )
            logger.warning("%s cannot be read (%s): %s", path, image.reason, instead)
        if self.skipped > self._tolerated or (self._replace and not image.replaced):
            raise InputError(
                f"more than {TOLERATED_PERCENT} % of the {self.size} images in {self._folders.folder} cannot be read,"
                f" {path} among them ({image.reason}); replace or delete these images"
            )
