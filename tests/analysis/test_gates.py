"""Gates: statistics and maps are those of the gate computed by its equation, fused or not."""

import pytest
import torch
from torch import Tensor, nn

from gac import GatedAttentionCoding, create_model
from gac.analysis.gates import measure_gates
from gac.errors import InputError
from gac.models import fused
from lively import lively

T = 3


def network(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    options = {"width": 8, "depth": [1, 1, 1], "temporal_init": "alive"}
    net = lively(create_model("gac_msresnet18_cifar", 5, T, **options), images)
    with torch.no_grad():
        net.coding.gate.temporal.expand.weight.mul_(20)  # far from 1/2, as after training
    return net


def gate_of(network: nn.Module, images: Tensor) -> Tensor:
    """The gate [T, B, C, H, W] of static images, by the paper's equation."""
    with torch.no_grad():
        features, gate = network.stem(images), network.coding.gate
        return torch.sigmoid(gate.temporal(features)[:, :, None, None, None] * gate.spatial_channel(features))


def check(network: nn.Module, images: Tensor) -> None:
    expected = gate_of(network, images)
    (gates,) = measure_gates(network, images.split(4), maps=5)
    assert gates.layer == "coding.gate"
    torch.testing.assert_close(gates.mean, expected.double().mean((1, 3, 4)))
    assert gates.by_time == pytest.approx(expected.mean((1, 2, 3, 4)).tolist())
    assert gates.by_channel == pytest.approx(expected.mean((0, 1, 3, 4)).tolist())
    torch.testing.assert_close(gates.maps, expected.mean(2).transpose(0, 1)[:5])
    assert gates.temporal.shape == (len(images), T)
    assert gates.maps.std() > 0.05
    assert not any(module._forward_hooks for module in network.modules())


def test_gates_follow_the_equation() -> None:
    images = torch.rand(7, 3, 8, 8)
    check(network(images), images)


def test_gates_are_seen_while_the_network_runs_fused(neurons_on_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(7, 3, 8, 8)
    net = network(images)
    ran = []
    forward = fused.forward
    monkeypatch.setattr(fused, "forward", lambda net, x: ran.append(len(x)) or forward(net, x))
    check(net, images)
    assert ran == [4, 3]


def test_sequences_have_their_own_gate_at_each_step() -> None:
    torch.manual_seed(0)
    coding = GatedAttentionCoding(T, 4, temporal_init="alive")
    sequence = torch.rand(T, 5, 4, 6, 6)
    (gates,) = measure_gates(coding, [sequence, sequence[:, :2]])
    with torch.no_grad():
        expected = torch.sigmoid(
            coding.gate.temporal(sequence)[:, :, None, None, None] * coding.gate.spatial_channel(sequence)
        )
    both = torch.cat([expected, expected[:, :2]], 1)
    torch.testing.assert_close(gates.mean, both.double().mean((1, 3, 4)))
    torch.testing.assert_close(gates.maps, both.mean(2).transpose(0, 1))


def test_a_network_without_gates_is_refused() -> None:
    with pytest.raises(InputError, match="MSResNet has no gated attention"):
        measure_gates(create_model("msresnet18_cifar", 5, T, width=4, depth=[1, 1, 1]), [torch.rand(1, 3, 8, 8)])
    with pytest.raises(InputError, match="no images"):
        measure_gates(GatedAttentionCoding(T, 4), [])


@pytest.mark.parametrize("gate", ["temporal", "spatial_channel"])
def test_the_gates_of_an_ablation_are_measured_too(gate: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 8, 8)
    net = create_model("gac_msresnet18_cifar", 5, T, width=8, depth=[1, 1, 1], temporal_init="alive", gate=gate)
    net = lively(net, images)
    (gates,) = measure_gates(net, [images])
    torch.testing.assert_close(gates.mean, gate_of(net, images).double().mean((1, 3, 4)))
    assert gates.temporal.equal(torch.ones(4, T)) is (gate == "spatial_channel")
