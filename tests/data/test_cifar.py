import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from gac.data.cifar import load_cifar
from gac.errors import InputError

BOTH = ("train", "test")


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """Two training files and a test file in CIFAR-10's format; only the expected checksums differ."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    contents, checksums = {}, {}
    for name, size in (("data_batch_1", 5), ("data_batch_2", 4), ("test_batch", 3)):
        pixels = random.integers(0, 256, (size, 3 * 32 * 32), dtype=np.uint8)
        contents[name] = {"data": pixels, "labels": random.integers(0, 10, size).tolist()}
        checksums[name] = write_pickle(folder / name, contents[name])
    names = [f"class {number}" for number in range(10)]
    meta = write_pickle(folder / "batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "train_list", [[n, checksums[n]] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta})
    return tmp_path, contents


def test_reads_images_and_labels(small_cifar10):
    root, contents = small_cifar10
    data = load_cifar("cifar10", str(root), download=False, splits=BOTH)
    for split, names in (("train", ("data_batch_1", "data_batch_2")), ("test", ("test_batch",))):
        pixels = np.concatenate([contents[name]["data"] for name in names]).reshape(-1, 3, 32, 32)
        assert np.array_equal(data.splits[split].images.numpy(), pixels)
        assert data.splits[split].images.is_contiguous()
        assert data.splits[split].labels.dtype == torch.int64
        assert data.splits[split].labels.tolist() == [label for n in names for label in contents[n]["labels"]]
    assert data.num_classes == 10
    assert data.class_names[3] == "class 3"
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert data.std == (0.2023, 0.1994, 0.2010)


def test_reads_only_the_split_asked_for(small_cifar10):
    root, _ = small_cifar10
    assert set(load_cifar("cifar10", str(root), download=False, splits=("test",)).splits) == {"test"}


@pytest.mark.parametrize("dataset", [CIFAR10, CIFAR100])
def test_missing_files_name_the_folder_and_the_download(tmp_path, dataset):
    with pytest.raises(InputError) as caught:
        load_cifar(dataset.__name__.lower(), str(tmp_path), download=False, splits=BOTH)
    message = str(caught.value)
    assert str(tmp_path / dataset.base_folder) in message
    assert "--data.download true" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_damaged_file_is_refused(small_cifar10, name):
    root, _ = small_cifar10
    path = root / CIFAR10.base_folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="CIFAR10 is missing or damaged"):
        load_cifar("cifar10", str(root), download=False, splits=BOTH)


def test_failed_download_says_why(tmp_path, monkeypatch):
    # An address nobody serves: the real download code fails without leaving the machine.
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(InputError, match=r"CIFAR10 could not be downloaded into .*check the network"):
        load_cifar("cifar10", str(tmp_path), download=True, splits=BOTH)
