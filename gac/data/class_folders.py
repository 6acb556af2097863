"""Image sets with one folder per class: list the files, and find at once what would stop a run later."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from gac.errors import InputError

_FOLDERS = {"train": "train", "test": "val"}


@dataclass(frozen=True)
class ClassFolders:
    """The images of a split: paths, bytes [N], and labels, int64 [N], which number the sorted class names.

    Arrays and not lists: reading an object of a list writes its reference count, which gives every worker process its
    own copy of the list in time, 245 MB in each of 8 workers after an epoch of ImageNet.
    """

    folder: Path
    class_names: tuple[str, ...]
    paths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


def open_folders(root: str, splits: Collection[str]) -> dict[str, ClassFolders]:
    """List the images of root/train for "train" and of root/val for "test".

    The first image of every class is opened, so that a class whose files are not readable is found at once. Raises
    InputError if a folder is missing, if a folder or such an image is not readable, if a class has no images, and if
    train and val have different classes.
    """
    folder = Path(root).expanduser()
    try:
        _check_folder(folder)
        opened = {split: _open_split(folder / _FOLDERS[split]) for split in splits}
    except PermissionError as error:
        raise InputError(f"{error.filename}: {error.strerror}; let this user read all of --data.root") from error
    _check_same_classes(root, opened)
    return opened


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise InputError(
            f"{what}; imagefolder needs train and val under --data.root, each with one folder of images per class"
        )


def _open_split(folder: Path) -> ClassFolders:
    _check_folder(folder)
    try:
        found = ImageFolder(folder, allow_empty=True)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no class folders; it needs one folder of images per class (docs/imagenet.md says how"
            " ImageNet's archives become such folders)"
        ) from error
    for name in found.classes:
        # ImageFolder silently skips a folder that it may not read.
        os.scandir(folder / name).close()
    paths = np.array([os.fsencode(path) for path, _ in found.samples])
    labels = np.array(found.targets, dtype=np.int64)
    present, first = np.unique(labels, return_index=True)
    if empty := sorted(set(found.classes) - {found.classes[label] for label in present}):
        raise InputError(
            f"{folder} has no images for {_first_few(empty)}; add images ({', '.join(IMG_EXTENSIONS)}) or remove the"
            " class folder"
        )
    for path in paths[first]:
        try:
            os.close(os.open(path, os.O_RDONLY))
        except OSError as error:
            raise InputError(
                f"{os.fsdecode(path)} cannot be opened: {error.strerror}; check all images of its class"
            ) from error
    return ClassFolders(folder, tuple(found.classes), paths, labels)


def _check_same_classes(root: str, opened: Mapping[str, ClassFolders]) -> None:
    if len({folders.class_names for folders in opened.values()}) > 1:
        train, test = (set(opened[split].class_names) for split in ("train", "test"))
        only = [
            f"in {name} only: {_first_few(sorted(classes))}"
            for name, classes in (("train", train - test), ("val", test - train))
            if classes
        ]
        raise InputError(
            f"train and val in {root} must have the same class folders, as labels are their alphabetical order;"
            f" {'; '.join(only)}"
        )


def _first_few(names: Sequence[str]) -> str:
    few = ", ".join(names[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more"
