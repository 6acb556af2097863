"""Energy: totals are op_counter's to the operation, layers are what a count by hand gives."""

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import layer, neuron, op_counter
from torch import Tensor, nn

from gac import BatchFirst, GatedAttentionCoding, create_model
from gac.analysis.energy import (
    _UNCOUNTED,
    AC_PJ,
    MAC_PJ,
    PUBLISHED_NOTE,
    format_energy,
    is_spike_driven,
    measure_energy,
)
from gac.errors import InputError
from lively import lively


def network(coding: str, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return lively(create_model("gac_msresnet18_cifar", 5, 3, coding=coding, width=8, depth=[1, 1, 1]), images)


@pytest.mark.parametrize("coding", ["gac", "direct", "rate", "latency", "phase"])
def test_totals_are_those_of_op_counter(coding: str) -> None:
    images = torch.rand(6, 3, 9, 9)
    net = network(coding, images)
    torch.manual_seed(1)
    energy = measure_energy(net, images.split(4))
    mac = op_counter.MACCounter(extra_ignore_modules=[nn.BatchNorm2d])
    synop = op_counter.SynOpCounter()
    torch.manual_seed(1)
    with torch.no_grad(), op_counter.DispatchCounterMode([mac, synop]):
        for batch in images.split(4):
            net(batch)
    assert (energy.macs, energy.synops) == (mac.get_total(), synop.get_total())
    assert min(energy.macs, energy.synops) > 0
    assert energy.full_mj == pytest.approx((MAC_PJ * energy.macs + AC_PJ * energy.synops) * 1e-9 / 6)
    for row in energy.layers:
        scope = f"MSResNet.{row.layer}"
        assert row.macs == sum(mac.get_counts()[scope].values())
        assert row.synops == sum(synop.get_counts()[scope].values())
    assert len(energy.layers) == sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in net.modules())


class TwoLayers(nn.Module):
    """A strided convolution and a linear layer, with the same spikes at the input whatever the image."""

    def __init__(self, spikes: Tensor) -> None:
        super().__init__()
        self.spikes = spikes
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(3 * 3 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.spikes).flatten(1))


def test_layers_are_what_a_count_by_hand_gives() -> None:
    torch.manual_seed(0)
    spikes = (torch.rand(2, 2, 5, 5) < 0.3).float()
    conv, head = measure_energy(TwoLayers(spikes), [torch.rand(2, 1, 4, 4)]).layers
    reached = 0
    for _, _, y, x in spikes.nonzero().tolist():
        reached += 3 * sum(abs(2 * i - y) <= 1 and abs(2 * j - x) <= 1 for i in range(3) for j in range(3))
    assert (conv.layer, conv.spiking, conv.synops, conv.macs) == ("conv", True, reached, 0)
    assert (conv.fan_in, conv.dense_macs) == (18, 2 * 27 * 18)
    assert conv.fan_out == pytest.approx(27 * 18 / 50)
    rate = spikes.mean().item()
    assert conv.rate == pytest.approx(rate)
    assert conv.paper_mj == pytest.approx(AC_PJ * rate * 27 * 18 * 1e-9)
    assert conv.full_mj == pytest.approx(AC_PJ * reached / 2 * 1e-9)
    assert (head.layer, head.spiking, head.synops, head.macs) == ("head", False, 0, 2 * 27 * 4)
    assert (head.fan_in, head.fan_out, head.paper_mj) == (27, 4, None)
    assert head.full_mj == pytest.approx(MAC_PJ * 27 * 4 * 1e-9)


def test_the_first_layer_and_what_spikes_drive_is_the_papers_convention() -> None:
    images = torch.rand(4, 3, 8, 8)
    energy = measure_energy(network("gac", images), [images])
    rows = {row.layer: row for row in energy.layers}
    spiking = [name for name, row in rows.items() if row.spiking]
    assert spiking == [f"stages.{i}.0.conv{j}.conv" for i in range(3) for j in (1, 2)]
    # Once for all three time steps.
    assert rows["stem.conv"].macs == 4 * 8 * 8 * 8 * 27
    expected = MAC_PJ * 8 * 8 * 8 * 27 + sum(AC_PJ * rows[name].rate * rows[name].dense_macs for name in spiking) / 4
    assert energy.paper_mj == pytest.approx(expected * 1e-9)
    text = " ".join(format_energy(energy).split())
    assert "4.6 pJ x MAC of stem.conv + 0.9 pJ x T x rate" in text
    assert "no term for coding.gate.temporal.squeeze" in text
    # Spikes of a coding enter the stem too.
    rate = measure_energy(network("rate", images), [images])
    assert rate.layers[0].spiking
    assert '"paper": 0.9 pJ' in format_energy(rate)


