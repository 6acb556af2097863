"""The networks beyond GAC's paper are those they are named after, and everything that runs a network runs them."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import ms_resnet
from torch import Tensor, nn

from gac.checkpoint import load_checkpoint, read_checkpoint
from gac.cli import eval_main, train_main
from gac.config import Config, ModelConfig
from gac.data.interface import DataInfo
from gac.errors import InputError
from gac.evaluation.published import find_published
from gac.execution.footprint import feature_maps
from gac.models import create_model, fused
from gac.models.ms_resnet import MSResNet
from lively import lively

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["maxresnet18_cifar", "msresnet104"]
T = 3


def network(name: str, **options: object) -> MSResNet:
    torch.manual_seed(0)
    depth = [2, 1, 1] if "cifar" in name else [2, 1, 1, 1]
    return create_model(
        name, 5, T, **{"width": 8, "depth": depth, "temporal_init": "alive", "backend": "torch"} | options
    )


def images(side: int = 16, batch: int = 4) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


class MSResNet104(nn.Module):
    """The published description in SpikingJelly's layers: every step computed, the scores of the mean over time."""

    def __init__(self, width: int, depth: list[int], num_classes: int) -> None:
        super().__init__()
        convolution = [layer.Conv2d(3, width, 3, stride=2, padding=1)]
        convolution += [layer.Conv2d(width, width, 3, padding=1) for _ in range(2)]
        self.stem = nn.Sequential(*convolution, layer.BatchNorm2d(width))
        self.blocks, channels = nn.ModuleList(), width
        for stage, blocks in enumerate(depth):
            for number in range(blocks):
                exit, stride = width * 2**stage, 2 if number == 0 else 1
                residual = self._residual(channels, exit, stride)
                pooled = (layer.AvgPool2d(2), layer.Conv2d(channels, exit, 1, bias=False), layer.BatchNorm2d(exit))
                self.blocks.append(nn.ModuleList([residual, nn.Sequential(*(pooled if stride == 2 else ()))]))
                channels = exit
        self.lif, self.dropout, self.fc = self._lif(), nn.Dropout(0.2), nn.Linear(channels, num_classes)
        functional.set_step_mode(self, "m")

    @staticmethod
    def _lif() -> nn.Module:
        return neuron.LIFNode(4 / 3, False, 0.5, surrogate_function=surrogate.Rect(alpha=1.0), detach_reset=True)

    def _residual(self, entry: int, exit: int, stride: int) -> nn.Module:
        layers = [self._lif(), layer.Conv2d(entry, exit, 3, stride, 1, bias=False), layer.BatchNorm2d(exit)]
        layers += [self._lif(), layer.Conv2d(exit, exit, 3, padding=1, bias=False), layer.BatchNorm2d(exit)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.repeat(T, 1, 1, 1, 1))
        for residual, shortcut in self.blocks:
            x = residual(x) + shortcut(x)
        return self.fc(self.dropout(self.lif(x).mean((0, 3, 4))))


def reference(name: str) -> nn.Module:
    if name == "msresnet104":
        return MSResNet104(8, [2, 1, 1, 1], 5)
    sizes = {"layers": (2, 1, 1), "base_channels": 8, "stage_channels": (16, 32, 64), "num_classes": 5}
    return ms_resnet.MaxResNet(T, stem_kernel_size=3, stem_stride=1, **sizes)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_evaluation_are_the_references(name: str) -> None:
    """Weights are trained meanwhile; fresh ones would leave the last neurons silent."""
    net, other = network(name).double(), reference(name).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1.0, 2.0)
            nn.init.uniform_(module.bias, 0.0, 0.5)
    # Layers are registered in the order in which an image passes them, shortcuts last.
    other.load_state_dict(dict(zip(other.state_dict(), net.state_dict().values(), strict=True)))
    x, labels = images(32, batch=10).double(), torch.arange(10) % 5
    optimizers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in (net, other)]
    for _ in range(4):
        losses = []
        for each, optimizer in zip((net, other), optimizers, strict=True):
            functional.reset_net(each)
            optimizer.zero_grad()
            # The same inputs of the head are left out, if any.
            torch.manual_seed(2)
            logits = each(x).mean(0) if each is net else each(x)
            losses.append(F.cross_entropy(logits, labels))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    for (key, ours), theirs in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=key)
    lively(net, x)
    other.load_state_dict(dict(zip(other.state_dict(), net.state_dict().values(), strict=True)))
    functional.reset_net(other)
    logits = net(x).mean(0)
    assert logits.std(0).min() > 0.01
    torch.testing.assert_close(logits, other.eval()(x), rtol=1e-7, atol=1e-9)


