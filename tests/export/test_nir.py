"""A network goes to NIR and back with every spike in its place."""

import copy
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import nir
import numpy as np
import pytest
import torch
from spikingjelly.activation_based import neuron, nir_exchange
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import gac
from gac.config import Config, ModelConfig
from gac.data import DataInfo
from gac.errors import InputError
from gac.export.__main__ import main
from gac.export.fidelity import network_outputs
from gac.export.nir import NIRNetwork, build_nir, encoder_path, measure, read_nir
from gac.export.source import Source, open_source
from gac.models.blocks import ConvNorm
from gac.models.ms_resnet import MSResNet
from lively import lively

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Source:
    """The trained network that travels in the package, and all its test images."""
    return open_source("digits", 360)


@pytest.fixture(scope="module")
def exported(digits: Source) -> tuple[bytes, bytes]:
    return build_nir(digits)


def source_of(network: MSResNet, size: int, frames: int | None = None) -> Source:
    """Return a network as one that was trained on images of ``size`` x ``size`` pixels."""
    channels, classes = network.in_channels, network.num_classes
    info = DataInfo(
        "none", classes, channels, size, size, None, 1, 1, (0.0,) * channels, (1.0,) * channels, None, frames
    )
    return Source(network.eval(), Config(model=ModelConfig()), info, [*map(str, range(classes))], "", 0, None, None)


def written(contents: tuple[bytes, bytes], folder: Path) -> Path:
    path = folder / "net.nir"
    for file, content in zip((path, encoder_path(path)), contents, strict=True):
        file.write_bytes(content)
    return path


def folded(network: MSResNet) -> MSResNet:
    """Return a copy with BatchNorm folded, whose convolutions are the file's: any processor rounds both alike."""
    network = copy.deepcopy(network)
    for layer in network.stages.modules():
        if isinstance(layer, ConvNorm):
            layer.conv, layer.norm = fuse_conv_bn_eval(layer.conv.double(), layer.norm.double()).float(), nn.Identity()
    return network


def assert_same(network: MSResNet, back: NIRNetwork, x: torch.Tensor) -> None:
    """Assert that the spikes that enter each layer of the backbone, and the logits, are the same."""
    logits, spikes = network_outputs(folded(network))(x)
    inputs = {}
    for name, module in back.backbone.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name:
            module.register_forward_hook(lambda module, taken, output, name=name: inputs.update({name: taken[0]}))
    with torch.no_grad():
        again = back(x)
    for name, module in network.stages.named_modules():
        if isinstance(module, nn.Conv2d) and "shortcut" not in name:
            stage, block, conv, _ = name.split(".")
            expected = spikes[f"stages.{stage}.{block}.lif{conv[-1]}"]
            assert expected.any(), f"the neurons before {name} are silent: nothing is compared"
            assert torch.equal(inputs[f"stages_{stage}_{block}_{conv}"].reshape(expected.shape), expected), name
    assert spikes["lif"].any()
    assert torch.equal(again, logits)


def test_a_trained_network_comes_back_with_every_spike(digits, exported):
    found = measure(replace(digits, network=folded(digits.network)), *exported)
    assert found.images == 360
    assert (found.max_difference, found.predictions_differ) == (0.0, 0)
    assert len(found.spikes) == 7  # all but those of the encoder, which act only through its output
    assert all(layer.fired and not layer.differ for layer in found.spikes.values())


def test_folding_batch_norm_changes_next_to_nothing(digits, exported):
    # Its rounding may take a potential across the threshold, and does on no image where this was written.
    found = measure(digits, *exported)
    assert found.predictions_differ == 0
    assert sum(layer.differ for layer in found.spikes.values()) < 1e-4 * sum(
        layer.fired for layer in found.spikes.values()
    )


def test_the_file_holds_the_true_constants_and_nothing_but_what_others_have(exported):
    graph = nir.read(io.BytesIO(exported[0]))
    kinds = {type(node) for node in graph.nodes.values()}
    assert kinds == {nir.Input, nir.Output, nir.LIF, nir.Conv2d, nir.AvgPool2d, nir.Flatten, nir.Affine}
    neurons = [node for node in graph.nodes.values() if type(node) is nir.LIF]
    assert len(neurons) == 7
    for node in neurons:
        assert set(node.v_threshold.flat) == {1.0}
        assert set(node.v_reset.flat) == {0.0}
        assert set(node.r.flat) == {2.0}  # the input is not divided by tau
        assert np.allclose(node.tau, 2e-4, rtol=1e-12)  # two steps of 1e-4 s
    card = json.loads(graph.metadata["gac.json"])
    assert card["classes"] == [*"0123456789"]
    assert card["T"] == 4


def test_spikingjelly_alone_fires_at_the_threshold_too(digits, exported, tmp_path):
    x = torch.cat([images for images, _ in digits.test_images()])
    path = written(exported, tmp_path)
    encoded = torch.export.load(encoder_path(path)).module()(x)
    alone = nir_exchange.import_from_nir(path, step_mode="m")
    with torch.no_grad():
        logits = read_nir(path)(x)
        other = (alone(encoded)[0] != logits).any(-1).any(0)
        assert other.sum() > 100, "no neuron of this network is at its threshold any more: nothing is shown here"
        # What docs/export.md says to do without this package.
        for module in alone.modules():
            if isinstance(module, neuron.LIFNode):
                module.v_threshold = float(np.nextafter(np.float32(module.v_threshold), np.float32(np.inf)))
        assert torch.equal(alone(encoded)[0], logits)


