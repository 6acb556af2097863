"""Other normalisations in the place of the network's own are called as it would be, also for one frame for T."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from gac.models import create_model
from gac.models.blocks import ConvNorm
from gac.models.ms_resnet import MSResNet
from lively import lively

pytestmark = pytest.mark.usefixtures("one_thread")
T = 3


def network(coding: str = "gac") -> MSResNet:
    torch.manual_seed(0)
    sizes = {"width": 8, "depth": [1, 1, 1], "temporal_init": "alive"}
    net = create_model("gac_msresnet18_cifar", 5, T, coding=coding, backend="torch", **sizes)
    net = lively(net, torch.rand(16, 3, 8, 8))
    assert not torch.equal(net(images(0)), net(images(1)))
    return net


def images(seed: int = 0) -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def plain(layer: ConvNorm) -> None:
    state, layer.norm = layer.norm.state_dict(), nn.BatchNorm2d(layer.norm.num_features)
    layer.norm.load_state_dict(state)


def synchronised(layer: ConvNorm) -> None:
    layer.norm = nn.SyncBatchNorm.convert_sync_batchnorm(layer.norm)


def frozen(layer: ConvNorm) -> None:
    state, layer.norm = layer.norm.state_dict(), FrozenBatchNorm2d(layer.norm.num_features)
    layer.norm.load_state_dict(state)


def folded(layer: ConvNorm) -> None:
    layer.conv, layer.norm = fuse_conv_bn_eval(layer.conv, layer.norm), nn.Identity()


def grouped(layer: ConvNorm) -> None:
    layer.norm = nn.GroupNorm(2, layer.norm.num_features)


def instance(layer: ConvNorm) -> None:
    layer.norm = nn.InstanceNorm2d(layer.norm.num_features, track_running_stats=True)


def replaced(net: MSResNet, replace: Callable[[ConvNorm], None]) -> MSResNet:
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        if isinstance(module, ConvNorm):
            replace(module)
    return net


@pytest.mark.parametrize("coding", ["gac", "direct", "latency"])
@pytest.mark.parametrize("replace", [plain, synchronised, frozen, folded])
def test_what_computes_the_same_gives_the_same(replace: Callable, coding: str) -> None:
    # Folding rounds otherwise, which in float64 changes no spike here.
    net = network(coding).double()
    other = replaced(net, replace).double().eval()
    torch.testing.assert_close(other(images().double()), net(images().double()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("replace", [plain, synchronised])
def test_training_updates_the_same_statistics(replace: Callable) -> None:
    net = network()
    other = replaced(net, replace).train()
    torch.testing.assert_close(other(images()), net.train()(images()), rtol=0, atol=1e-6)
    assert not torch.equal(other.stem.norm.running_var, network().stem.norm.running_var)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("replace", [plain, synchronised, frozen, folded, grouped, instance])
def test_an_image_is_a_sequence_of_equal_frames(replace: Callable, training: bool) -> None:
    net = replaced(network(), replace).train(training)
    other = copy.deepcopy(net)
    assert torch.equal(net(images()), other(images().expand(T, -1, -1, -1, -1)))
    for (name, buffer), theirs in zip(net.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, theirs, rtol=0, atol=1e-6, msg=name)


def test_a_replaced_layer_leaves_the_fused_execution(neurons_on_kernels) -> None:
    net = replaced(network(), folded)
    expected = net(images())
    net.set_backend("auto")
    assert torch.equal(net(images()), expected)
