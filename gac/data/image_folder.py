"""Image sets too large for the device: files in one folder per class, decoded by worker processes."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
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


class _Images(Dataset):
    """Decoded images; the key is (epoch, image number).

    The epoch comes with the key because workers that outlive an epoch hold a copy of this object.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], transform: v2.Transform, seed: int) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, number = key
        path, label = self.samples[number]
        image = default_loader(path)
        # The transforms draw from torch's global generator; without workers that is the training's own.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, Stream.SAMPLE_AUGMENTATION, epoch, number))
            return self.transform(image), label


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
        for images, labels in self._loader:
            yield (
                self.normalization(images.to(self.device, non_blocking=True)),
                labels.to(self.device, non_blocking=True),
            )
