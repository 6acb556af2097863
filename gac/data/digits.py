"""The handwritten digits inside scikit-learn: real images without a download."""

import numpy as np
import torch
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.model_selection import train_test_split

from gac.data.arrays import ArraySet, Split
from gac.data.normalization import pixel_statistics

_WHITE = 16  # scikit-learn's pixels are the whole numbers 0 to 16


def load_digits() -> ArraySet:
    """1,797 grey images [1, 8, 8] of ten digits: 1,437 to train on and 360 to test.

    Pixels are rounded from 0..16 to 0..255. The split keeps the shares of the classes and is the same for
    every seed; mean and standard deviation are the training part's.
    """
    bunch = sklearn_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / _WHITE)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=bunch.target, random_state=0)
    mean, std = pixel_statistics(images[train])
    return ArraySet(
        splits={"train": Split(images[train], labels[train]), "test": Split(images[test], labels[test])},
        num_classes=10,
        class_names=tuple(str(name) for name in bunch.target_names),
        mean=mean,
        std=std,
    )
