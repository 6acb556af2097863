import numpy as np
import pytest
import torch

from gac.data.synthetic import load_synthetic
from gac.errors import InputError


def test_shapes_and_ranges():
    data = load_synthetic(images=40, classes=7, image_size=16)
    train, test = data.splits["train"], data.splits["test"]
    assert train.images.shape == (40, 3, 16, 16)
    assert test.images.shape == (10, 3, 16, 16)
    assert train.images.dtype == torch.uint8
    assert train.labels.shape == (40,)
    assert train.labels.dtype == torch.int64
    assert 0 <= train.labels.min() <= train.labels.max() < 7 == data.num_classes


def test_the_same_in_every_run():
    torch.manual_seed(1)
    one = load_synthetic(images=8, classes=3, image_size=4)
    torch.manual_seed(2)
    other = load_synthetic(images=8, classes=3, image_size=4)
    for split in ("train", "test"):
        assert torch.equal(one.splits[split].images, other.splits[split].images)
        assert torch.equal(one.splits[split].labels, other.splits[split].labels)


def test_statistics_are_the_uniform_distributions():
    values = np.arange(256) / 255
    data = load_synthetic(images=4, classes=1, image_size=1)
    assert np.allclose(data.mean, values.mean(), rtol=1e-12)
    assert np.allclose(data.std, values.std(), rtol=1e-12)


@pytest.mark.parametrize(("images", "image_size"), [(2**50, 8), (512, 10**6), (2**63, 2**63)])
def test_more_than_the_memory_is_refused_at_once(images, image_size):
    with pytest.raises(
        InputError, match=f"data.synthetic_images {images} of data.image_size {image_size} needs .* GiB"
    ):
        load_synthetic(images=images, classes=3, image_size=image_size)
