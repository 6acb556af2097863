"""Firing rates counted by hand, and dead layers by name."""

import logging

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from gac.evaluation.evaluate import EvaluationStep, evaluate
from gac.evaluation.firing import FiringRates
from gac.models import create_model
from gac.neuron import LIFNode

CPU = torch.device("cpu")


class Constant(nn.Module):
    """Two spiking layers whose spikes are the images' own: [B, T, K] to [T, B, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LIFNode()
        self.second = LIFNode(v_threshold=0.5)

    def forward(self, images: Tensor) -> Tensor:
        self.first.reset()
        self.second.reset()
        return self.second(self.first(images.transpose(0, 1)))


def batches(*values: float) -> list[tuple[Tensor, Tensor]]:
    """Batches of two images with two steps and four inputs, each input ``value``."""
    return [(torch.full((2, 2, 4), value), torch.zeros(2, dtype=torch.int64)) for value in values]


def rates_of(firing: FiringRates, *values: float) -> dict[str, float]:
    evaluate(EvaluationStep(firing.network, CPU, channels_last=False), firing.watch(batches(*values)))
    return firing.read()


def test_rates_are_the_share_of_neurons_and_steps_that_spike() -> None:
    # 2 spikes at both steps, 0.9 at the second alone (0.9, then 0.45 + 0.9), 0 never.
    assert rates_of(FiringRates(Constant()), 2.0, 0.9, 0.0) == {"first": 0.5, "second": 0.5}
    assert rates_of(FiringRates(Constant()), 2.0, 0.0) == {"first": 0.5, "second": 0.5}


def test_only_the_first_images_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FiringRates, "IMAGES", 3)
    firing = FiringRates(Constant())
    hooked = []
    for _ in firing.watch(batches(2.0, 0.0, 2.0, 2.0)):
        hooked.append(len(firing.network.first._forward_hooks))
        firing.network(batches(2.0 if len(hooked) > 2 else 0.9)[0][0])
    assert hooked == [1, 1, 0, 0]
    assert firing.read()["first"] == 0.5


def test_no_hook_is_left_when_an_evaluation_stops() -> None:
    firing = FiringRates(Constant())
    watched = firing.watch(batches(2.0, 2.0))
    next(watched)
    watched.close()
    assert not firing.network.first._forward_hooks


def test_a_dead_layer_is_named_once_until_it_lives(caplog: pytest.LogCaptureFixture) -> None:
    firing = FiringRates(Constant())
    with caplog.at_level(logging.WARNING, "gac"):
        rates_of(firing, 0.0)
        rates_of(firing, 0.0)
    assert [message.split(",")[0] for message in caplog.messages] == [
        "dead layer: first never spiked for 2 test images",
        "dead layer: second never spiked for 2 test images",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "gac"):
        rates_of(firing, 2.0, 0.0)
        assert caplog.messages == []
        assert rates_of(firing, 2.0) == {"first": 1.0, "second": 1.0}
    assert [message.split(",")[0] for message in caplog.messages] == [
        "dead layer: first always spiked for 2 test images",
        "dead layer: second always spiked for 2 test images",
    ]


@pytest.mark.parametrize("coding", ["gac", "direct", "rate", "latency", "phase"])
def test_every_coding_has_its_layers(coding: str) -> None:
    network = create_model("msresnet18_cifar", 3, 2, coding=coding, width=4, depth=[1, 1, 1])
    firing = FiringRates(network)
    images, labels = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    evaluate(EvaluationStep(network, CPU), firing.watch([(images, labels)]))
    layers = [name for name, module in network.named_modules() if isinstance(module, neuron.BaseNode)]
    assert list(firing.read()) == layers
    assert ("coding.lif" in layers) is (coding == "gac")
