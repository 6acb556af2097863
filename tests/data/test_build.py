import numpy as np
import pytest
import torch
from PIL import Image

from gac.config import DataConfig
from gac.data import build_data
from gac.data.interface import DataInfo, Shard
from gac.errors import InputError


def build(config, **options):
    return build_data(config, **{"device": "cpu", "batch_size": 100, "eval_batch_size": 150, "seed": 1, **options})


def test_digits():
    data = build(DataConfig(name="digits"))
    assert data.info.name == "digits"
    assert (data.info.num_classes, data.info.class_names[9]) == (10, "9")
    assert (data.info.channels, data.info.height, data.info.width) == (1, 8, 8)
    assert (data.info.train_size, data.info.test_size) == (data.train.size, data.test.size) == (1437, 360)
    assert [len(labels) for _, labels in data.train.epoch(0)] == [100] * 14 + [37]
    assert [len(labels) for _, labels in data.test.epoch(0)] == [150, 150, 60]


def test_normalised_training_images_have_mean_0_and_deviation_1():
    data = build(DataConfig(name="digits", crop_padding=0, horizontal_flip=False))
    images = torch.cat([images for images, _ in data.train.epoch(0)])
    assert abs(float(images.mean())) < 1e-5
    assert abs(float(images.std(correction=0)) - 1) < 1e-5


def test_intensities_are_what_info_says_was_normalised():
    config = DataConfig(name="synthetic", image_size=8)
    normalised, plain = build(config), build(config, normalize=False)
    assert (plain.info.mean, plain.info.std) == ((0.0,) * 3, (1.0,) * 3)
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (normalised.info.mean, normalised.info.std))
    for (images, _), (intensities, _) in zip(normalised.train.epoch(0), plain.train.epoch(0), strict=True):
        assert 0 <= intensities.min() < intensities.max() <= 1
        assert torch.allclose(images * std + mean, intensities, atol=1e-6)


def test_test_images_are_neither_shuffled_nor_augmented():
    data = build(DataConfig(name="synthetic", image_size=8), normalize=False)
    images, labels = (torch.cat(parts) for parts in zip(*data.test.epoch(0), strict=True))
    again, _ = (torch.cat(parts) for parts in zip(*data.test.epoch(1), strict=True))
    assert torch.equal((images * 255).round().byte(), data.test.images)
    assert torch.equal(labels, data.test.labels)
    assert torch.equal(images, again)


def test_augmentation_follows_the_configuration():
    def images(**options):
        data = build(DataConfig(name="synthetic", image_size=8, **options), normalize=False)
        return torch.cat([images for images, _ in data.train.epoch(0)])

    plain = images(crop_padding=0, horizontal_flip=False)
    flipped = images(crop_padding=0, horizontal_flip=True)
    cropped = images(crop_padding=2, horizontal_flip=False)
    mirrored = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped, torch.where(mirrored[:, None, None, None], plain.flip(-1), plain))
    assert 0.4 < mirrored.float().mean() < 0.6
    erased = images(crop_padding=0, horizontal_flip=False, random_erasing=1.0)
    assert ((erased != plain).flatten(1).any(1)).float().mean() > 0.9
    cut = (images(crop_padding=0, horizontal_flip=False, cutout=4) != plain).any(1)
    assert cut.flatten(1).any(1).all()
    assert cut.flatten(1).sum(1).max() == 16
    changed = images(crop_padding=0, horizontal_flip=False, augment="autoaugment_cifar10")
    assert (changed != plain).flatten(1).any(1).float().mean() > 0.3
    unmoved = (cropped == plain).flatten(1).all(1)
    assert 0 < unmoved.float().mean() < 0.1  # one offset in 25


def test_test_split_alone(tmp_path):
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "test.npz",
        x_test=random.integers(0, 256, (6, 8, 8), dtype=np.uint8),
        y_test=np.arange(6),
        classes=np.array(list("abcdef")),
        mean=np.array([0.5]),
        std=np.array([0.25]),
    )
    data = build(DataConfig(name="npz", root=str(tmp_path / "test.npz")), splits=("test",))
    assert data.train is None
    assert (data.info.train_size, data.info.test_size, data.info.num_classes) == (None, 6, 6)
    images, labels = next(data.test.epoch(0))
    assert images.shape == (6, 1, 8, 8)
    assert labels.tolist() == list(range(6))