def test_full_sizes() -> None:
    with torch.device("meta"):
        ours, theirs = create_model("maxresnet18_cifar", 100, 4), ms_resnet.max_resnet18(num_classes=100)
        assert [p.shape for p in ours.state_dict().values()] == [p.shape for p in theirs.state_dict().values()]
        ours, theirs = create_model("msresnet104", 1000, 4), MSResNet104(64, [3, 8, 32, 8], 1000)
        assert [p.shape for p in ours.state_dict().values()] == [p.shape for p in theirs.state_dict().values()]
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in ours.modules()) + 1 == 3 + 2 * 51 + 1


def test_initialisation() -> None:
    """Max-ResNet's is PyTorch's; MS-ResNet-104 has the BatchNorm weights of GAC's ImageNet code."""
    for name, expected in (("maxresnet18_cifar", {1.0}), ("msresnet104", {0.0, 0.5})):
        net = network(name)
        assert {w for m in net.modules() if isinstance(m, nn.BatchNorm2d) for w in m.weight.tolist()} == expected
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                bound = (module.in_channels * module.kernel_size[0] ** 2) ** -0.5
                assert 0.8 * bound < module.weight.abs().max() <= bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["", "gac_"])
def test_the_fused_walk_leaves_them_to_their_modules(prefix: str, name: str, neurons_on_kernels: None) -> None:
    net = lively(network(prefix + name), images(batch=16))
    expected = net(images())
    assert not torch.equal(expected[:, 0], expected[:, 1])
    net.set_backend("auto")
    assert all(node.runs_kernels(images()) for node in (net.lif, net.stages[0][0].lif1))
    assert fused.obstacle(net, images()) is not None
    torch.testing.assert_close(net(images()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_single_steps_are_the_sequence(name: str) -> None:
    net = lively(network(name), images(batch=16))
    expected = net(images())
    functional.set_step_mode(net, "s")
    functional.reset_net(net)
    found = torch.stack([net(images()) for _ in range(T)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_dropout_leaves_out_the_same_inputs_at_all_steps() -> None:
    net = network("msresnet104").train()
    kept = []
    net.dropout.register_forward_hook(lambda module, inputs, output: kept.append((inputs[0], output)))
    with torch.no_grad():
        net.stages[-1][-1].conv2.norm.bias.fill_(1.0)
    for _ in range(2):
        net(images())
    masks = []
    for entered, output in kept:
        mask = output.amax(0) > 0
        assert entered.amin() >= 0 < mask.sum() < mask.numel()
        assert torch.equal(output, entered * mask * 1.25)
        masks.append(mask)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("side", [8, 15, 20])
@pytest.mark.parametrize("name", NAMES)
def test_maps_of_any_size(name: str, side: int) -> None:
    net, sizes = network(name).eval(), []
    for module in (net.stem, *(block for stage in net.stages for block in stage)):
        module.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[-3:])))
    net(images(side))
    stem, *convolutions = feature_maps(net, DataInfo("synthetic", 5, 3, side, side, None, 1, 1, (0.0,), (1.0,)))
    assert [stem, *convolutions[1::2]] == sizes
    assert convolutions[::2] == convolutions[1::2]


@pytest.mark.parametrize("name", ["maxresnet18_cifar", pytest.param("msresnet104", marks=pytest.mark.slow)])
def test_one_graph_when_compiled(name: str) -> None:
    net = lively(network(f"gac_{name}"), images(batch=16))
    expected = copy.deepcopy(net)(images())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(images()), expected)


@pytest.mark.parametrize("name", ["msresnet104", pytest.param("maxresnet18_cifar", marks=pytest.mark.slow)])
def test_an_export_takes_any_batch(name: str) -> None:
    net = lively(network(f"gac_{name}"), images(batch=16))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (images(),), dynamic_shapes={"x": {0: batch}}, strict=False)
    x = images(batch=7)
    assert torch.equal(program.module()(x), net(x))


