"""Image sets with one folder per class: list the files, and find at once what would stop a run later."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from gac.data.interface import UNLABELLED
from gac.errors import InputError, first_few
from gac.files import user_path

logger = logging.getLogger("gac")

_FOLDERS = {"train": "train", "test": "val"}
# What torchvision's ImageFolder takes, and other kinds of photographs that this Pillow can read.
_MORE_EXTENSIONS = (".gif", ".jfif", ".jpe", ".avif", ".jp2", ".pbm", ".pnm")
Image.init()
EXTENSIONS = IMG_EXTENSIONS + tuple(each for each in _MORE_EXTENSIONS if Image.EXTENSION.get(each) in Image.OPEN)
# What file managers, notebooks and archivers leave behind besides names that begin with a dot.
_CLUTTER = frozenset({"@eadir", "__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found"})


@dataclass(frozen=True)
class ClassFolders:
    """The images of a split: paths, bytes [N], and labels, int64 [N], which number the sorted class names.

    ``root`` is what ``data.root`` names and ``folder`` where the images are. Images without labels have no class names
    and the label :data:`gac.data.interface.UNLABELLED`.

    Arrays and not lists: reading an object of a list writes its reference count, which gives every worker process its
    own copy of the list in time, 245 MB in each of 8 workers after an epoch of ImageNet.
    """

    root: Path
    folder: Path
    class_names: tuple[str, ...]
    paths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        """Return the path of an image below the root."""
        return os.fsdecode(self.paths[number]).removeprefix(os.path.join(self.root, ""))


def open_folders(root: str, splits: Collection[str], unlabelled: bool = False) -> dict[str, ClassFolders]:
    """List the images of root/train for "train" and of root/val for "test".

    With ``unlabelled`` the root may instead hold images and no folders; these are "test", without labels. Nothing else
    is taken for that: a root with folders needs val.

    The first image of every class is opened, so that a class whose files are not readable is found at once. Raises
    InputError if a folder is missing, if a folder or such an image is not readable, if a class has no images, and if
    train and val have different classes.
    """
    folder = user_path(root, "data.root")
    try:
        _check_folder(folder)
        if unlabelled and (found := _open_unlabelled(folder)):
            return {"test": found}
        hint = "; eval.py --predictions also takes a folder with images and no folders in it" if unlabelled else ""
        opened = {split: _open_split(folder, _FOLDERS[split], hint) for split in splits}
    except PermissionError as error:
        raise InputError(f"{error.filename}: {error.strerror}; let this user read all of --data.root") from error
    _check_same_classes(root, opened)
    return opened


def _check_folder(folder: Path, hint: str = "") -> None:
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise InputError(
            f"{what}; imagefolder needs train and val under --data.root, each with one folder of images per class{hint}"
        )


def _is_clutter(name: str) -> bool:
    """Return whether a file or folder is hidden, or left behind by some program: no class and no image."""
    return name.startswith(".") or name.lower() in _CLUTTER


@dataclass
class _Listing:
    """What is in the class folders of a split."""

    others: Counter[str] = field(default_factory=Counter)
    repeated: list[str] = field(default_factory=list)
    _entered: set[tuple[int, int]] = field(default_factory=set)

    def enter(self, folder: str | Path) -> bool:
        """Return whether a folder is entered for the first time: a link may lead to one that was."""
        status = os.stat(folder)
        known = (status.st_dev, status.st_ino) in self._entered
        self._entered.add((status.st_dev, status.st_ino))
        return not known

    def images(self, folder: str) -> list[str]:
        """Return the image files in a folder and in those below it, in the order of torchvision's ImageFolder."""
        found: dict[str, list[str]] = {}
        self._collect(folder, found)
        return [path for _, paths in sorted(found.items()) for path in sorted(paths)]

    def _collect(self, folder: str, found: dict[str, list[str]]) -> None:
        found[folder] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_clutter(entry.name):
                    continue
                extension = os.path.splitext(entry.name)[1].lower()
                if entry.is_dir():
                    if self.enter(entry.path):
                        self._collect(entry.path, found)
                    else:
                        self.repeated.append(entry.path)
                elif extension not in EXTENSIONS:
                    self.others[extension or "no extension"] += 1
                elif entry.is_file() or not os.path.exists(entry.path):
                    # A link that leads nowhere is an image that cannot be read.
                    found[folder].append(entry.path)
                else:
                    self.others["pipes, sockets and devices"] += 1

    def warn(self, folder: Path) -> None:
        """Say what in a folder is not used."""
        if self.others:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.others.items()))
            logger.warning("%s: files that are not images are not used: %s", folder, kinds)
        if self.repeated:
            logger.warning(
                "%s: folders that are there already are not read again: %s", folder, first_few(self.repeated)
            )


