import pytest
import torch

from gac.data.arrays import ArrayLoader, Split
from gac.data.augment import CropAndFlip
from gac.data.normalization import Normalization
from gac.errors import InputError

SIZE, BATCH = 53, 10  # the last batch has 3 images


def make_loader(*, shuffle=True, augment=None, seed=7, size=SIZE, batch_size=BATCH, device="cpu"):
    """Image i has the label i and random pixels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
    device = torch.device(device)
    return ArrayLoader(
        Split(images, torch.arange(size)),
        batch_size=batch_size,
        normalization=Normalization((0.5,) * 3, (0.25,) * 3, device),
        device=device,
        seed=seed,
        shuffle=shuffle,
        augment=augment,
    )


def assert_same_batches(one, other):
    one, other = list(one), list(other)
    assert len(one) == len(other) > 0
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_batches_have_the_stated_shapes():
    loader = make_loader()
    batches = list(loader.epoch(0))
    assert len(loader) == len(batches) == 6
    assert loader.size == SIZE
    assert [len(labels) for _, labels in batches] == [10, 10, 10, 10, 10, 3]
    for images, labels in batches:
        assert images.shape == (len(labels), 3, 8, 8)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_image_comes_once_with_its_own_label(shuffle):
    loader = make_loader(shuffle=shuffle)
    images, labels = (torch.cat(parts) for parts in zip(*loader.epoch(3), strict=True))
    assert torch.equal(labels.sort().values, torch.arange(SIZE))
    assert torch.equal(labels, torch.arange(SIZE)) != shuffle
    assert torch.equal(images, loader.normalization(loader.images[labels]))


@pytest.mark.parametrize("size", [1, 21])
def test_last_batch_may_be_one_image(size):
    images, labels = list(make_loader(size=size, augment=CropAndFlip(2, True)).epoch(0))[-1]
    assert images.shape == (1, 3, 8, 8)
    assert labels.shape == (1,)


def test_equal_seed_and_epoch_give_equal_batches():
    augment = CropAndFlip(2, horizontal_flip=True)
    assert_same_batches(make_loader(augment=augment).epoch(4), make_loader(augment=augment).epoch(4))


def test_other_epoch_or_seed_gives_another_order():
    def order(seed, epoch):
        return torch.cat([labels for _, labels in make_loader(seed=seed).epoch(epoch)])

    assert not torch.equal(order(7, 0), order(7, 1))
    assert not torch.equal(order(7, 0), order(8, 0))


def test_augmentation_differs_between_batches_epochs_and_seeds():
    def first_two(seed, epoch):
        # One image 20 times in a fixed order: only the augmentation can differ.
        loader = make_loader(shuffle=False, augment=CropAndFlip(2, True), seed=seed, size=20)
        loader.images[:] = loader.images[0].clone()
        return [images for images, _ in loader.epoch(epoch)]

    draws = [*first_two(7, 0), *first_two(7, 1), *first_two(8, 0)]
    for i, one in enumerate(draws):
        assert not any(torch.equal(one, other) for other in draws[i + 1 :])


@pytest.mark.parametrize("start", range(6))
def test_resumed_epoch_has_the_remaining_batches(start):
    augment = CropAndFlip(2, horizontal_flip=True)
    whole = list(make_loader(augment=augment).epoch(2))
    assert_same_batches(whole[start:], make_loader(augment=augment).epoch(2, start))


def test_epochs_may_be_read_side_by_side():
    loader = make_loader(augment=CropAndFlip(2, horizontal_flip=True))
    one, other = [], []
    for batch, other_batch in zip(loader.epoch(0), loader.epoch(1), strict=True):
        one.append(batch)
        other.append(other_batch)
    assert_same_batches(one, loader.epoch(0))
    assert_same_batches(other, loader.epoch(1))


def test_epoch_resumed_at_its_end_is_empty():
    assert list(make_loader().epoch(0, start=6)) == []


@pytest.mark.parametrize("start", [-1, 7])
def test_start_beyond_the_epoch_raises_at_once(start):
    with pytest.raises(InputError, match=f"cannot begin at batch {start}; allowed are 0 to 6"):
        make_loader().epoch(0, start)


def test_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    list(make_loader(augment=CropAndFlip(2, horizontal_flip=True)).epoch(0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.gpu
def test_cuda_batches_need_no_synchronisation():
    loader = make_loader(augment=CropAndFlip(2, horizontal_flip=True), device="cuda")
    batches = loader.epoch(0)
    kept = [next(batches)]  # copies the epoch's order to the device, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept.extend(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_batches(kept, loader.epoch(0))
