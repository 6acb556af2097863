"""Any small image set as one .npz file, in Keras's layout."""

import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch

from gac.data.arrays import ArraySet, Split
from gac.data.interface import DataInfo
from gac.data.normalization import pixel_statistics
from gac.errors import InputError
from gac.files import user_path
from gac.memory import check_fits

_MAX_CHANNELS = 4
_MAX_CLASSES = 2**20
_SHAPES = "images are [N, H, W, C] or [N, H, W], event frames [N, T, C, H, W] or [N, T, H, W, C]"
_LAYOUT = (
    f"x_train and x_test are uint8: {_SHAPES}; y_train and y_test are whole numbers [N]; optional are classes (names),"
    " mean and std"
)
# MedMNIST's names of the same arrays; its val_images and val_labels are not used.
_OTHER_NAMES = {
    "x_train": "train_images",
    "y_train": "train_labels",
    "x_test": "test_images",
    "y_test": "test_labels",
}


def load_npz(path: str, splits: Collection[str], trained_on: DataInfo | None = None) -> ArraySet:
    """Return the images and labels in arrays x_train, y_train, x_test, y_test of one .npz file.

    MedMNIST's names train_images, train_labels, test_images and test_labels are taken as well.

    x is uint8: images [N, H, W, C] or [N, H, W], or event frames [N, T, C, H, W] or [N, T, H, W, C], one for each time
    step, with C at most 4 and in the second kind of them found by that. y is any integer type, [N] or [N, 1]; the
    optional classes [K] are the names of the classes 0 to K - 1. Only the arrays that ``splits`` need are read.
    Training and evaluation must normalise alike, so mean and std are always the training images': the arrays
    mean and std [C] (white being 1) if the file holds them, else computed from x_train. Without classes the
    number of classes is the largest label of y_train and y_test plus one. What a file with only test images does not
    say, statistics and classes, is that of the data ``trained_on``. Raises InputError for any other file.
    """
    with _Archive(user_path(path, "data.root")) as archive:
        arrays = {split: _read_split(archive, split) for split in splits}
        shapes = {split: tuple(part.images.shape[1:]) for split, part in arrays.items()}
        if len(set(shapes.values())) > 1:
            raise InputError(
                f"{archive.path}: images of x_train have shape {_axes(shapes['train'])}, those of x_test "
                f"{_axes(shapes['test'])}; all of a set must have one shape"
            )
        class_names = _read_class_names(archive)
        if class_names is None and trained_on is not None and "train" not in splits:
            num_classes = trained_on.num_classes
        else:
            num_classes = len(class_names) if class_names else _count_classes(archive, arrays)
        for split, part in arrays.items():
            _check_labels(archive, f"y_{split}", part.labels, num_classes)
        if trained_on is not None:
            mean, std = trained_on.mean, trained_on.std
        else:
            mean, std = _read_statistics(archive, arrays)
    return ArraySet(
        splits=arrays,
        num_classes=num_classes,
        class_names=class_names,
        mean=mean,
        std=std,
    )


