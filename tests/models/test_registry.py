import copy
import dataclasses

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate

from gac.models import create_model, describe, list_models
from gac.neuron import PRESETS, SURROGATES, LIFNode


def test_the_names():
    assert list_models() == [
        "gac_msresnet18_cifar",
        "gac_msresnet18",
        "gac_msresnet34",
        "gac_msresnet104",
        "gac_maxresnet18_cifar",
        "msresnet18_cifar",
        "msresnet18",
        "msresnet34",
        "msresnet104",
        "maxresnet18_cifar",
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


def test_describe_says_nothing_of_an_attention_that_is_not_there():
    sizes = {"width": 4, "depth": [1, 1, 1]}
    assert len(describe(create_model("gac_msresnet18_cifar", 10, 4, gate="spatial_channel", **sizes))) == 1
    assert len(describe(create_model("gac_msresnet18_cifar", 10, 4, gate="temporal", **sizes))) == 2


CHOSEN = {"tau": 3.0, "v_threshold": 0.6, "surrogate": "atan", "detach_reset": True}


@pytest.mark.parametrize(
    "constants", [CHOSEN, CHOSEN | {"surrogate": "erf", "detach_reset": False}], ids=["atan", "erf"]
)
def test_a_network_of_chosen_constants_is_that_of_spikingjellys_neurons(constants):
    torch.manual_seed(0)
    net = create_model("gac_msresnet18_cifar", 3, 3, width=8, depth=[1, 1, 1], temporal_init="alive", **constants)
    net = net.double()
    plain = copy.deepcopy(net)
    replaced = 0
    for module in [*plain.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, LIFNode):
                setattr(
                    module,
                    name,
                    neuron.LIFNode(
                        constants["tau"],
                        False,
                        constants["v_threshold"],
                        surrogate_function=SURROGATES[constants["surrogate"]](),
                        detach_reset=constants["detach_reset"],
                        step_mode="m",
                    ),
                )
                replaced += 1
    assert replaced == 8
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    logits = []
    for each in (net, plain):
        logits.append(each(x))
        logits[-1].square().sum().backward()
    assert logits[1].std() > 0.01
    torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)
    for (key, a), b in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=key)


def test_all_constants_may_be_given_at_once():
    soft = dataclasses.replace(PRESETS["imagenet"], v_reset=None, surrogate=surrogate.Sigmoid(alpha=3.0))
    net = create_model("msresnet18_cifar", 3, 2, width=4, depth=[1, 1, 1], neuron=soft, tau=1.5)
    neurons = [module for module in net.modules() if isinstance(module, LIFNode)]
    expected = (1.5, False, 0.5, None, True, "Sigmoid", 3.0)
    assert len(neurons) == 7
    assert {node.lif_parameters().flatten() for node in neurons} == {expected}
    assert len({id(node.surrogate_function) for node in neurons}) == 7


def test_constants_that_make_no_neuron_are_refused():
    with pytest.raises(ValueError, match="tau must be a number > 1"):
        create_model("msresnet18_cifar", 3, tau=0.5)
    with pytest.raises(ValueError, match=r"did you mean sigmoid\?"):
        create_model("msresnet18_cifar", 3, surrogate="sigmod")