def test_missing_cifar_names_the_download(tmp_path):
    for name in ("cifar10", "cifar100"):
        with pytest.raises(InputError, match=r"--data\.download true"):
            build(DataConfig(name=name, root=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "^batch_size must be at least 1; got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"splits": ("train", "val")}, "splits must be train, test or both; got train, val"),
        ({"splits": ()}, "splits must be train, test or both; got none"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError, match=message):
        build(DataConfig(name="digits"), **options)


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ([0, 1, 2], [0, 1, 2], []),
        ([0, 0, 0], [0, 0, 0], ["data set npz has a single class: every network scores 100 %"]),
        (
            [1, 2, 3],
            [1, 2, 3],
            [
                "no training image has the label 0: if the labels count from 1, subtract 1",
                "1 of the 4 classes have no test images: 0",
            ],
        ),
        (
            [0, 5, 9],
            [0, 9, 9],
            [
                "7 of the 10 classes have no training images: 1, 2, 3 and 4 more",
                "8 of the 10 classes have no test images: 1, 2, 3 and 5 more",
            ],
        ),
    ],
)
def test_labels_that_are_hardly_meant_are_pointed_out(train, test, said, tmp_path, caplog):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=train, x_test=images, y_test=test)
    config = DataConfig(name="npz", root=str(tmp_path / "set.npz"))
    build_data(config, device="cpu", batch_size=3, eval_batch_size=3, seed=0)
    assert caplog.messages == said
    caplog.clear()
    build_data(config, device="cpu", batch_size=3, eval_batch_size=3, seed=0, shard=Shard(1, 2))
    assert caplog.messages == []


def frames_file(folder, T=3, **arrays):
    random = np.random.default_rng(0)
    labels = np.arange(12) % 2
    frames = random.integers(0, 256, (12, T, 2, 8, 8), dtype=np.uint8)
    path = folder / "frames.npz"
    np.savez(path, **{"x_train": frames, "y_train": labels, "x_test": frames[:6], "y_test": labels[:6], **arrays})
    return str(path), frames


def test_event_frames_come_in_batches_with_their_time_axis(tmp_path):
    path, frames = frames_file(tmp_path)
    data = build(DataConfig(name="npz", root=path, crop_padding=1), batch_size=5, eval_batch_size=4)
    info = data.info
    assert (info.frames, info.channels, info.height, info.width, info.shape) == (3, 2, 8, 8, "3 frames of 8 x 8")
    assert DataInfo.from_dict(info.to_dict()) == info
    assert [tuple(images.shape) for images, _ in data.train.epoch(0)] == [(5, 3, 2, 8, 8)] * 2 + [(2, 3, 2, 8, 8)]
    mean, std = (torch.tensor(numbers, dtype=torch.float32).view(2, 1, 1) for numbers in (info.mean, info.std))
    seen = torch.cat([images for images, _ in data.test.epoch(0)])
    assert torch.equal(seen, (torch.from_numpy(frames[:6]).float() / 255 - mean) / std)
    images = build(DataConfig(name="digits"), splits=("test",)).info
    assert (images.frames, images.shape) == (None, "8 x 8")


@pytest.mark.parametrize("channels", [2, 4])
def test_a_policy_for_colours_is_refused_for_other_channels(channels, tmp_path):
    path, _ = frames_file(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, channels), dtype=np.uint8)
    np.savez(path, x_train=pixels, y_train=np.arange(12) % 2, x_test=pixels, y_test=np.arange(12) % 2)
    config = DataConfig(name="npz", root=path, augment="randaugment")
    with pytest.raises(
        InputError, match=f"randaugment is for grey or RGB images, .* has {channels} channels: set data"
    ):
        build(config)
    build(config, splits=("test",))


@pytest.mark.parametrize(("option", "value"), [("event_pool", 2), ("roll", 3)])
def test_options_of_other_data_sets_are_pointed_out(option, value, tmp_path, caplog):
    if option == "roll":
        for split in ("train", "val"):
            (tmp_path / split / "a").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / "a" / "0.png")
    name = "imagefolder" if option == "roll" else "digits"
    config = DataConfig(name=name, root=str(tmp_path), image_size=8, resize=8, workers=0, **{option: value})
    said = f"data.{option} {value} does nothing with data.name {name}"
    build(config, splits=("test",))
    assert said not in caplog.messages
    build(config)
    assert said in caplog.messages
