"""What a network resets at every call is what SpikingJelly's functions would."""

from collections.abc import Callable

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

from gac import LIFNode, create_model
from gac.models import resetting
from gac.models.ms_resnet import MSResNet


class Own(nn.Module):
    """Has a reset and is none of SpikingJelly's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1


class Forwarding(nn.Module):
    """Has what the module inside it has, as torch.compile's wrapper does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def _on_an_instance(net: MSResNet) -> None:
    net.head.reset = lambda: None


def _a_child_of_that_name(net: MSResNet) -> None:
    net.head.reset = nn.Identity()


def _replaced(net: MSResNet) -> None:
    net.lif = neuron.IFNode(step_mode="m")


def _own(net: MSResNet) -> None:
    net.stages[0][0].conv1.norm = nn.Sequential(nn.BatchNorm2d(8), Own(), Forwarding(LIFNode()))


def _shared_and_none(net: MSResNet) -> None:
    net.stages[1][0].lif1 = net.stages[0][0].lif1
    net.register_module("nothing", None)


@pytest.mark.parametrize("change", [_on_an_instance, _a_child_of_that_name, _replaced, _own, _shared_and_none])
def test_finds_what_spikingjelly_does(change: Callable[[MSResNet], None]) -> None:
    net = create_model("gac_msresnet18_cifar", 3, 2, width=4, depth=[1, 1, 1])
    before = resetting.collect(net)
    assert set(before) == set(functional.collect_reset_modules(net)) == {m for m in before if type(m) is LIFNode}
    change(net)
    found = resetting.collect(net)
    assert set(found) == set(functional.collect_reset_modules(net)) != set(before)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
def test_resets_what_is_not_in_that_state(v_reset: float | None) -> None:
    node, untouched = LIFNode(v_reset=v_reset, store_v_seq=True), LIFNode(v_reset=v_reset)
    start = node.v
    node(torch.ones(2, 3))
    assert isinstance(node.v, torch.Tensor)
    assert node.v_seq is not None
    resetting.reset([node, untouched])
    assert node.v == untouched.v == start
    assert node.v_seq is None
    node.v = 0.5
    resetting.reset([node])
    assert node.v == start
    node.v_seq = torch.ones(1)
    resetting.reset([node])
    assert node.v_seq is None


def test_calls_a_reset_of_ones_own() -> None:
    class Counting(LIFNode):
        resets = 0

        def reset(self) -> None:
            self.resets += 1

    counting, called = Counting(), []
    on_instance = LIFNode()
    on_instance.reset = lambda: called.append(1)
    resetting.reset([counting, on_instance])
    assert counting.resets == 1
    assert called == [1]
