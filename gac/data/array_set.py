"""A data set small enough to be held as arrays."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images, uint8 [N, C, H, W], and labels, int64 [N]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ArraySet:
    """The splits "train" and "test", or those asked for; mean and std per channel, white being 1."""

    splits: Mapping[str, Split]
    num_classes: int
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