UNREADABLE = (
    *(ValueError, TypeError, SyntaxError, LookupError, OverflowError, UnicodeError, struct.error),
    *(OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
"""What zipfile, its decompressors, numpy's reader of headers and Pillow raise for damaged bytes depends on where those
are."""


class _Archive:
    """An open .npz file whose reading errors are InputErrors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "_Archive":
        if not self.path.is_file():
            # A pipe or a device would be waited for.
            raise InputError(f"there is no file {self.path}; name an .npz file with --data.root ({_LAYOUT})")
        try:
            opened = np.load(self.path, allow_pickle=False)
        except UNREADABLE as error:
            raise InputError(f"{self.path} is not a readable .npz file ({error}); write it with numpy.savez") from error
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise InputError(
                f"{self.path} holds a single array (.npy); write an .npz file with numpy.savez ({_LAYOUT})"
            )
        self._file = opened
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _name(self, name: str) -> str:
        """Return the name that the file has for an array."""
        other = _OTHER_NAMES.get(name)
        return other if name not in self._file.files and other in self._file.files else name

    def __contains__(self, name: str) -> bool:
        return self._name(name) in self._file.files

    def read(self, name: str) -> np.ndarray:
        if name not in self:
            held = shorten(", ".join(self._file.files) or "nothing", 200)
            raise InputError(f"{self.path} has no array {name}; it holds {held} ({_LAYOUT})")
        with self._reporting(name):
            size = self._size(name)
        # The array, and once more what is made of it.
        check_fits(f"{self.path}: array {name}", 2 * size, "use fewer or smaller images, or image files in folders")
        with self._reporting(name):
            return self._file[self._name(name)]

    @contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            raise InputError(f"{self.path}: array {name} cannot be read ({error}); write the file again") from error

    def _size(self, name: str) -> int:
        """Return the bytes of an array. Raises ValueError if they are more than the file holds."""
        member = f"{self._name(name)}.npy"
        with self._file.zip.open(member) as file:
            version = np.lib.format.read_magic(file)
            old = version == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
        needed, held = math.prod(shape) * dtype.itemsize, self._file.zip.getinfo(member).file_size
        if needed > held:
            raise ValueError(f"its header says {needed} bytes, and the file holds {held}")
        return needed


def _read_split(archive: _Archive, split: str) -> Split:
    images = _read_images(archive, f"x_{split}")
    labels = _read_labels(archive, f"y_{split}")
    if len(images) != len(labels):
        raise InputError(
            f"{archive.path}: x_{split} has {len(images)} images and y_{split} {len(labels)} labels; "
            "every image needs one label"
        )
    return Split(images, labels)


def _read_images(archive: _Archive, name: str) -> torch.Tensor:
    array = archive.read(name)
    if array.dtype != np.uint8:
        raise InputError(
            f"{archive.path}: {name} is {array.dtype}; images must be uint8 with black 0 and white 255: "
            "scale values in [0, 1] by (x * 255).round().astype('uint8'), and clip counts of events by "
            "x.clip(0, 255).astype('uint8')"
        )
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim not in (4, 5) or 0 in array.shape:
        raise InputError(f"{archive.path}: {name} has shape {list(array.shape)}; {_SHAPES}, none of them 0")
    if array.ndim == 5:
        return _as_frames(archive, name, array)
    if array.shape[3] > _MAX_CHANNELS:
        raise InputError(
            f"{archive.path}: {name} has shape {list(array.shape)}, whose last axis, the channels, may be 1 "
            f"to {_MAX_CHANNELS}; turn arrays [N, C, H, W] with x.transpose(0, 2, 3, 1)"
        )
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def _as_frames(archive: _Archive, name: str, array: np.ndarray) -> torch.Tensor:
    """Return event frames [N, T, C, H, W]; the channels are the third axis or the last, the one of at most 4."""
    third, last = (array.shape[axis] <= _MAX_CHANNELS for axis in (2, 4))
    if third == last:
        raise InputError(
            f"{archive.path}: {name} has shape {list(array.shape)}; event frames are [N, T, C, H, W] or [N, T, H, W, C]"
            f", and of the third and the last axis one, the channels, has to be at most {_MAX_CHANNELS}:"
            f" {'both are' if last else 'none is'}"
        )
    frames = torch.from_numpy(array)
    return (frames if third else frames.permute(0, 1, 4, 2, 3)).contiguous()


def _axes(shape: tuple[int, ...]) -> str:
    """Return the shape of an image or of a sample's event frames, in words."""
    return f"{'[C, H, W]' if len(shape) == 3 else '[T, C, H, W]'} = {list(shape)}"


def _read_labels(archive: _Archive, name: str) -> torch.Tensor:
    array = archive.read(name)
    if array.dtype.kind not in "iu":
        raise InputError(f"{archive.path}: {name} is {array.dtype}; labels must be whole numbers of an integer type")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise InputError(
            f"{archive.path}: {name} has shape {list(array.shape)}; labels are [N] or [N, 1], one class number an image"
        )
    if not len(array):
        raise InputError(f"{archive.path}: {name} is empty; every image needs one label")
    if array.min() < 0:
        raise InputError(f"{archive.path}: {name} has the label {array.min()}; the first class is 0")
    if array.max() >= _MAX_CLASSES:
        raise InputError(
            f"{archive.path}: {name} has the label {array.max()}; labels number the classes, of which there may be"
            f" {_MAX_CLASSES}"
        )
    return torch.from_numpy(array.astype(np.int64))


def _read_class_names(archive: _Archive) -> tuple[str, ...] | None:
    if "classes" not in archive:
        return None
    array = archive.read("classes")
    if array.ndim != 1 or array.dtype.kind != "U" or not len(array):
        raise InputError(
            f"{archive.path}: classes is {array.dtype} of shape {list(array.shape)}; it must be a list of "
            "names, str [K]"
        )
    return tuple(array.tolist())


def _count_classes(archive: _Archive, arrays: dict[str, Split]) -> int:
    if "y_train" not in archive:
        raise InputError(
            f"{archive.path} has neither classes nor y_train, and the labels of the test images do not "
            "determine the number of classes; add the array classes, the names"
        )
    labels = [
        arrays[split].labels if split in arrays else _read_labels(archive, f"y_{split}")
        for split in ("train", "test")
        if f"y_{split}" in archive
    ]
    return max(int(part.max()) for part in labels if len(part)) + 1


def _check_labels(archive: _Archive, name: str, labels: torch.Tensor, num_classes: int) -> None:
    highest = int(labels.max())
    if highest >= num_classes:
        raise InputError(
            f"{archive.path}: {name} has the label {highest}, but there are only {num_classes} classes: labels "
            f"must be 0 to {num_classes - 1}"
        )


def _read_statistics(archive: _Archive, arrays: dict[str, Split]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = next(iter(arrays.values())).images.shape[-3]
    if "mean" in archive or "std" in archive:
        return _read_numbers(archive, "mean", channels), _read_numbers(archive, "std", channels)
    if "train" not in arrays and "x_train" not in archive:
        raise InputError(
            f"{archive.path} has neither x_train nor mean and std, and images are normalised by the training "
            "images' statistics; add the arrays mean and std, one number per channel with white being 1"
        )
    images = arrays["train"].images if "train" in arrays else _read_images(archive, "x_train")
    if images.shape[-3] != channels:
        raise InputError(
            f"{archive.path}: x_train has {images.shape[-3]} channels and x_test {channels}; all images of a "
            "set must have one shape"
        )
    mean, std = pixel_statistics(images)
    if 0 in std:
        raise InputError(
            f"{archive.path}: all pixels of x_train are equal in channel {std.index(0)}, which cannot be "
            "normalised; remove the channel, or add the arrays mean and std"
        )
    return mean, std


def _read_numbers(archive: _Archive, name: str, channels: int) -> tuple[float, ...]:
    array = archive.read(name)
    allowed = "in [0, 1]" if name == "mean" else "in (0, 1]"
    if (
        array.shape != (channels,)
        or array.dtype.kind != "f"
        or not np.all((array >= 0) & (array <= 1))
        or (name == "std" and 0 in array)
    ):
        raise InputError(
            f"{archive.path}: {name} is {array.dtype} {array.tolist()}; it must be {channels} floating-point "
            f"numbers {allowed}, one per channel with white being 1"
        )
    return tuple(array.tolist())
