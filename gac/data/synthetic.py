"""Random images for benchmarks and smoke tests."""

import math

import torch

from gac.data.arrays import ArraySet, Split
from gac.memory import check_fits

_SEED = 0
_CHANNELS = 3


def load_synthetic(*, images: int, classes: int, image_size: int) -> ArraySet:
    """Return uniformly random uint8 images [3, image_size, image_size] with random labels, the same in every run.

    There are ``images`` (at least 4) to train on and a quarter as many to test. Raises InputError if they are more than
    the memory holds.
    """
    in_bytes = _CHANNELS * image_size**2 + 8
    check_fits(
        f"data.synthetic_images {images} of data.image_size {image_size}",
        (images + images // 4) * in_bytes,
        "choose smaller ones",
    )
    generator = torch.Generator().manual_seed(_SEED)

    def split(size: int) -> Split:
        shape = (size, _CHANNELS, image_size, image_size)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return Split(pixels, torch.randint(classes, (size,), generator=generator))

    return ArraySet(
        splits={"train": split(images), "test": split(images // 4)},
        num_classes=classes,
        class_names=None,
        mean=(0.5,) * _CHANNELS,
        std=(math.sqrt((256**2 - 1) / 12) / 255,) * _CHANNELS,  # of the uniform distribution on 0..255
    )
