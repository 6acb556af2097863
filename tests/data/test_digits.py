import numpy as np
import torch
from sklearn.datasets import load_digits as sklearn_digits

from gac.data.digits import load_digits


def test_images_are_scikit_learns_scaled_to_bytes():
    digits = load_digits()
    ours = torch.cat([digits.splits[split].images for split in ("train", "test")])
    labels = torch.cat([digits.splits[split].labels for split in ("train", "test")])
    assert ours.shape == (1797, 1, 8, 8)
    assert ours.dtype == torch.uint8
    # Undo the scaling and compare as sets of (image, label): the split is a partition of the original.
    original = sklearn_digits()
    rows = np.column_stack([np.rint(ours.flatten(1).numpy() * (16 / 255)), labels.numpy()])
    expected = np.column_stack([original.data, original.target])
    assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])


def test_split_keeps_the_shares_of_the_classes():
    digits = load_digits()
    train, test = (torch.bincount(digits.splits[split].labels) for split in ("train", "test"))
    assert len(digits.splits["train"].labels) == 1437
    assert len(digits.splits["test"].labels) == 360
    assert ((test / (train + test) - 0.2).abs() < 0.01).all()


def test_split_is_fixed():
    # Stored labels: with another split, accuracies could not be compared with earlier ones.
    digits = load_digits()
    assert digits.splits["train"].labels[:10].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8]
    assert digits.splits["test"].labels[:10].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]
    np.random.seed(1)
    torch.manual_seed(1)
    again = load_digits()
    for split in ("train", "test"):
        assert torch.equal(digits.splits[split].images, again.splits[split].images)


def test_statistics_are_the_training_parts():
    digits = load_digits()
    pixels = digits.splits["train"].images.double() / 255
    assert np.isclose(digits.mean[0], float(pixels.mean()), rtol=1e-12)
    assert np.isclose(digits.std[0], float(pixels.std(correction=0)), rtol=1e-12)
