"""CIFAR-10 and CIFAR-100 through torchvision."""

from collections.abc import Collection
from typing import Literal

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from gac.data.arrays import ArraySet, Split
from gac.errors import InputError
from gac.files import user_path

# The values in common use. For CIFAR-10 the second triple is the mean of the images' own standard deviations;
# over all pixels of the training set it is (0.2470, 0.2435, 0.2616).
_SETS = {
    "cifar10": (CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": (CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def load_cifar(name: Literal["cifar10", "cifar100"], root: str, *, download: bool, splits: Collection[str]) -> ArraySet:
    """Return the images [3, 32, 32] of CIFAR-10 or CIFAR-100 from the folder ``root``.

    torchvision verifies the checksums of all files, whichever splits are asked for. Raises InputError if
    files are missing or damaged, or cannot be downloaded.
    """
    dataset, mean, std = _SETS[name]
    loaded = {split: _open(dataset, root, split == "train", download) for split in splits}
    arrays = {
        split: Split(torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(files.targets))
        for split, files in loaded.items()
    }
    class_names = tuple(next(iter(loaded.values())).classes)
    return ArraySet(
        splits=arrays,
        num_classes=len(class_names),
        class_names=class_names,
        mean=mean,
        std=std,
    )


def _open(dataset: type[CIFAR10], root: str, train: bool, download: bool) -> CIFAR10:
    folder = user_path(root, "data.root")
    try:
        return dataset(folder, train=train, download=download)
    # torchvision's own checks raise the first; the network and the file system the second.
    except (RuntimeError, OSError) as error:
        files = folder / dataset.base_folder
        if download:
            raise InputError(
                f"{dataset.__name__} could not be downloaded into {files}: {error}; check the network and "
                f"the free space, or unpack {dataset.url} there"
            ) from error
        raise InputError(
            f"{dataset.__name__} is missing or damaged in {files}; name the folder that holds "
            f"{dataset.base_folder} with --data.root, or download it with --data.download true"
        ) from error
