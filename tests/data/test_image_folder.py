import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from gac.config import DataConfig
from gac.data import build_data
from gac.data.image_folder import IMAGENET_MEAN, IMAGENET_STD, open_folders
from gac.errors import InputError

CLASSES = ("ant", "bee", "cat")
SIZES = ((40, 30), (33, 64), (24, 24), (90, 50))  # width, height


def write_image(path, number, mode="RGB"):
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize(SIZES[number % len(SIZES)]).convert(mode).save(path, quality=95)


@pytest.fixture
def root(tmp_path):
    """Thirteen training and six test JPEG files of several sizes, one of them grey."""
    number = 0
    for folder, counts in (("train", (5, 4, 4)), ("val", (2, 2, 2))):
        for name, count in zip(CLASSES, counts, strict=True):
            for index in range(count):
                mode = "L" if (folder, name, index) == ("val", "bee", 0) else "RGB"
                write_image(tmp_path / folder / name / f"{index}.jpeg", number, mode)
                number += 1
    return tmp_path


def build(root, *, splits=("train", "test"), seed=3, workers=0, normalize=True, **options):
    config = DataConfig(name="imagefolder", root=str(root), image_size=24, resize=28, workers=workers, **options)
    return build_data(
        config,
        device="cpu",
        batch_size=4,
        eval_batch_size=5,
        seed=seed,
        normalize=normalize,
        splits=splits,
    )


def assert_same_batches(one, other):
    one, other = list(one), list(other)
    assert len(one) == len(other) > 0
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_facts(root):
    info = build(root).info
    assert (info.num_classes, info.class_names) == (3, CLASSES)
    assert (info.channels, info.height, info.width) == (3, 24, 24)
    assert (info.train_size, info.test_size) == (13, 6)
    assert (info.mean, info.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_batches_have_the_stated_shapes(root):
    loader = build(root).train
    batches = list(loader.epoch(0))
    assert (len(loader), loader.size) == (4, 13)
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 1]
    assert all(images.shape == (len(labels), 3, 24, 24) for images, labels in batches)
    assert all(images.dtype == torch.float32 and labels.dtype == torch.int64 for images, labels in batches)
    labels = torch.cat([labels for _, labels in batches])
    assert torch.bincount(labels).tolist() == [5, 4, 4]
    assert labels.tolist() != sorted(labels.tolist())


