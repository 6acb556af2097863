"""Firing rates counted by hand, and dead layers by name."""

import logging

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from gac.analysis.firing import FiringRates, LayerFiring, measure_firing, record_spikes
from gac.errors import InputError
from gac.evaluation.evaluate import EvaluationStep, evaluate
from gac.models import create_model
from gac.neuron import LIFNode
from lively import lively

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
    # 2 spikes at both steps, 0.9 only at the second (0.9, then 0.45 + 0.9), 0 never.
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


@pytest.mark.c_kernels
def test_neurons_on_the_c_kernels_are_watched_under_autocast_too() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    network = lively(create_model("gac_msresnet18_cifar", 5, 3, width=8, depth=[1, 1, 1]), images)
    rates = []
    for backend in ("auto", "c"):
        network.set_backend(backend)
        firing = FiringRates(network)
        evaluate(EvaluationStep(network, CPU, "bf16"), firing.watch([(images, labels)]))
        rates.append(firing.read())
        with torch.autocast("cpu", torch.bfloat16):
            assert measure_firing(network, [images])
    assert rates[0] == rates[1]
    assert 0 < rates[0]["coding.lif"] < 1


def by_hand(firing: LayerFiring) -> Tensor:
    return firing.spikes.double() / firing.neurons


def test_every_time_step_and_channel_is_counted() -> None:
    images = torch.rand(7, 3, 8, 8)
    torch.manual_seed(0)
    network = lively(create_model("gac_msresnet18_cifar", 5, 3, width=8, depth=[1, 1, 1]), images)
    layers = {layer.layer: layer for layer in measure_firing(network, images.split(4))}
    assert list(layers) == [name for name, module in network.named_modules() if isinstance(module, neuron.BaseNode)]
    for name, layer in layers.items():
        spikes = record_spikes(network, images, name)
        assert spikes.shape[:2] == (3, 7)
        assert layer.neurons == 7 * spikes.shape[3] * spikes.shape[4]
        assert torch.equal(by_hand(layer), spikes.double().mean((1, 3, 4)))
        assert layer.rate == pytest.approx(spikes.double().mean().item())
        assert layer.rate_by_time == pytest.approx(spikes.double().mean((1, 2, 3, 4)).tolist())
        assert layer.rate_by_channel == pytest.approx(spikes.double().mean((0, 1, 3, 4)).tolist())
    assert 0 < layers["stages.1.0.lif1"].rate < 1
    firing = FiringRates(network)
    labels = torch.zeros(7, dtype=torch.int64)
    evaluate(EvaluationStep(network, CPU), firing.watch([(images, labels)]))
    assert firing.read() == {name: layer.rate for name, layer in layers.items()}


def test_a_layer_of_one_neuron_for_each_image_is_counted() -> None:
    network = nn.Sequential(nn.Flatten(2), nn.Flatten(1), LIFNode())
    images = torch.tensor([[2.0, 0.0, 2.0], [2.0, 0.0, 0.0]]).view(2, 3, 1, 1)
    (layer,) = measure_firing(network, [images])
    assert (layer.spikes.tolist(), layer.neurons) == ([[2], [1]], 3)


class FourChannels(nn.Module):
    """A spiking layer of which one channel never spikes, one at the last of two steps, one always, one at times."""

    def __init__(self) -> None:
        super().__init__()
        self.lif = LIFNode()

    def forward(self, images: Tensor) -> Tensor:
        drive = torch.tensor([0.0, 0.9, 2.0, 2.0]).view(4, 1, 1).repeat(2, len(images), 1, 2, 2)
        drive[1, :, 3, 0, 0] = -2.0
        return self.lif(drive)


def test_dead_and_saturated_channels_are_told() -> None:
    (layer,) = measure_firing(FourChannels(), [torch.zeros(3, 1, 2, 2)])
    assert layer.spikes.tolist() == [[0, 0, 12, 12], [0, 12, 12, 9]]
    assert (layer.dead_channels, layer.saturated_channels) == ([0], [2])
    assert layer.to_dict() == {
        "layer": "lif",
        "rate": 57 / 96,
        "rate_by_time": [0.5, 33 / 48],
        "rate_by_channel": [0, 0.5, 1, 21 / 24],
        "dead_channels": [0],
        "saturated_channels": [2],
    }


def test_a_layer_that_is_not_there_is_named_with_the_closest() -> None:
    network, images = create_model("gac_msresnet18_cifar", 3, 2, width=4, depth=[1, 1, 1]), torch.rand(1, 3, 8, 8)
    for wrong, right in (("stages.0.0.lif3", "stages.0.0.lif"), ("coding.life", "coding.lif")):
        with pytest.raises(InputError, match=rf"no spiking layer '{wrong}' \(did you mean {right}\d?\?\): there are"):
            record_spikes(network, images, wrong)


def test_what_has_no_time_steps_to_count_is_refused() -> None:
    images = [torch.rand(1, 3, 8, 8)]
    with pytest.raises(InputError, match="Conv2d has no spiking layers"):
        measure_firing(nn.Conv2d(3, 1, 1), images)
    with pytest.raises(InputError, match=r"spiking layer 1 runs in step mode 's'.*set_step_mode"):
        measure_firing(nn.Sequential(nn.Conv2d(3, 1, 1), neuron.LIFNode()), images)
    idle = create_model("msresnet18_cifar", 3, 2, width=4, depth=[1, 1, 1])
    idle.idle = LIFNode()
    with pytest.raises(InputError, match="spiking layer idle does not run"):
        record_spikes(idle, images[0], "idle")
    assert "idle" not in [layer.layer for layer in measure_firing(idle, images)]
