import importlib.util
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gac import memory
from gac.data.npz import load_npz
from gac.errors import InputError
from hostile import LONG, assert_one_line, damaged, fuzz

BOTH = ("train", "test")
SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def arrays(channels=3):
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (12, 5, 6, channels), dtype=np.uint8),
        "y_train": np.arange(12, dtype=np.uint8) % 4,
        "x_test": random.integers(0, 256, (7, 5, 6, channels), dtype=np.uint8),
        "y_test": np.arange(7, dtype=np.uint8) % 4,
    }


@pytest.fixture
def save(tmp_path):
    """Write the arrays, some replaced or, where None, left out, and return the file's path."""

    def write(**replaced):
        path = tmp_path / "images.npz"
        content = {name: array for name, array in {**arrays(), **replaced}.items() if array is not None}
        np.savez(path, **content)
        return str(path)

    return write


def test_reads_images_and_labels(save):
    expected = arrays()
    data = load_npz(save(), BOTH)
    for split in BOTH:
        images, labels = data.splits[split].images, data.splits[split].labels
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), expected[f"x_{split}"])
        assert labels.dtype == torch.int64
        assert np.array_equal(labels.numpy(), expected[f"y_{split}"])
    assert data.num_classes == 4
    assert data.class_names is None
    pixels = expected["x_train"] / 255
    assert np.allclose(data.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    assert np.allclose(data.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


def test_images_without_a_channel_axis_are_grey(save):
    grey = {name: array[..., 0] for name, array in arrays().items() if name.startswith("x")}
    data = load_npz(save(**grey), BOTH)
    assert data.splits["train"].images.shape == (12, 1, 5, 6)
    assert np.array_equal(data.splits["train"].images[:, 0].numpy(), grey["x_train"])
    assert len(data.mean) == 1


@pytest.mark.parametrize("channels_third", [True, False])
def test_a_time_axis_makes_event_frames(save, channels_third):
    random = np.random.default_rng(1)
    frames = {
        "x_train": random.integers(0, 256, (12, 3, 2, 5, 6), dtype=np.uint8),
        "x_test": random.integers(0, 256, (7, 3, 2, 5, 6), dtype=np.uint8),
    }
    held = frames if channels_third else {name: each.transpose(0, 1, 3, 4, 2) for name, each in frames.items()}
    data = load_npz(save(**held), BOTH)
    for split in BOTH:
        images = data.splits[split].images
        assert images.is_contiguous()
        assert np.array_equal(images.numpy(), frames[f"x_{split}"])
    pixels = frames["x_train"] / 255
    assert np.allclose(data.mean, pixels.mean(axis=(0, 1, 3, 4)), rtol=1e-12)
    assert np.allclose(data.std, pixels.std(axis=(0, 1, 3, 4)), rtol=1e-12)
    assert load_npz(save(**held), ("test",)).mean == data.mean


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((7, 3, 5, 8, 6), r"x_test has shape \[7, 3, 5, 8, 6\]; event frames are .* at most 4: none is"),
        ((7, 3, 2, 8, 4), r"x_test has shape \[7, 3, 2, 8, 4\]; event frames are .* at most 4: both are"),
        ((7, 0, 2, 8, 8), r"x_test has shape .* \[N, T, C, H, W\] or \[N, T, H, W, C\], none of them 0"),
        ((7, 1, 3, 2, 5, 5), r"x_test has shape .* \[N, T, C, H, W\] or \[N, T, H, W, C\], none of them 0"),
        (
            (7, 2, 3, 5, 6),
            r"x_train have shape \[C, H, W\] = \[3, 5, 6\], those of x_test \[T, C, H, W\] = \[2, 3, 5, 6\]",
        ),
    ],
)
def test_frames_that_are_none_are_refused(save, shape, message):
    with pytest.raises(InputError, match=message):
        load_npz(save(x_test=np.zeros(shape, np.uint8)), BOTH)


def test_counts_of_events_have_to_be_bytes(save):
    with pytest.raises(InputError, match=r"x_train is float32; .* clip counts of events by x\.clip\(0, 255\)"):
        load_npz(save(x_train=np.zeros((12, 3, 2, 5, 6), np.float32)), BOTH)


def test_labels_may_be_a_column(save):
    column = arrays()["y_train"][:, None].astype(np.int32)
    assert load_npz(save(y_train=column), BOTH).splits["train"].labels.shape == (12,)


def test_class_names_give_the_number_of_classes(save):
    data = load_npz(save(classes=np.array(["a", "b", "c", "d", "e"])), BOTH)
    assert data.num_classes == 5
    assert data.class_names == ("a", "b", "c", "d", "e")


def test_classes_are_counted_over_both_splits(save):
    assert load_npz(save(y_test=np.array([0, 1, 2, 3, 4, 5, 0])), BOTH).num_classes == 6


def test_test_split_alone_has_the_same_statistics_and_classes(save):
    path = save()
    both, test_only = load_npz(path, BOTH), load_npz(path, ("test",))
    assert set(test_only.splits) == {"test"}
    assert (test_only.mean, test_only.std, test_only.num_classes) == (both.mean, both.std, both.num_classes)


