"""Published numbers are shown beside exactly the published networks."""

import pytest

from gac.evaluation.published import PUBLISHED, PublishedResult, find_published
from gac.models import create_model


@pytest.mark.parametrize("result", PUBLISHED, ids=lambda result: f"{result.model}-{result.data}-{result.T}")
def test_each_published_network_is_found(result: PublishedResult) -> None:
    classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[result.data]
    assert find_published(create_model(result.model, classes, result.T), result.data) == result


@pytest.mark.parametrize(
    "difference",
    [{"width": 32}, {"depth": [2, 2, 2]}, {"kernel_size": 3}, {"reduction": 3}, {"neuron": "imagenet"},
     {"coding": "direct"}, {"T": 5}],
    ids=str,
)  # fmt: skip
def test_another_network_is_not_compared(difference: dict) -> None:
    network = create_model("gac_msresnet18_cifar", 10, **{"T": 6, **difference})
    assert find_published(network, "cifar10") is None


def test_another_data_set_is_not_compared() -> None:
    assert find_published(create_model("gac_msresnet18_cifar", 10, 6), "digits") is None
