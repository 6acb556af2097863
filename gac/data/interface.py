"""What every data set looks like to the rest of the package."""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from gac.errors import InputError, first_few

TOLERATED_PERCENT = 1
"""Percentage of a split's images that may be unreadable in an epoch; with more the set counts as broken."""


UNLABELLED = -1
"""The label of an image whose class is not known."""


class Loader(Protocol):
    """One split of a data set, in batches on one device.

    ``size`` is the number of images, ``len(loader)`` the number of batches in an epoch. Every epoch yields
    each image exactly once, so the last batch may be smaller. ``skipped`` counts the unreadable images of the batches
    yielded since the last call of :meth:`epoch`: in training another image replaces each of them, in testing they are
    left out.

    With a :class:`Shard` the batches and ``skipped`` are this rank's; ``size`` and ``len(loader)`` remain those of the
    whole split. A shard without images is not yielded.
    """

    size: int
    skipped: int

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return batches ``start, start + 1, ...`` of an epoch, the same whether or not earlier ones were asked for.

        Each is images, float32 [B, C, H, W], or event frames [B, T, C, H, W], and labels, int64 [B]. Raises InputError
        at once if ``start`` is not in [0, len(loader)].
        """
        ...


class TestLoader(Loader, Protocol):
    """The loader of the test images, which come in a fixed order; an image without a label has :data:`UNLABELLED`."""

    def yielded(self) -> list[tuple[int, str]]:
        """Return number and name of each image of the epoch that has just ended, in the order they were yielded.

        The name is the path below ``data.root`` for a file, and the number for an image of an array.
        """
        ...


@dataclass(frozen=True)
class DataInfo:
    """Facts about a data set; a checkpoint holds those of the one that its network was trained on.

    Images are yielded as (pixels - mean) / std with pixels in [0, 1], one mean and std per channel; without
    normalisation mean is 0 and std is 1. Label k stands for ``class_names[k]``. ``train_size`` and ``train_labels``
    (:func:`digest`), or ``test_size``, are None for a split not asked for. Images without labels have 0 classes. A
    sample is ``frames`` event frames, one for each time step, or an image if that is None. Of sets of
    events ``split`` is a digest of which samples are for training and which for testing.
    """

    name: str
    num_classes: int
    channels: int
    height: int
    width: int
    class_names: tuple[str, ...] | None
    train_size: int | None
    test_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_labels: str | None = None
    frames: int | None = None
    split: str | None = None

    @property
    def shape(self) -> str:
        """What a sample is, in words: its pixels and, of event frames, their number."""
        return f"{f'{self.frames} frames of ' if self.frames else ''}{self.height} x {self.width}"

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain values, as checkpoints hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> "DataInfo":
        """Return the facts that :meth:`to_dict` gave. Raises InputError for anything else."""
        try:
            info = TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, ("data", *first["loc"])))
            raise InputError(f"its entry {name} is damaged: {first['msg']}") from None
        if info.class_names is not None and len(info.class_names) != info.num_classes:
            raise InputError(f"its entry data is damaged: {len(info.class_names)} names of {info.num_classes} classes")
        if min(info.height, info.width, info.channels, 1 if info.frames is None else info.frames) < 1:
            raise InputError(f"its entry data is damaged: images of {info.shape} with {info.channels} channels")
        finite = all(map(math.isfinite, (*info.mean, *info.std))) and all(std > 0 for std in info.std)
        if not (finite and len(info.mean) == len(info.std) == info.channels):
            raise InputError(f"its entry data is damaged: mean {info.mean} and std {info.std}")
        return info

    def labels_of(self, other: "DataInfo") -> list[int] | None:
        """Return the label here of each class of another set, or None if all labels mean the same.

        Where one of the sets has no names of its classes, only their numbers are compared.

        Raises:
            InputError: If the classes are not the same.
        """
        if self.num_classes != other.num_classes or None in (self.class_names, other.class_names):
            if self.num_classes == other.num_classes:
                return None
            raise InputError(f"{self._classes()}, not {other._classes()}")
        if self.class_names == other.class_names:
            return None
        if repeated := repeated_name(self.class_names) or repeated_name(other.class_names):
            raise InputError(f"several of them are called {repeated!r}, so that their order cannot be told by name")
        if sorted(self.class_names) != sorted(other.class_names):
            only = [set(a.class_names) - set(b.class_names) for a, b in ((self, other), (other, self))]
            raise InputError(f"{self._classes(only[0])}, not {other._classes(only[1])}")
        return [self.class_names.index(name) for name in other.class_names]

    def _classes(self, shown: Collection[str] | None = None) -> str:
        """Return the number of classes and the first few names, of all or of those ``shown``."""
        if self.class_names is None:
            return f"{self.num_classes} classes without names"
        names = first_few([repr(name) for name in self.class_names if shown is None or name in shown])
        return f"{self.num_classes} classes ({names}{'' if shown is None else ' only here'})"


def repeated_name(names: Sequence[str]) -> str | None:
    """Return a name that several classes have, or None if there is none."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def digest(labels: np.ndarray) -> str:
    """Return a number that tells other labels, or the same in another order, apart: SHA-256 of them as int64."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Data:
    """A data set: its loaders (None for a split not asked for) and the facts about it."""

    train: Loader | None
    test: TestLoader | None
    info: DataInfo


def check_start(start: int, batches: int) -> None:
    """Raise InputError unless an epoch of ``batches`` batches can begin at batch number ``start``."""
    if not 0 <= start <= batches:
        raise InputError(
            f"an epoch of {batches} batches cannot begin at batch {start}; allowed are 0 to {batches}: "
            "resume with the data set and batch size that the run was started with"
        )


def tolerated(images: int) -> int:
    """Return how many of a split's images may be unreadable in an epoch."""
    return images * TOLERATED_PERCENT // 100


def check_readable(split: str, skipped: int, images: int) -> None:
    """Raise InputError if more images than tolerated were ``skipped`` in an epoch, by all ranks together."""
    if skipped > tolerated(images):
        raise InputError(
            f"{skipped} of the {images} {split} images cannot be read, more than {TOLERATED_PERCENT} %: replace or"
            " delete those that the warnings name"
        )


@dataclass(frozen=True)
class Shard:
    """The part of every batch that rank ``rank`` of ``ranks`` loads.

    Batches are cut as ``tensor_split`` does: the first ranks' parts may have one image more than the others', and the
    last ranks' are empty if a batch has fewer images than there are ranks.
    """

    rank: int = 0
    ranks: int = 1

    def of(self, images: int) -> slice:
        """Return the part of a batch of ``images`` images."""
        each, more = divmod(images, self.ranks)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def parts(self, order: Tensor, batch_size: int) -> Iterator[list[int]]:
        """Yield the part of each batch of the image numbers ``order``, int64 [N]."""
        for batch in order.split(batch_size) if len(order) else ():
            yield batch[self.of(len(batch))].tolist()


WHOLE = Shard()
"""The whole of every batch: the shard of a single process."""
