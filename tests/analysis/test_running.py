"""Running a network to look inside it: what cannot be watched is refused."""

import pytest
import torch
from torch import nn

from gac.analysis.running import find_layer, run
from gac.errors import InputError


def compiled_in_place() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    net[0].compile(backend="eager")
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(nn.Conv2d(1, 1, 1), backend="eager"),
        compiled_in_place,
        lambda: torch.jit.trace(nn.Conv2d(1, 1, 1), torch.rand(1, 1, 2, 2)),
    ],
    ids=["compile", "compiled in place", "traced"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_compiled_network_is_refused(make) -> None:
    with pytest.raises(InputError, match=r"is compiled, .*pass the network that it was made from"):
        run(make(), [torch.rand(1, 1, 2, 2)])


def test_a_network_returns_to_its_mode_when_it_fails() -> None:
    net = nn.Conv2d(2, 1, 1)
    with pytest.raises(RuntimeError, match="channels"):
        run(net, [torch.rand(1, 1, 2, 2)])
    assert net.training


def test_a_layer_is_found_or_named() -> None:
    net = nn.ModuleDict({"first": nn.Conv2d(1, 1, 1), "second": nn.Linear(1, 1)})
    assert find_layer(net, "first", nn.Conv2d, "convolution") is net["first"]
    with pytest.raises(InputError, match=r"no convolution 'second': there are first$"):
        find_layer(net, "second", nn.Conv2d, "convolution")
    with pytest.raises(InputError, match=r"no convolution 'fist' \(did you mean first\?\)"):
        find_layer(net, "fist", nn.Conv2d, "convolution")
    with pytest.raises(InputError, match="the network has no pooling"):
        find_layer(net, "pool", nn.AvgPool2d, "pooling")
