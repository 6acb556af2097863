"""Loaders of a small part of a data set, for dry runs."""

from collections.abc import Iterator
from itertools import islice

from torch import Tensor

from gac.data.interface import Loader, check_start


class FirstBatches:
    """A :class:`gac.data.Loader` of the first ``batches`` batches of each epoch of another loader."""

    def __init__(self, loader: Loader, batches: int) -> None:
        self._loader = loader
        self._batches = min(batches, len(loader))
        self.size = loader.size

    @property
    def skipped(self) -> int:
        """See :class:`gac.data.Loader`."""
        return self._loader.skipped

    def __len__(self) -> int:
        return self._batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`gac.data.Loader.epoch`."""
        check_start(start, len(self))
        return islice(self._loader.epoch(epoch, start), len(self) - start)


class OneBatch:
    """A :class:`gac.data.Loader` whose epochs repeat one batch."""

    def __init__(self, images: Tensor, labels: Tensor, repeats: int) -> None:
        self._batch = images, labels
        self._repeats = repeats
        self.size = len(labels)
        self.skipped = 0

    def __len__(self) -> int:
        return self._repeats

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`gac.data.Loader.epoch`."""
        check_start(start, len(self))
        return (self._batch for _ in range(start, len(self)))