def test_test_images_equal_torchvisions_in_order(root):
    steps = transforms.Compose(
        [
            transforms.Resize(28),
            transforms.CenterCrop(24),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    paths = sorted((root / "val").glob("*/*.jpeg"))
    expected = torch.stack([steps(Image.open(path).convert("RGB")) for path in paths])
    images, labels = (torch.cat(parts) for parts in zip(*build(root).test.epoch(0), strict=True))
    assert torch.equal(images, expected)
    assert labels.tolist() == [CLASSES.index(path.parent.name) for path in paths]


def test_every_training_image_comes_once(tmp_path):
    # One image a class, each of one colour, which no crop or flip changes: the colour must fit the label.
    for number in range(9):
        for folder in ("train", "val"):
            path = tmp_path / folder / str(number) / "image.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(path)
    images, labels = (torch.cat(parts) for parts in zip(*build(tmp_path, normalize=False).train.epoch(0), strict=True))
    assert labels.sort().values.tolist() == list(range(9))
    assert torch.equal((images * 255).round()[:, 0], (20.0 * labels).view(-1, 1, 1).expand(-1, 24, 24))


@pytest.mark.parametrize("auto_augment", [False, True])
def test_workers_do_not_change_the_batches(root, auto_augment):
    alone = build(root, auto_augment=auto_augment).train
    helped = build(root, auto_augment=auto_augment, workers=2).train
    # The workers stay alive from one epoch to the next and must learn its number.
    for epoch in (0, 1):
        assert_same_batches(alone.epoch(epoch), helped.epoch(epoch))
    unfinished = helped.epoch(5)
    next(unfinished)
    assert_same_batches(list(alone.epoch(2))[3:], helped.epoch(2, start=3))


@pytest.mark.parametrize("start", range(4))
def test_resumed_epoch_has_the_remaining_batches(root, start):
    whole = list(build(root).train.epoch(2))
    assert_same_batches(whole[start:], build(root).train.epoch(2, start))


def test_epoch_resumed_at_its_end_is_empty(root):
    assert list(build(root).train.epoch(0, start=4)) == []
    with pytest.raises(InputError, match="cannot begin at batch 5"):
        build(root).train.epoch(0, start=5)


def test_augmentation_differs_between_epochs_and_seeds(tmp_path):
    # A single image: the order cannot differ.
    write_image(tmp_path / "train" / "ant" / "0.jpeg", 1)

    def image(seed, epoch):
        ((images, _),) = build(tmp_path, seed=seed, splits=("train",)).train.epoch(epoch)
        return images

    assert torch.equal(image(0, 0), image(0, 0))
    assert not torch.equal(image(0, 0), image(0, 1))
    assert not torch.equal(image(0, 0), image(1, 0))


def test_each_image_has_its_own_crop(tmp_path):
    for index in range(4):
        write_image(tmp_path / "train" / "ant" / f"{index}.jpeg", 1)  # four times the same image
    ((images, _),) = build(tmp_path, splits=("train",)).train.epoch(0)
    assert len(images.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize("option", ["horizontal_flip", "auto_augment"])
def test_options_change_the_training_images_only(root, option):
    off, on = build(root, **{option: False}), build(root, **{option: True})
    assert_same_batches(off.test.epoch(0), on.test.epoch(0))
    pairs = zip(off.train.epoch(0), on.train.epoch(0), strict=True)
    assert any(not torch.equal(one, other) for (one, _), (other, _) in pairs)


def test_global_generator_is_left_alone(root):
    loader = build(root).train
    before = torch.random.get_rng_state()
    list(loader.epoch(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_intensities_without_normalization(root):
    data = build(root, normalize=False)
    images, _ = next(data.train.epoch(0))
    assert 0 <= images.min() < 0.2 < 0.8 < images.max() <= 1
    assert (data.info.mean, data.info.std) == ((0.0,) * 3, (1.0,) * 3)


def test_evaluation_needs_no_training_folder(root):
    (root / "train").rename(root / "elsewhere")
    data = build(root, splits=("test",))
    assert data.train is None
    assert data.info.train_size is None
    assert len(list(data.test.epoch(0))) == 2


def remove_val(root: Path):
    (root / "val").rename(root / "test")


def add_empty_class(root: Path):
    (root / "train" / "dog").mkdir()


def rename_class(root: Path):
    (root / "val" / "bee").rename(root / "val" / "wasp")


def remove_classes(root: Path):
    (root / "val").rename(root / "all")
    (root / "val").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_val, r"there is no folder .*val; imagefolder needs train and val under --data.root"),
        (add_empty_class, r"train needs one folder per class with at least one image: .*dog"),
        (rename_class, r"must have the same class folders; in train only: bee; in val only: wasp"),
        (remove_classes, r"val needs one folder per class with at least one image: .*any class folder"),
    ],
)
def test_bad_tree(root, damage, message):
    damage(root)
    with pytest.raises(InputError, match=message) as caught:
        open_folders(str(root), ("train", "test"))
    assert "\n" not in str(caught.value)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


def replace_by_text(path: Path):
    path.write_text("not an image")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "the image {} cannot be read: image file is truncated"),
        (replace_by_text, "{} is not an image of a known format"),
        (Path.unlink, "the image {} cannot be read: No such file or directory"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_in_one_line(root, damage, message, workers):
    path = root / "val" / "cat" / "1.jpeg"
    loader = build(root, workers=workers).test
    damage(path)
    batches = loader.epoch(0)
    next(batches)  # the other images are in this batch
    with pytest.raises(InputError) as caught:
        next(batches)
    assert str(caught.value).startswith(message.format(path))
    assert "\n" not in str(caught.value)


def test_an_iteration_that_is_never_finished_does_not_keep_python_from_ending(root):
    # At exit multiprocessing ends workers by SIGTERM, and waits for them.
    program = f"""
from test_image_folder import build
batches = build({str(root)!r}, workers=1).train.epoch(0)
next(batches)
batches.gi_frame.f_locals['self']._loader._iterator._shutdown = True  # DataLoader forgets them
"""
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{here.parents[1]}"}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=True)
