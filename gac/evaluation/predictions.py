"""The classes that a network gives to the images of a test set, one by one and counted."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gac.execution.distributed import SINGLE_PROCESS, Ranks


@dataclass(frozen=True)
class ClassScore:
    """How many test images a class has and how many of them are recognised; ``top1``, in percent, None without any."""

    name: str
    images: int
    correct: int
    top1: float | None


@dataclass(frozen=True)
class Predictions:
    """What a network makes of N images, in the order of their numbers.

    ``labels`` is int64 [N], all of them :data:`gac.data.interface.UNLABELLED` for images without labels. ``ranked``,
    int64 [N, R], holds the R = min(5, classes) largest outputs' classes, the largest first; ``probabilities``, float32
    [N, R], are theirs after a softmax of the outputs' mean over time.
    """

    images: Sequence[str]
    labels: np.ndarray
    ranked: np.ndarray
    probabilities: np.ndarray

    def by_class(self, names: Sequence[str]) -> list[ClassScore]:
        """Return the scores of the classes, which have these names."""
        images, correct = (
            np.bincount(labels, minlength=len(names)).tolist()
            for labels in (self.labels, self.labels[self.labels == self.ranked[:, 0]])
        )
        return [
            ClassScore(name, of, hits, 100 * hits / of if of else None)
            for name, of, hits in zip(names, images, correct, strict=True)
        ]

    def confusion(self) -> list[list[int]]:
        """Return the entries of the confusion matrix that are not 0: [label, prediction, number of images]."""
        pairs, counts = np.unique(np.stack([self.labels, self.ranked[:, 0]], axis=1), axis=0, return_counts=True)
        return np.column_stack([pairs, counts]).tolist()

    def write_csv(self, file: BinaryIO, names: Sequence[str], labelled: bool) -> None:
        """Write a line for each image, with classes by their ``names``; without labels there is no such column.

        The bytes of a file name that is not UTF-8 are written as they are.
        """
        names = [_encodable(name) for name in names]
        places = ["", *range(2, self.ranked.shape[1] + 1)]
        best = [f"{what}{place}" for place in places for what in ("prediction", "probability")]
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        table = csv.writer(text)
        table.writerow(["image", *(["label"] if labelled else []), *best])
        rows = zip(self.images, self.labels, self.ranked, self.probabilities, strict=True)
        for image, label, ranked, probabilities in rows:
            best = (each for k, p in zip(ranked, probabilities, strict=True) for each in (names[k], p))
            table.writerow([_encodable(image), *([names[label]] if labelled else []), *best])
        text.detach()


def gather(
    images: Sequence[tuple[int, str]], batches: Sequence[tuple[Tensor, Tensor, Tensor]], ranks: Ranks = SINGLE_PROCESS
) -> Predictions:
    """Return the predictions of all ranks, each of which has some of the images.

    Args:
        images: Number and name of each image of this rank, as :meth:`gac.data.interface.TestLoader.yielded` gives them.
        batches: Labels, int64 [B], ranked classes, int64 [B, R], and their probabilities [B, R] of the same images.
        ranks: The processes that share the images; each of them gets all predictions.
    """
    columns = [torch.cat(column).cpu().numpy() for column in zip(*batches, strict=True)]
    found = [each for each in ranks.gather((images, columns)) if each[0]]
    images = [image for each, _ in found for image in each]
    labels, ranked, probabilities = (np.concatenate(parts) for parts in zip(*(each for _, each in found), strict=True))
    numbers = np.array([number for number, _ in images])
    if len(numbers) != len(labels) or len(np.unique(numbers)) != len(numbers):
        raise AssertionError(f"{len(labels)} predictions do not belong to {len(numbers)} images")
    order = np.argsort(numbers)
    names = [images[place][1] for place in order]
    return Predictions(names, labels[order], ranked[order], probabilities[order])


def _encodable(text: str) -> str:
    """Return the text with halves of surrogate pairs escaped, unless they are how Python spells bytes in file names."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text