def test_the_published_energies_are_less_than_the_spatial_channel_convolutions() -> None:
    net = create_model("gac_msresnet18", 10, 1)
    rows = {row.layer: row for row in measure_energy(net, [torch.rand(1, 3, 224, 224)]).layers}
    counted = [rows[f"coding.gate.spatial_channel.conv{i}"] for i in (1, 2)]
    assert f"= {sum(row.macs for row in counted) / 1e9:.3f} G MAC" in PUBLISHED_NOTE
    assert f"= {sum(row.full_mj for row in counted):.2f} mJ" in PUBLISHED_NOTE
    assert sum(row.full_mj for row in counted) > 3.38


def test_any_network_of_spikingjelly_is_measured_from_a_fresh_state() -> None:
    torch.manual_seed(0)
    node = neuron.LIFNode(v_threshold=0.05, step_mode="m")
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        GatedAttentionCoding(T=2, channels=8),
        layer.Conv2d(8, 8, 3, step_mode="m"),
        node,
        layer.Conv2d(8, 2, 1, step_mode="m"),
    )
    images = torch.rand(3, 3, 8, 8)
    lively(net, images)
    counts = [measure_energy(net, [images, images]) for _ in range(2)]
    assert counts[0] == counts[1]
    assert counts[0].synops == 2 * measure_energy(net, [images]).synops > 0
    assert isinstance(node.v, float)
    # What follows the plugged-in coding sees gated spikes, which are real numbers.
    driven = is_spike_driven(net, [images])
    assert driven["3"] is False
    assert driven["5"] is True


def test_a_real_input_is_no_spike_because_the_weights_are_binary() -> None:
    net = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.zeros_(net.weight)
    assert is_spike_driven(net, [torch.rand(2, 1, 3, 3) + 2]) == {"Conv2d": False}


def test_nothing_is_left_on_the_network_and_inference_mode_hides_nothing() -> None:
    images = torch.rand(2, 3, 8, 8)
    net = network("gac", images)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    expected = measure_energy(net, [images])
    net.train()
    with torch.inference_mode():
        assert measure_energy(net, [images.clone()]) == expected
    assert net.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        return F.scaled_dot_product_attention(x, x, x)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(InputError, match=r"Attention cannot be counted, .* no rule for aten\._?scaled_dot_product"):
        measure_energy(Attention(), [torch.rand(1, 2, 3, 3)])
    with pytest.raises(InputError, match="Flatten runs no convolution or linear layer"):
        measure_energy(nn.Flatten(), [torch.rand(1, 2, 3, 3)])
    with pytest.raises(InputError, match="there are no images"):
        measure_energy(nn.Conv2d(1, 1, 1), [])
    with pytest.raises(InputError, match=r"expected images \[B, C, H, W\] .*, got \[4, 5\]"):
        measure_energy(nn.Linear(5, 1), [torch.rand(4, 5)])


def test_an_image_counts_once_in_batch_first_layout_too() -> None:
    images = torch.rand(3, 3, 8, 8)
    net = network("gac", images)
    assert measure_energy(BatchFirst(net), [images]).full_mj == measure_energy(net, [images]).full_mj
    sequence = torch.rand(3, 2, 3, 8, 8)
    found, expected = measure_energy(BatchFirst(net), [sequence.transpose(0, 1)]), measure_energy(net, [sequence])
    assert (found.images, found.full_mj) == (expected.images, expected.full_mj)
    assert found.images == 2


@pytest.mark.parametrize(
    "name",
    [
        "conv2d",
        "linear",
        "mkldnn_rnn_layer",
        "_trilinear",
        "mv",
        "dot",
        "addmv",
        "_sparse_addmm",
        "lstm",
        "_scaled_dot_product_flash_attention_for_cpu",
    ],
)
def test_operations_with_weights_are_known_by_their_names(name: str) -> None:
    assert _UNCOUNTED.fullmatch(f"aten.{name}.default")


@pytest.mark.parametrize("name", ["upsample_bilinear2d", "add", "constant_pad_nd", "mean", "native_layer_norm"])
def test_others_are_not(name: str) -> None:
    assert not _UNCOUNTED.fullmatch(f"aten.{name}.default")
