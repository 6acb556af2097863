"""Random numbers as pure functions of the training seed and a position in the run.

Nothing here keeps state, so a run resumed in the middle of an epoch needs no stored generator.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What the numbers are for; equal positions in different streams have unrelated seeds."""

    ORDER = 0
    BATCH_AUGMENTATION = 1
    SAMPLE_AUGMENTATION = 2
    POLICY = 3
    ERASING = 4
    RANK_NOISE = 5


def derive_seed(seed: int, stream: Stream, *position: int) -> int:
    """Hash the training seed, the stream and a position into a 64-bit seed.

    The hash is NumPy's ``SeedSequence(seed, spawn_key=(stream, *position))``, whose result NumPy guarantees
    not to change between versions. ``position`` is (epoch), (epoch, batch number) or (epoch, image number), or
    empty where ``seed`` was itself derived from one.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, *position))
    return int(sequence.generate_state(1, np.uint64)[0])


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch's images: a permutation of range(size), int64 [size].

    It is drawn on the CPU, so that it does not depend on the device that trains.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.ORDER, epoch))
    return torch.randperm(size, generator=generator)
