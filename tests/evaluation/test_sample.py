"""Test images kept for a closer look: which ones, and that running the network on them repeats."""

import pytest
import torch

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
    collector = Collector(count, total)
    passed = list(collector.watch(batches))
    assert all(a is b for pair in zip(passed, batches, strict=True) for a, b in zip(*pair, strict=True))
    kept, labels = collector.images_and_labels()
    assert collector.places == kept.flatten().tolist() == (labels // 10).tolist() == expected
