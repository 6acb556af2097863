"""A network goes to NIR and back with every spike in its place."""

import sys

import nir
import numpy as np
import pytest
import torch
from spikingjelly.activation_based import neuron, nir_exchange
from torch import nn

import gac
from gac.data.digits import load_digits
from gac.errors import InputError
from gac.export.nir import BACKBONE, ENCODER, read_nir, write_nir
from lively import lively

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    """The trained network that travels in the package, and all test images."""
    network, transform, _ = gac.load_pretrained("digits")
    return network, transform(load_digits().splits["test"].images)


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    network, images = digits
    folder = tmp_path_factory.mktemp("nir")
    write_nir(network, images[:2], folder)
    return folder


def spikes(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits and the spikes of every layer of neurons but the encoder's."""
    found = {}

    def keep(name: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    name_of = {name.replace("backbone.", "").replace(".", "_"): module for name, module in network.named_modules()}
    kept = {name: module for name, module in name_of.items() if name.endswith(("lif", "lif1", "lif2"))}
    hooks = [module.register_forward_hook(keep(name)) for name, module in kept.items()]
    with torch.no_grad():
        logits = network(x)
    for hook in hooks:
        hook.remove()
    found.pop("coding_lif", None)
    return logits, found


def saturated(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return a lively network whose gate is 0 or 1, as training makes it: its first neurons are at their threshold."""
    if network.coding_name == "gac":
        network.coding.gate.spatial_channel.conv2.weight.data *= 1e4
    return lively(network, images)


def assert_same_spikes(network: nn.Module, back: nn.Module, x: torch.Tensor) -> None:
    logits, expected = spikes(network, x)
    again, found = spikes(back, x)
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert each.any(), f"{name} is silent: nothing is compared"
        assert torch.equal(found[name], each), name
    assert torch.equal(again, logits)


def test_a_trained_network_comes_back_with_every_spike(digits, folder):
    assert_same_spikes(digits[0], read_nir(folder), digits[1])


def test_the_file_holds_the_true_constants_and_nothing_but_layers_that_others_have(digits, folder):
    graph = nir.read(folder / BACKBONE)
    kinds = [type(node) for node in graph.nodes.values()]
    assert set(kinds) == {nir.Input, nir.Output, nir.LIF, nir.Conv2d, nir.AvgPool2d, nir.Flatten, nir.Affine}
    neurons = [node for node in graph.nodes.values() if type(node) is nir.LIF]
    assert len(neurons) == 7
    for node in neurons:
        assert set(node.v_threshold.flat) == {1.0}
        assert set(node.v_reset.flat) == {0.0}
        assert set(node.r.flat) == {2.0}  # the input is not divided by tau
        assert np.allclose(node.tau, 2e-4, rtol=1e-12)  # two steps of dt = 1e-4 s


def test_spikingjelly_alone_fires_at_the_threshold_too(digits, folder):
    network, images = digits
    encoded = torch.export.load(folder / ENCODER).module()(images)
    with torch.no_grad():
        logits = network(images)
        alone = nir_exchange.import_from_nir(folder / BACKBONE, step_mode="m")
        other = (alone(encoded)[0] != logits).any(-1).any(0)
        assert other.sum() > 100, "no neuron of a trained network is at its threshold any more: nothing is shown here"
        # What docs/export.md says to do without this package.
        for module in alone.modules():
            if hasattr(module, "v_threshold"):
                module.v_threshold = float(np.nextafter(np.float32(module.v_threshold), np.float32(np.inf)))
        assert torch.equal(alone(encoded)[0], logits)


def test_the_encoder_needs_only_torch(folder):
    program = torch.export.load(folder / ENCODER)
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {target.namespace for target in calls if isinstance(target, torch._ops.OpOverload)} == {"aten"}


@pytest.mark.parametrize("neuron", ["cifar", "imagenet"])
@pytest.mark.parametrize(
    ("name", "depth", "size"), [("gac_msresnet18_cifar", [3, 2, 1], 8), ("msresnet18", [2, 1, 1, 1], 64)]
)
def test_other_networks_come_back(name, depth, size, neuron, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(6, 3, size, size)
    network = saturated(gac.create_model(name, 5, 3, width=8, depth=depth, neuron=neuron), images)
    write_nir(network, images[:2], tmp_path)
    assert_same_spikes(network, read_nir(tmp_path), images)


def test_event_frames_come_back(tmp_path):
    torch.manual_seed(0)
    frames = torch.randn(3, 6, 2, 16, 16)  # [T, B, C, H, W]
    network = saturated(gac.create_model("gac_msresnet18_cifar", 5, 3, width=8, in_channels=2), frames)
    write_nir(network, frames[:, :2], tmp_path)
    assert_same_spikes(network, read_nir(tmp_path), frames)


def test_sums_are_added_in_the_order_of_the_network(tmp_path):
    network = gac.create_model("msresnet18_cifar", 5, 1, width=4, depth=[4, 1, 1]).eval()
    write_nir(network, torch.randn(2, 3, 8, 8), tmp_path)
    sums = []
    for node in read_nir(tmp_path).backbone.graph.nodes:
        if node.target is torch.add and not any(user.target is torch.add for user in node.users):
            terms = []
            while node.target is torch.add:
                terms.insert(0, node.args[1].name)
                node = node.args[0]
            sums.append([node.name, *terms])
    stream = ["stages_0_0_shortcut", "stages_0_0_conv2", "stages_0_1_conv2", "stages_0_2_conv2", "stages_0_3_conv2"]
    longest = [terms for terms in sums if len(terms) == 5]
    assert longest == [stream, stream]  # the next block's neurons and its shortcut
    assert all(terms == stream[: len(terms)] for terms in sums if terms[0].startswith("stages_0"))


def soft_reset(network):
    network.stages[0][0].lif1.v_reset = None


def other_neuron(network):
    network.lif = neuron.LIFNode(step_mode="m")


def other_norm(network):
    network.stages[1][0].conv1.norm = nn.InstanceNorm2d(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (soft_reset, "NIR has no soft reset"),
        (other_neuron, r"fire on h > threshold, not spikingjelly.*\.LIFNode"),
        (other_norm, "NIR has no InstanceNorm2d"),
        (lambda network: setattr(network, "head", nn.Identity()), "head"),
    ],
)
def test_what_nir_cannot_hold_is_refused(change, message, tmp_path):
    network = gac.create_model("gac_msresnet18_cifar", 5, 2, width=2, depth=[1, 1, 1])
    change(network)
    with pytest.raises(InputError, match=message):
        write_nir(network, torch.randn(2, 3, 8, 8), tmp_path)


def test_other_codings_are_refused(tmp_path):
    network = gac.create_model("msresnet18_cifar", 5, 2, coding="rate", width=2, depth=[1, 1, 1])
    with pytest.raises(InputError, match="gac or direct coding, not rate"):
        write_nir(network, torch.rand(2, 3, 8, 8), tmp_path)


def test_missing_packages_are_one_line(digits, tmp_path, monkeypatch):
    for name in [each for each in sys.modules if each.startswith("spikingjelly.activation_based.nir_exchange")]:
        monkeypatch.delitem(sys.modules, name)
    import spikingjelly.activation_based as package

    monkeypatch.delattr(package, "nir_exchange")
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(InputError, match=r"needs the packages nir and nirtorch: pip install"):
        write_nir(digits[0], digits[1][:2], tmp_path)
    with pytest.raises(InputError, match=r"needs the packages nir and nirtorch: pip install"):
        read_nir(tmp_path)


@pytest.mark.parametrize("name", [BACKBONE, ENCODER])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damaged_files_are_one_line(folder, tmp_path, name, damage):
    for each in (BACKBONE, ENCODER):
        content = (folder / each).read_bytes()
        if each == name and damage != "missing":
            content = content[: len(content) // 2] if damage == "cut" else b""
        if each != name or damage != "missing":
            (tmp_path / each).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: cannot be read"):
        read_nir(tmp_path)