def test_test_split_may_stand_alone_in_the_file(save):
    path = save(
        x_train=None,
        y_train=None,
        classes=np.array(["a", "b", "c", "d"]),
        mean=np.array([0.25, 0.5, 0.75]),
        std=np.array([0.125, 0.25, 0.5]),
    )
    data = load_npz(path, ("test",))
    assert (data.mean, data.std) == ((0.25, 0.5, 0.75), (0.125, 0.25, 0.5))
    assert data.num_classes == 4
    with pytest.raises(InputError, match="no array x_train; it holds x_test, y_test, classes, mean, std"):
        load_npz(path, BOTH)


BAD_FILES = {
    "no x_train": ({"x_train": None}, "has no array x_train; it holds y_train, x_test, y_test"),
    "no y_test": ({"y_test": None}, "has no array y_test"),
    "float images": (
        {"x_train": arrays()["x_train"] / 255},
        r"x_train is float64; images must be uint8 .*scale values in \[0, 1\] by \(x \* 255\)",
    ),
    "signed images": (
        {"x_test": arrays()["x_test"].astype(np.int64)},
        "x_test is int64; images must be uint8",
    ),
    "flat images": ({"x_train": np.zeros((12, 90), np.uint8)}, r"x_train has shape \[12, 90\]"),
    "no images": (
        {"x_test": np.zeros((0, 5, 6, 3), np.uint8), "y_test": np.zeros(0, np.uint8)},
        r"x_test has shape \[0, 5, 6, 3\]",
    ),
    "channels first": (
        {"x_train": np.zeros((12, 3, 32, 32), np.uint8)},
        r"last axis, the channels, may be 1 to 4; turn arrays \[N, C, H, W\]",
    ),
    "other test shape": (
        {"x_test": np.zeros((7, 6, 6, 3), np.uint8)},
        r"x_train have shape \[C, H, W\] = \[3, 5, 6\], those of x_test \[C, H, W\] = \[3, 6, 6\]",
    ),
    "float labels": ({"y_train": np.zeros(12)}, "y_train is float64; labels must be whole numbers"),
    "one-hot labels": ({"y_test": np.eye(7, dtype=np.uint8)}, r"y_test has shape \[7, 7\]; labels are \[N\]"),
    "negative label": ({"y_train": np.arange(12) - 1}, "y_train has the label -1; the first class is 0"),
    "label without a class": (
        {"classes": np.array(["a", "b", "c"])},
        "y_train has the label 3, but there are only 3 classes: labels must be 0 to 2",
    ),
    "too few labels": (
        {"y_train": np.zeros(11, np.uint8)},
        "x_train has 12 images and y_train 11 labels",
    ),
    "numbered classes": (
        {"classes": np.arange(4)},
        r"classes is int64 of shape \[4\]; it must be a list of names",
    ),
    "object classes": (
        {"classes": np.array(["a", "b", "c", "d"], dtype=object)},
        "array classes cannot be read .*allow_pickle=False",
    ),
    "only mean": ({"mean": np.full(3, 0.5)}, "has no array std"),
    "mean for white 255": (
        {"mean": np.full(3, 127.5), "std": np.full(3, 0.25)},
        r"mean is float64 \[127.5, 127.5, 127.5\]; it must be 3 floating-point numbers in \[0, 1\]",
    ),
    "one mean for three channels": (
        {"mean": np.full(1, 0.5), "std": np.full(3, 0.25)},
        "must be 3 floating-point",
    ),
    "no spread": (
        {"mean": np.full(3, 0.5), "std": np.array([0.25, 0, 0.25])},
        r"std is .* numbers in \(0, 1\]",
    ),
    "mean not a number": ({"mean": np.full(3, np.nan), "std": np.full(3, 0.25)}, "mean is"),
    "constant channel": (
        {"x_train": arrays()["x_train"] * np.array([1, 0, 1], np.uint8)},
        "all pixels of x_train are equal in channel 1",
    ),
}