def test_the_examples_in_the_docs_run(exported, tmp_path, monkeypatch):
    for file, content in zip(("digits.nir", "digits.encoder.pt2"), exported, strict=True):
        (tmp_path / file).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    section = DOCS.read_text(encoding="utf-8").partition("## NIR")[2]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    networks = []
    for block in blocks:
        names = {}
        exec(block, names)
        networks.append(names["net"])
    ours, raised = networks
    assert ours.metadata["classes"] == [*"0123456789"]
    coded = ours.encode(torch.randn(3, 1, 8, 8))
    with torch.no_grad():
        assert torch.equal(raised(coded)[0], ours.backbone(coded)[0])


def saturated(network: MSResNet, images: torch.Tensor) -> MSResNet:
    """Return a lively network whose gate is 0 or 1, as training makes it: its first neurons are at their threshold."""
    if network.coding_name == "gac":
        network.coding.gate.spatial_channel.conv2.weight.data *= 1e4
    return lively(network, images)


@pytest.mark.parametrize(
    ("name", "depth", "size", "preset"),
    [("gac_msresnet18_cifar", [3, 2, 1], 8, "cifar"), ("msresnet18", [2, 1, 1, 1], 64, "imagenet")],
)
def test_other_networks_come_back(name, depth, size, preset, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(6, 3, size, size)
    network = saturated(gac.create_model(name, 5, 3, width=8, depth=depth, neuron=preset), images)
    assert_same(network, read_nir(written(build_nir(source_of(network, size)), tmp_path)), images)


def test_event_frames_come_back(tmp_path):
    torch.manual_seed(0)
    frames = torch.randn(3, 6, 2, 16, 16)  # [T, B, C, H, W]
    network = saturated(gac.create_model("gac_msresnet18_cifar", 5, 3, width=8, in_channels=2), frames)
    assert_same(network, read_nir(written(build_nir(source_of(network, 16, frames=3)), tmp_path)), frames)


def test_sums_are_added_in_the_order_of_the_network(tmp_path):
    network = gac.create_model("msresnet18_cifar", 5, 1, width=4, depth=[4, 1, 1])
    sums = []
    for node in read_nir(written(build_nir(source_of(network, 8)), tmp_path)).backbone.graph.nodes:
        if node.target is torch.add and not any(user.target is torch.add for user in node.users):
            terms = []
            while node.target is torch.add:
                terms.insert(0, node.args[1].name)
                node = node.args[0]
            sums.append([node.name, *terms])
    stream = ["stages_0_0_shortcut", "stages_0_0_conv2", "stages_0_1_conv2", "stages_0_2_conv2", "stages_0_3_conv2"]
    # The longest is read twice: by the next block's neurons and by its shortcut.
    of_stage = sorted((terms for terms in sums if terms[0] == stream[0]), key=len)
    assert of_stage == [stream[:2], stream[:3], stream[:4], stream, stream]


def soft_reset(network):
    network.stages[0][0].lif1.v_reset = None


def other_neuron(network):
    network.lif = neuron.LIFNode(step_mode="m")


def other_norm(network):
    network.stages[1][0].conv1.norm = nn.InstanceNorm2d(8)


def pooled(network):
    network.stages[1][0].shortcut = nn.Sequential(ConvNorm(4, 8, 1, 2))


def other_head(network):
    network.head = nn.Sequential(nn.Linear(16, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (soft_reset, "NIR has no soft reset"),
        (other_neuron, "LIFNode"),
        (other_norm, "NIR has no InstanceNorm2d"),
        (pooled, r"\(ConvNorm\), not Sequential"),
        (other_head, "heads of one linear layer, not Sequential"),
    ],
)
def test_what_nir_cannot_hold_is_refused(change, message):
    network = gac.create_model("gac_msresnet18_cifar", 5, 2, width=2, depth=[1, 1, 1])
    change(network)
    with pytest.raises(InputError, match=message):
        build_nir(source_of(network, 8))


@pytest.mark.parametrize(
    ("coding", "advice"), [("rate", "with the subcommand program"), ("phase", "use torch.jit.trace")]
)
def test_other_codings_are_refused(coding, advice):
    network = gac.create_model("msresnet18_cifar", 5, 2, coding=coding, width=2, depth=[1, 1, 1])
    with pytest.raises(InputError, match=f"{coding} coding is not exported as NIR, .*: .*{advice}$"):
        build_nir(source_of(network, 8))


def test_a_missing_package_is_one_line(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(InputError, match=r"nir is not installed: pip install '\.\[nir\]'"):
        build_nir(digits)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda backbone, encoder: (backbone[:1000], encoder), "it is damaged, or the encoder beside it"),
        (lambda backbone, encoder: (backbone, encoder[:1000]), "its encoder is no program of torch.export"),
        (lambda backbone, encoder: (backbone, b""), "its encoder is no program of torch.export"),
    ],
)
def test_a_damaged_file_is_one_line(exported, damage, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_nir(written(damage(*exported), tmp_path))


def test_a_missing_encoder_is_one_line(exported, tmp_path):
    path = written(exported, tmp_path)
    encoder_path(path).unlink()
    with pytest.raises(InputError, match=r"net\.encoder\.pt2: cannot be read: No such file"):
        read_nir(path)


def test_the_command_writes_both_files_and_their_fidelity(tmp_path, capsys):
    path = tmp_path / "digits.nir"
    assert main(["nir", "digits", str(path), "--images", "40"]) == 0
    assert "0 of 40 differ" in capsys.readouterr().out
    fidelity = json.loads((tmp_path / "digits.nir.fidelity.json").read_text())
    assert (fidelity["images"], fidelity["predictions_differ"]) == (40, 0)
    images, labels = next(open_source("digits", 40).test_images())
    with torch.no_grad():
        assert (read_nir(path)(images).mean(0).argmax(-1) == labels).float().mean() > 0.9