def _open_unlabelled(folder: Path) -> ClassFolders | None:
    """Return the images of a folder that has images in it and no folders, or None for any other folder."""
    with os.scandir(folder) as found:
        if any(entry.is_dir() and not _is_clutter(entry.name) for entry in found):
            return None
    listing = _Listing()
    if not (images := listing.images(str(folder))):
        return None
    listing.warn(folder)
    paths = np.array([os.fsencode(path) for path in images])
    _check_opens(paths[:1])
    return ClassFolders(folder, folder, (), paths, np.full(len(paths), UNLABELLED, dtype=np.int64))


def _open_split(root: Path, name: str, hint: str) -> ClassFolders:
    folder = root / name
    _check_folder(folder, hint)
    with os.scandir(folder) as found:
        entries = [each for each in found if not _is_clutter(each.name)]
    classes = sorted(each.name for each in entries if each.is_dir())
    if lost := sorted(each.name for each in entries if not os.path.exists(each.path)):
        raise InputError(f"{folder} has links that lead nowhere: {first_few(lost)}; mend or remove them")
    if not classes:
        raise InputError(
            f"{folder} has no class folders; it needs one folder of images per class (docs/imagenet.md says how"
            f" ImageNet's archives become such folders){hint}"
        )
    listing, paths, counts = _Listing(), [], []
    listing.enter(folder)
    new = [listing.enter(folder / name) for name in classes]
    if not all(new):
        repeated = [name for name, is_new in zip(classes, new, strict=True) if not is_new]
        raise InputError(f"{folder}: {first_few(repeated)} link to the folder of another class; remove them")
    for name in classes:
        images = listing.images(str(folder / name))
        paths += map(os.fsencode, images)
        counts.append(len(images))
    if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        raise InputError(
            f"{folder} has no images for {first_few(empty)}; add images ({', '.join(EXTENSIONS)}) or remove the"
            " class folder"
        )
    listing.warn(folder)
    if len(entries) > len(classes):
        logger.warning("%s: files beside the class folders are not used: %d", folder, len(entries) - len(classes))
    paths = np.array(paths)
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    _check_opens(paths[np.cumsum([0, *counts[:-1]])])
    return ClassFolders(root, folder, tuple(classes), paths, labels)


def _check_opens(paths: np.ndarray) -> None:
    for path in paths:
        try:
            os.close(os.open(path, os.O_RDONLY))
        except OSError as error:
            raise InputError(
                f"{os.fsdecode(path)} cannot be opened: {error.strerror}; check all images of its class"
            ) from error


def _check_same_classes(root: str, opened: Mapping[str, ClassFolders]) -> None:
    if len({folders.class_names for folders in opened.values()}) > 1:
        train, test = (set(opened[split].class_names) for split in ("train", "test"))
        only = [
            f"in {name} only: {first_few(sorted(classes))}"
            for name, classes in (("train", train - test), ("val", test - train))
            if classes
        ]
        raise InputError(
            f"train and val in {root} must have the same class folders, as labels are their alphabetical order;"
            f" {'; '.join(only)}"
        )