@pytest.mark.parametrize(("replaced", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(save, replaced, message):
    path = save(**replaced)
    with pytest.raises(InputError, match=message) as caught:
        load_npz(path, BOTH)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_test_split_alone_needs_statistics(save):
    with pytest.raises(InputError, match=r"neither x_train nor mean and std"):
        load_npz(save(x_train=None), ("test",))


def test_test_split_alone_needs_the_number_of_classes(save):
    with pytest.raises(InputError, match=r"neither classes nor y_train"):
        load_npz(save(y_train=None), ("test",))


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*absent.npz; name an .npz file with --data.root"):
        load_npz(str(tmp_path / "absent.npz"), BOTH)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_other_file(tmp_path, content):
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is not a readable \.npz file"):
        load_npz(str(path), BOTH)


def test_single_array_file(tmp_path):
    path = tmp_path / "array.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(InputError, match="holds a single array"):
        load_npz(str(path), BOTH)


def test_flipped_byte_is_noticed(save):
    path = Path(save())
    content = bytearray(path.read_bytes())
    content[content.index(arrays()["x_train"].tobytes()) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="array x_train cannot be read"):
        load_npz(str(path), BOTH)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="CIFAR-10's mosaics are not beside the project")
def test_real_images_can_be_learnt_from(tmp_path):
    """One mosaic of CIFAR-10 decodes, and a linear classifier learns from its images through the loaders."""
    from gac.config import DataConfig
    from gac.data import build_data

    specification = importlib.util.spec_from_file_location("make_npz", SHARED_DATA / "make_npz.py")
    make_npz = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(make_npz)
    files = {path.name: path for path in SHARED_DATA.glob("part_*/*")}
    labels = np.load(files["labels.npz"])
    images = make_npz.read_mosaic(files["test_00.webp"])
    path = tmp_path / "cifar10.npz"
    np.savez(
        path,
        x_train=images[:2000],
        y_train=labels["test"][:2000],
        x_test=images[2000:],
        y_test=labels["test"][2000:2500],
        classes=labels["classes"],
    )
    data = build_data(DataConfig(name="npz", root=str(path)), device="cpu", batch_size=64, eval_batch_size=250, seed=0)
    assert data.info.class_names[:2] == ("airplane", "automobile")
    assert (data.info.channels, data.info.height, data.info.width) == (3, 32, 32)
    # 2,000 natural images are enough to see that these are CIFAR-10's pixels.
    assert np.allclose(data.info.mean, (0.4914, 0.4822, 0.4465), atol=0.02)
    assert np.allclose(data.info.std, (0.2470, 0.2435, 0.2616), atol=0.02)

    torch.manual_seed(0)
    classifier = torch.nn.Linear(3 * 8 * 8, 10)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01)

    def logits(images):
        return classifier(torch.nn.functional.avg_pool2d(images, 4).flatten(1))

    for epoch in range(8):
        for images, targets in data.train.epoch(epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits(images), targets).backward()
            optimizer.step()
    correct = sum(int((logits(images).argmax(1) == targets).sum()) for images, targets in data.test.epoch(0))
    assert correct / data.test.size > 0.2  # chance is 0.1


def test_medmnist_is_read_as_it_is(tmp_path):
    names = {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"}
    content = {names[name]: array if name[0] == "x" else array[:, None] for name, array in arrays().items()}
    np.savez(tmp_path / "medmnist.npz", **content, val_images=arrays()["x_test"], val_labels=arrays()["y_test"])
    found = load_npz(str(tmp_path / "medmnist.npz"), BOTH)
    expected = arrays()
    assert {split: len(part.labels) for split, part in found.splits.items()} == {"train": 12, "test": 7}
    assert np.array_equal(found.splits["test"].images.permute(0, 2, 3, 1).numpy(), expected["x_test"])


def write_header(path, shape, dtype="|u1", content=b""):
    """Write an .npz file whose x_train has a header that may say anything."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", file.getvalue() + content)
        archive.writestr("y_train.npy", b"")


def test_a_header_that_claims_more_than_the_file_holds_is_refused_at_once(tmp_path):
    write_header(tmp_path / "claims.npz", (3_000_000_000, 32, 32, 3))
    with pytest.raises(InputError, match=r"its header says 9216000000000 bytes, and the file holds 1\d\d\)"):
        load_npz(str(tmp_path / "claims.npz"), ("train",))


def test_an_array_that_unpacks_to_more_than_the_memory_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 2**20)
    write_header(tmp_path / "bomb.npz", (1024, 32, 32, 1), content=bytes(2**20))
    assert (tmp_path / "bomb.npz").stat().st_size < 5000
    with pytest.raises(
        InputError, match=r"npz: array x_train needs 0\.0 GiB of memory, and 0\.0 GiB are free: use \D*$"
    ):
        load_npz(str(tmp_path / "bomb.npz"), ("train",))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(InputError, match=r"there is no file .*pipe\.npz"):
        load_npz(str(tmp_path / "pipe.npz"), BOTH)


@pytest.mark.parametrize("label", [2**64 - 1, 2**63, 2**40, 2**20])
def test_labels_that_number_no_class_are_refused(save, label):
    labels = np.zeros(12, dtype=np.uint64)
    labels[3] = label
    with pytest.raises(InputError, match=rf"y_train has the label {label}; labels number the classes"):
        load_npz(save(y_train=labels), BOTH)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("seconds", [0, LONG])
def test_damaged_files_are_read_or_refused(tmp_path, write, seconds):
    path, results = tmp_path / "images.npz", {"read": 0, "refused": 0}
    write(path, **arrays(), classes=np.array(list("abcd")))

    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            load_npz(str(path), BOTH)
            results["read"] += 1
        except InputError as error:
            assert_one_line(error)
            results["refused"] += 1

    fuzz(read, damaged(path.read_bytes()), examples=80, seconds=seconds)
    assert results["refused"] > sum(results.values()) / 4
