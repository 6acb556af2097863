"""What is exported says what its user must know, and is tried on real images."""

import hashlib
from dataclasses import replace

import pytest
import torch

from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.checkpoint.weights import FOLDER
from gac.data.digits import load_digits
from gac.errors import InputError
from gac.export.source import open_source

DIGITS = FOLDER / "digits.safetensors"


def test_the_metadata_are_the_checkpoints(digits):
    said, data = digits.metadata(), load_digits()
    assert said["checkpoint_sha256"] == hashlib.sha256(DIGITS.read_bytes()).hexdigest()
    assert said["classes"] == list(data.class_names)
    assert (said["mean"], said["std"]) == (list(data.mean), list(data.std))
    assert (said["T"], said["image_size"], said["channels"], said["frames"]) == (4, [8, 8], 1, None)
    assert open_source(str(DIGITS), 0).metadata() == said


def test_images_are_test_images_evenly_spread(digits):
    data = load_digits()
    expected = (data.splits["test"].images / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    images, labels = (torch.cat(each) for each in zip(*digits.test_images(), strict=True))
    torch.testing.assert_close(images, expected)
    assert torch.equal(labels, data.splits["test"].labels)
    few = replace(digits, images=100)
    images, labels = (torch.cat(each) for each in zip(*few.test_images(), strict=True))
    torch.testing.assert_close(images, expected[::4])
    assert torch.equal(labels, data.splits["test"].labels[::4])
    assert few.tried_on == "90 of the 360 test images of digits"


def test_calibration_images_are_those_of_training(digits):
    train = load_digits().splits["train"]
    brightness = (train.images / 255 - torch.tensor(load_digits().mean)) / torch.tensor(load_digits().std)
    batches = list(digits.training_images(100))
    assert sum(map(len, batches)) == 100
    # Crops of them, which have no pixel brighter than the brightest of all.
    assert max(batch.max() for batch in batches) == brightness.max()
    assert [batch.shape[1:] for batch in batches] == [torch.Size([1, 8, 8])] * len(batches)
    assert len({tuple(image.flatten().tolist()) for batch in batches for image in batch}) > 90


def test_without_images_the_data_set_is_not_opened(tmp_path):
    payload = read_checkpoint(DIGITS)
    payload["config"]["data"] |= {"name": "cifar10", "root": str(tmp_path / "nowhere")}
    write_checkpoint(tmp_path / "best.pt", payload)
    assert open_source(str(tmp_path / "best.pt"), 0).metadata()["classes"] == list("0123456789")
    with pytest.raises(InputError, match="nowhere"):
        open_source(str(tmp_path / "best.pt"), 1)
    # Names that several classes have tell none apart, as in an evaluation.
    payload["data"] |= {"class_names": ("a", *"abcdefghi")}
    write_checkpoint(tmp_path / "same.pt", payload)
    assert open_source(str(tmp_path / "same.pt"), 0).metadata()["classes"] == list("0123456789")
    with pytest.raises(InputError, match="elsewhere"):
        open_source(str(tmp_path / "best.pt"), 1, root=str(tmp_path / "elsewhere"))


def test_coding_of_intensities_takes_images_that_are_not_standardised(tmp_path):
    payload = read_checkpoint(DIGITS)
    payload["config"]["model"] |= {"coding": "latency"}
    payload["model"] = {name: each for name, each in payload["model"].items() if not name.startswith("coding.")}
    write_checkpoint(tmp_path / "best.pt", payload)
    for count in (0, 4):
        source = open_source(str(tmp_path / "best.pt"), count)
        assert (source.metadata()["mean"], source.metadata()["std"]) == ([0.0], [1.0])
    assert next(iter(source.training_images(8))).min() >= 0


def test_files_that_do_not_say_their_data_are_refused(tmp_path, digits):
    torch.save(digits.network.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(InputError, match=r"bare\.pt: does not say the classes and the normalisation"):
        open_source(str(tmp_path / "bare.pt"), 0)
    with pytest.raises(InputError, match="no such file"):
        open_source(str(tmp_path / "none.pt"), 0)
