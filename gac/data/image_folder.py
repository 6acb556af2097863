"""Image sets too large for the device: files in one folder per class, decoded by worker processes."""

import os
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from gac.config import DataConfig
from gac.data.interface import check_start
from gac.data.normalization import Normalization
from gac.data.seeding import Stream, derive_seed, epoch_order
from gac.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FOLDERS = {"train": "train", "test": "val"}


def open_folders(root: str, splits: Collection[str]) -> dict[str, ImageFolder]:
    """List the images of root/train for "train" and of root/val for "test".

    Raises InputError if a folder is missing, has a class without images, or has other classes than the other.
    """
    opened = {split: _open_folder(Path(root).expanduser() / _FOLDERS[split]) for split in splits}
    if len({tuple(folder.classes) for folder in opened.values()}) > 1:
        train, test = set(opened["train"].classes), set(opened["test"].classes)
        only = [
            f"{name} only: {', '.join(sorted(classes)[:3])}{', ...' if len(classes) > 3 else ''}"
            for name, classes in (("train", train - test), ("val", test - train))
            if classes
        ]
        raise InputError(
            f"train and val in {root} must have the same class folders; in {'; in '.join(only)}: labels are "
            "the folders' alphabetical order"
        )
    return opened


def _open_folder(folder: Path) -> ImageFolder:
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}; imagefolder needs train and val under --data.root, each with one "
            "folder of images per class"
        )
    try:
        return ImageFolder(folder)
    except FileNotFoundError as error:
        reason = str(error).removesuffix(".")
        raise InputError(f"{folder} needs one folder per class with at least one image: {reason}") from error


def train_transform(config: DataConfig) -> v2.Transform:
    """Random resized crop, flip and AutoAugment (as configured) of a PIL image to uint8 [3, size, size]."""
    steps: list[v2.Transform] = [v2.RandomResizedCrop(config.image_size)]
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.auto_augment:
        steps.append(v2.AutoAugment())
    return v2.Compose([*steps, v2.PILToTensor()])


def evaluation_transform(config: DataConfig) -> v2.Transform:
    """The centre of a PIL image, resized on its shorter side, as uint8 [3, size, size]."""
    return v2.Compose([v2.Resize(config.resize), v2.CenterCrop(config.image_size), v2.PILToTensor()])


@dataclass(frozen=True)
class _Unreadable:
    """Stands for an image that could not be decoded.

    A value, as DataLoader would raise a worker's exception again with the worker's traceback as its message.
    """

    message: str


class _Images(Dataset):
    """Decoded images with their labels, or :class:`_Unreadable`; the key is (epoch, image number).

    The epoch comes with the key because workers that outlive an epoch hold a copy of this object.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], transform: v2.Transform, seed: int) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | _Unreadable:
        epoch, number = key
        path, label = self.samples[number]
        try:
            image = default_loader(path)
        except UnidentifiedImageError:
            return _Unreadable(f"{path} is not an image of a known format")
        # Which of these damage comes as depends on the format.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            return _Unreadable(f"the image {path} cannot be read: {reason}")
        # The transforms draw from torch's global generator; without workers that is the training's own.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, Stream.SAMPLE_AUGMENTATION, epoch, number))
            return self.transform(image), label


def _collate(items: Sequence[tuple[Tensor, int] | _Unreadable]) -> list[Tensor] | _Unreadable:
    """Return the batch of the items, or the first of them that could not be decoded."""
    return next((item for item in items if isinstance(item, _Unreadable)), None) or default_collate(items)


def _outlive_signals(worker: int) -> None:
    """Let a worker outlive the Ctrl-C or SIGTERM that its whole process group gets.

    The training process needs it for the batch in hand. A SIGTERM of that process itself still ends the worker:
    DataLoader and multiprocessing fall back on it, and multiprocessing would wait for ever at exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    # A handler would not learn who sent the signal.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


class _Batches(Sampler[list[tuple[int, int]]]):
    """Keys of the batches ``start, start + 1, ...`` of ``epoch``, both set before each iteration."""

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.epoch, self.start
        order = epoch_order(self.size, self.seed, epoch) if self.shuffle else torch.arange(self.size)
        for batch in range(start, len(self)):
            span = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield [(epoch, number) for number in order[span].tolist()]


class ImageFolderLoader:
    """A :class:`gac.data.Loader` whose images are decoded by ``workers`` processes (0: by this one).

    With ``shuffle`` the order is a function of (seed, epoch), otherwise it is the folder's; random transforms
    are functions of (seed, epoch, image number), whichever worker applies them. Batches travel as bytes and
    are normalised on the device. The workers serve one iteration: beginning an epoch ends an unfinished one.
    """

    def __init__(
        self,
        folder: ImageFolder,
        transform: v2.Transform,
        *,
        batch_size: int,
        workers: int,
        normalization: Normalization,
        device: torch.device,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.size = len(folder)
        self.device = device
        self.normalization = normalization
        self._batches = _Batches(self.size, batch_size, seed, shuffle)
        self._loader = DataLoader(
            _Images(folder.samples, transform, seed),
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            collate_fn=_collate,
            worker_init_fn=_outlive_signals,
            # Its own, as DataLoader otherwise draws a number from the global generator at every epoch.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`gac.data.Loader.epoch`."""
        check_start(start, len(self))
        return self._iterate(epoch, start)

    def _iterate(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._batches.epoch, self._batches.start = epoch, start
        for batch in self._loader:
            if isinstance(batch, _Unreadable):
                raise InputError(f"{batch.message}; replace or delete it")
            images, labels = batch
            yield (
                self.normalization(images.to(self.device, non_blocking=True)),
                labels.to(self.device, non_blocking=True),
            )