@pytest.mark.parametrize("prefix", ["", "gac_"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_shows_which_network_it_is_of(prefix: str, name: str, tmp_path: Path) -> None:
    net = lively(network(prefix + name), images(batch=16))
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    lif = net.lif
    constants = {"tau": lif.tau, "v_threshold": lif.v_threshold, "detach_reset": lif.detach_reset}
    constants["surrogate"] = "sigmoid" if "max" in name else "rectangle"
    if not prefix:
        constants |= {"coding": "direct", "T": T}
    found = load_checkpoint(tmp_path / "bare.pt", **constants)
    assert torch.equal(found(images()), net(images()))
    with pytest.raises(InputError, match="or give tau, v_threshold, surrogate and detach_reset"):
        load_checkpoint(tmp_path / "bare.pt", coding="gac" if prefix else "direct")


def test_the_networks_own_neurons_stand_in_the_configuration() -> None:
    config = Config(model=ModelConfig(name="gac_maxresnet18_cifar")).with_neuron()
    model = config.model
    assert (model.neuron, model.tau, model.v_threshold, model.surrogate) == (None, 2.0, 1.0, "sigmoid")
    assert model.detach_reset is True
    assert config.with_neuron() == config
    other = Config(model=ModelConfig(name="gac_maxresnet18_cifar", neuron="cifar")).with_neuron().model
    assert (other.neuron, other.surrogate, other.detach_reset) == ("cifar", "triangle", False)


def test_their_own_neurons_divide_the_input() -> None:
    assert all(m.decay_input for m in network("gac_maxresnet18_cifar").modules() if isinstance(m, neuron.LIFNode))
    chosen = network("gac_maxresnet18_cifar", neuron="cifar")
    assert not any(m.decay_input for m in chosen.modules() if isinstance(m, neuron.LIFNode))


@pytest.mark.parametrize(("options", "fires"), [({}, False), ({"v_threshold": 0.9}, True), ({"neuron": "cifar"}, True)])
def test_gated_spikes_never_make_max_resnets_neurons_spike(options: dict, fires: bool) -> None:
    # The largest that gated attention coding gives, for longer than any sequence.
    assert bool(network("gac_maxresnet18_cifar", **options).stages[0][0].lif1(torch.ones(100, 1)).any()) is fires


@pytest.mark.parametrize("T", [2, 4, 6])
@pytest.mark.parametrize("neuron", [None, "cifar"])
def test_no_published_accuracy_of_gac_stands_beside_them(neuron: str | None, T: int) -> None:
    assert find_published(create_model("gac_maxresnet18_cifar", 10, T, neuron=neuron), "cifar10") is None


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_run_them(name: str, tmp_path: Path) -> None:
    """Trained, resumed after an epoch, evaluated with energy, and one of them with a page."""
    depth = "[1,1,1]" if "cifar" in name else "[1,1,1,1]"
    sizes = [
        "--config=configs/digits.yaml",
        f"--model.name=gac_{name}",
        "--model.width=4",
        f"--model.depth={depth}",
        "--model.T=2",
        "--device=cpu",
    ]
    data = ["--data.name=synthetic", "--data.image_size=16", "--data.synthetic_images=40", "--data.synthetic_classes=3"]
    arguments = [*sizes, *data, "--train.batch_size=16", "--train.cutmix=off"]
    for epochs in (1, 2):
        done = [*arguments, f"--train.epochs={epochs}", "--output", str(tmp_path / "run"), "--resume=auto"]
        assert train_main(done) == 0
    payload = read_checkpoint(tmp_path / "run" / "last.pt")
    assert payload["epoch"] == 2
    found = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--json", str(tmp_path / "scores.json"), "--energy"]
    page = ["--report", str(tmp_path / "page")] if "max" in name else []
    assert eval_main([*found, *page]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    real = [each["layer"] for each in scores["energy"]["layers"] if not each["spiking"]]
    assert "stem.conv" in real
    assert (tmp_path / "page" / "index.html").exists() == bool(page)
    assert scores["published"] is None
