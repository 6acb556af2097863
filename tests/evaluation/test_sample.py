"""Test images kept for a closer look: which ones, and that running the network on them repeats."""

import pytest
import torch

from gac.data.interface import UNLABELLED
from gac.evaluation.sample import Collector


@pytest.mark.parametrize(
    ("count", "total", "sizes", "expected"),
    [
        (4, 10, (4, 4, 2), [0, 3, 6, 9]),
        (3, 9, (2, 2, 2, 2, 1), [0, 3, 6]),
        (100, 5, (3, 2), [0, 1, 2, 3, 4]),
        (1, 7, (7,), [0]),
        # A set of which an image could not be read.
        (2, 6, (3, 2), [0, 3]),
    ],
)
def test_images_are_evenly_spread(count: int, total: int, sizes: tuple[int, ...], expected: list[int]) -> None:
    images = torch.arange(sum(sizes)).view(-1, 1, 1, 1)
    batches = list(zip(images.split(sizes), (10 * images).flatten().split(sizes), strict=True))
    scored = []
    collector = Collector(count, total, scored)
    for (passed, labels), batch in zip(collector.watch(batches), batches, strict=True):
        assert passed is batch[0]
        scored.append((labels, labels[:, None], torch.ones(len(labels), 1)))
    kept, labels = collector.images_and_labels()
    assert collector.places == kept.flatten().tolist() == (labels // 10).tolist() == expected
    assert collector.mistakes == []


def test_the_most_confident_mistakes_are_kept() -> None:
    torch.manual_seed(0)
    images = torch.arange(100).view(-1, 1, 1, 1)
    labels = torch.randint(3, (100,))
    labels[::7] = UNLABELLED
    ranked = torch.stack([torch.randperm(3) for _ in range(100)])
    probabilities = torch.rand(100, 3)
    scored = []
    collector = Collector(5, 100, scored)
    columns = (images, labels, ranked, probabilities)
    batches = list(zip(*(column.split(9) for column in columns), strict=True))
    for _, batch in zip(collector.watch((images, labels) for images, labels, *_ in batches), batches, strict=True):
        scored.append(batch[1:])
    wrong = [i for i in range(100) if labels[i] not in (UNLABELLED, ranked[i, 0])]
    expected = sorted(wrong, key=lambda i: -probabilities[i, 0])[:12]
    assert [mistake.place for mistake in collector.mistakes] == expected
    for mistake in collector.mistakes:
        i = mistake.place
        assert mistake.image.item() == i
        assert mistake.image.untyped_storage().nbytes() == 8
        assert (mistake.label, mistake.prediction) == (labels[i], ranked[i, 0])
        assert mistake.probability == probabilities[i, 0]
