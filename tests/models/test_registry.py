import pytest
import torch

from gac.models import create_model, describe, list_models


def test_the_names():
    assert list_models() == [
        "gac_msresnet18_cifar",
        "gac_msresnet18",
        "gac_msresnet34",
        "msresnet18_cifar",
        "msresnet18",
        "msresnet34",
    ]


@pytest.mark.parametrize(
    ("name", "classes", "T", "millions"),
    [
        ("gac_msresnet18_cifar", 10, 6, 12.633),
        ("gac_msresnet18_cifar", 100, 6, 12.679),
        ("gac_msresnet18", 1000, 4, 11.825),
        ("gac_msresnet34", 1000, 4, 21.933),
        ("msresnet18_cifar", 10, 6, 12.502),
    ],
)
def test_the_published_numbers_of_parameters(name, classes, T, millions):
    count = sum(p.numel() for p in create_model(name, classes, T).parameters())
    assert round(count / 1e6, 3) == millions


@pytest.mark.parametrize(
    ("name", "coding", "expected"),
    [
        ("gac_msresnet18_cifar", None, "gac"),
        ("msresnet18_cifar", None, "direct"),
        ("msresnet18_cifar", "gac", "gac"),
        ("gac_msresnet18_cifar", "rate", "rate"),
    ],
)
def test_the_coding_follows_the_name_unless_chosen(name, coding, expected):
    net = create_model(name, 3, 2, coding=coding, width=4, depth=[1, 1, 1])
    assert net.coding_name == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet18", 10), "unknown network 'resnet18', expected one of: gac_msresnet18_cifar"),
        (("gac_gac_msresnet18", 10), "unknown network"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(*arguments)


def test_an_unknown_coding_is_refused():
    with pytest.raises(ValueError, match="coding must be one of gac, direct, rate, latency, phase"):
        create_model("msresnet18", 10, coding="burst")


def test_describe_reports_a_dead_temporal_branch():
    net = create_model("gac_msresnet18_cifar", 10, 4, width=4, depth=[1, 1, 1])
    squeeze = net.coding.gate.temporal.squeeze.weight
    with torch.no_grad():
        squeeze.copy_(-squeeze.abs())
    size, temporal = describe(net)
    assert "T=4, gac coding" in size
    assert "2 of 2 hidden units dead" in temporal
    assert "model.temporal_init=alive" in temporal
    with torch.no_grad():
        squeeze[0].neg_()
    assert "1 of 2 hidden units dead" in describe(net)[1]
    assert "temporal_init" not in describe(net)[1]
