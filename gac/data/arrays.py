"""Data sets held as arrays of bytes on the device: an epoch copies only its order from the host."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gac.data.augment import Augmentation
from gac.data.interface import WHOLE, Shard, check_start
from gac.data.normalization import Normalization
from gac.data.seeding import Stream, derive_seed, epoch_order
from gac.data.transfer import make_beside


@dataclass(frozen=True)
class Split:
    """Images, uint8 [N, C, H, W], or event frames [N, T, C, H, W], and labels, int64 [N]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ArraySet:
    """The splits "train" and "test", or those asked for; mean and std of each channel, in units where white is 1.

    ``split`` is as in :class:`gac.data.DataInfo`.
    """

    splits: Mapping[str, Split]
    num_classes: int
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split: str | None = None


class ArrayLoader:
    """A :class:`gac.data.Loader` over images on ``device``.

    With ``shuffle`` the order is a function of (seed, epoch), otherwise it is the arrays'. ``augment`` gets a
    generator on the device, seeded by (seed, epoch, batch number): the same pixels at every visit, though CPU
    and CUDA generators draw different numbers from one seed. Producing a batch never waits for the work on batches
    before it.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        normalization: Normalization,
        device: torch.device,
        seed: int,
        shuffle: bool,
        augment: Augmentation | None,
        shard: Shard = WHOLE,
    ) -> None:
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.size = len(split.images)
        # Every image was read when the arrays were loaded.
        self.skipped = 0
        self.batch_size = batch_size
        self.normalization = normalization
        self.seed = seed
        self.shuffle = shuffle
        self.augment = augment
        self.shard = shard

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`gac.data.Loader.epoch`."""
        check_start(start, len(self))
        return make_beside(self._batches(epoch, start), self.images.device)

    def yielded(self) -> list[tuple[int, str]]:
        """See :meth:`gac.data.interface.TestLoader.yielded`."""
        parts = self.shard.parts(torch.arange(self.size), self.batch_size)
        return [(number, str(number)) for part in parts for number in part]

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.device
        order = epoch_order(self.size, self.seed, epoch).to(device) if self.shuffle else None
        generator = torch.Generator(device)
        for batch in range(start, len(self)):
            span = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            chosen = span if order is None else order[span]
            images, labels = self.images[chosen], self.labels[chosen]
            if self.augment is not None:
                # The whole batch, not only this rank's: an image's random numbers depend on its place in it.
                generator.manual_seed(derive_seed(self.seed, Stream.BATCH_AUGMENTATION, epoch, batch))
                images = self.augment(images, generator)
            part = self.shard.of(len(labels))
            if part.start < part.stop:
                yield self.normalization(images[part]), labels[part]
