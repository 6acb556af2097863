import pytest
import torch

from gac.config import DataConfig
from gac.data import build_data
from gac.data.part import FirstBatches, OneBatch
from gac.errors import InputError


@pytest.fixture
def loader():
    config = DataConfig(name="synthetic", image_size=8, synthetic_images=50)
    return build_data(config, device="cpu", batch_size=20, eval_batch_size=20, seed=1).train


@pytest.mark.parametrize(("batches", "expected"), [(2, 2), (9, 3)])
def test_the_first_batches_are_those_of_the_whole_epoch(loader, batches, expected):
    part = FirstBatches(loader, batches)
    assert len(part) == expected
    assert (part.size, part.skipped) == (50, 0)
    for epoch in (0, 1):
        whole = list(loader.epoch(epoch))[:expected]
        for start in range(expected + 1):
            found = list(part.epoch(epoch, start))
            assert len(found) == expected - start
            for (images, labels), (images_there, labels_there) in zip(found, whole[start:], strict=True):
                assert torch.equal(images, images_there)
                assert torch.equal(labels, labels_there)
    with pytest.raises(InputError, match="cannot begin at batch"):
        part.epoch(0, expected + 1)


def test_one_batch_comes_again_and_again():
    images, labels = torch.zeros(4, 1, 2, 2), torch.arange(4)
    loader = OneBatch(images, labels, repeats=3)
    assert (len(loader), loader.size) == (3, 4)
    batches = list(loader.epoch(7, start=1))
    assert len(batches) == 2
    assert all(batch[0] is images and batch[1] is labels for batch in batches)
    with pytest.raises(InputError, match="cannot begin at batch 4"):
        loader.epoch(0, 4)
