"""What the rest of the package sees of a data set, whichever kind it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gac.errors import InputError

TOLERATED_PERCENT = 1
"""Share of a split's images that may be unreadable in an epoch; with more the set counts as broken."""


class Loader(Protocol):
    """One split of a data set, in batches on one device.

    ``size`` is the number of images, ``len(loader)`` the number of batches in an epoch. Every epoch has each
    image exactly once, so the last batch may be smaller. ``skipped`` counts the images that could not be read
    among the batches yielded since :meth:`epoch` was called last: in training another image stands for each of
    them, a test set lacks them.

    With a :class:`Shard` the batches are this rank's parts of them, and ``skipped`` counts this rank's images; ``size``
    and ``len(loader)`` stay those of the split. A part without images does not come.
    """

    size: int
    skipped: int

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``start, start + 1, ...`` of an epoch, the same whether or not earlier ones were asked for.

        Yields images, float32 [B, C, H, W], and labels, int64 [B]. Raises InputError at once if ``start`` is
        not in [0, len(loader)].
        """
        ...


@dataclass(frozen=True)
class DataInfo:
    """Facts about a data set.

    Images are yielded as (pixels - mean) / std with pixels in [0, 1], one mean and std per channel; without
    normalisation mean is 0 and std is 1. ``train_size`` or ``test_size`` is None for a split not asked for.
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


@dataclass(frozen=True)
class Data:
    """A data set: its loaders (None for a split not asked for) and the facts about it."""

    train: Loader | None
    test: Loader | None
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

    The parts of all ranks, one after another, are the batch, cut as ``tensor_split`` does: the first ones may have one
    image more than the others, and the last ones are empty if a batch has fewer images than there are ranks.
    """

    rank: int = 0
    ranks: int = 1

    def of(self, images: int) -> slice:
        """Return the part of a batch of ``images`` images."""
        each, more = divmod(images, self.ranks)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))


WHOLE = Shard()
"""The whole of every batch: the shard of a run's only process."""
