"""Gated attention coding takes the place of a host's first neuron, and of no other."""

import copy
from collections.abc import Callable

import pytest
import torch
from spikingjelly.activation_based import base, functional, layer, neuron
from spikingjelly.activation_based.model.ms_resnet import MSResNet
from torch import Tensor, nn

from gac import GatedAttentionCoding, create_model, replace_input_neuron
from gac.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


class Host(nn.Module):
    """A plain network whose layers are registered in another order than they run in."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.head = nn.Sequential(layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(6, 3))
        self.body = nn.Sequential(neuron.LIFNode(v_threshold=0.2), layer.Conv2d(4, 6, 3), neuron.IFNode())
        self.stem = nn.Sequential(layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4))
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


def sequence(T: int = 3, batch: int = 2) -> Tensor:
    return torch.rand(batch, 2, 8, 8, generator=torch.Generator().manual_seed(0)).expand(T, -1, -1, -1, -1)


def host(seed: int = 0) -> Host:
    torch.manual_seed(seed)
    return Host()


def test_it_is_one_assignment() -> None:
    net, by_hand = host(), host()
    first = net.body[0]
    torch.manual_seed(1)
    coding = replace_input_neuron(net, sequence(batch=1), kernel_size=3, temporal_init="alive")
    torch.manual_seed(1)
    by_hand.body[0] = GatedAttentionCoding(3, 4, 3, temporal_init="alive", neuron=by_hand.body[0])
    assert net.body[0] is coding
    assert coding.lif is first
    for training in (True, False):
        found, expected = net.train(training)(sequence()), by_hand.train(training)(sequence())
        assert found.std() > 0
        assert torch.equal(found, expected)
        functional.reset_net(net)
        functional.reset_net(by_hand)
    assert not torch.equal(net(sequence()), host()(sequence()))


def test_the_host_is_left_as_it_was() -> None:
    net = host().train()
    net.stem[1].eval().requires_grad_(False)
    net(sequence())
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    first = net.body[0]
    coding = replace_input_neuron(net, sequence(batch=1))
    net.body[0] = first
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(isinstance(value, Tensor) for _, value in base.named_memories(net))
    assert not any(module._forward_hooks for module in (*net.modules(), *coding.modules()))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_gate_has_the_hosts_precision() -> None:
    net = host().double()
    replace_input_neuron(net, sequence(T=5).double())
    net(sequence(T=5).double()).sum().backward()
    gate = net.body[0].gate
    assert gate.temporal.T == 5
    assert gate.spatial_channel.conv1.weight.grad.dtype == torch.float64


def test_a_frozen_host_is_served() -> None:
    net = host().requires_grad_(False)
    replace_input_neuron(net, sequence())
    net(sequence()).sum().backward()
    assert [name for name, weight in net.named_parameters() if weight.grad is not None] == [
        f"body.0.gate.{name}.weight"
        for name in ("temporal.squeeze", "temporal.expand", "spatial_channel.conv1", "spatial_channel.conv2")
    ]


class Pair(Host):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x)
        return scores, scores


def single_steps() -> nn.Module:
    net = host()
    functional.set_step_mode(net, "s")
    return net


def twice() -> nn.Module:
    net = host()
    net.body = nn.Sequential(net.body[0], layer.Conv2d(4, 4, 3, step_mode="m"), net.body[0])
    net.head[2] = layer.Linear(4, 3, step_mode="m")
    return net


def coded() -> nn.Module:
    net = host()
    replace_input_neuron(net, sequence())
    return net


def membrane_shortcuts() -> nn.Module:
    return MSResNet(3, 2, 3, layers=(1, 1, 1), base_channels=4, stem_kernel_size=3, stem_stride=1)


def ours() -> nn.Module:
    return create_model("msresnet18_cifar", 3, 3, in_channels=2, width=4, depth=[1, 1, 1])


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), sequence()[0], "runs none of SpikingJelly's neurons"),
        (single_steps, sequence()[0], r"body\.0, the first neuron, gets \[2, 4, 6, 6\] in step mode 's', expected a"),
        (Pair, sequence(), "Pair returns a tuple, expected one tensor of scores"),
        (twice, sequence(), r"body\.0, the first neuron, runs more than once"),
        (coded, sequence(), r"body\.0\.lif, the first neuron, is that of gated attention coding already"),
        (
            membrane_shortcuts,
            sequence(),
            r"goes around layer1\.0\.spike1, .* put GatedAttentionCoding between the stem",
        ),
        (ours, sequence(), r"something goes around stages\.0\.0\.lif1"),
    ],
)
def test_what_it_cannot_serve_is_refused(make: Callable[[], nn.Module], x: Tensor, message: str) -> None:
    net = make()
    modules = [*net.modules()]
    with pytest.raises(InputError, match=message):
        replace_input_neuron(net, x)
    assert [*net.modules()] == modules
