"""The ReLU twin: the same network with ReLUs in place of the neurons."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gac
from gac.checkpoint import read_checkpoint, read_config
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError
from gac.evaluation.report import evaluate_checkpoint
from gac.models.ms_resnet import MSResNet
from gac.training.engine import train

pytestmark = pytest.mark.usefixtures("one_thread")


def twin(name: str = "msresnet18_cifar", depth: tuple[int, ...] = (2, 1, 1), T: int = 1) -> MSResNet:
    torch.manual_seed(0)
    return gac.create_model(name, 5, T, width=4, depth=depth, activation="relu").eval()


def written_out(network: MSResNet, x: Tensor) -> Tensor:
    """Return the logits of a pre-activation ResNet with the network's weights."""
    y = network.stem.norm(network.stem.conv(x))
    for block in (block for stage in network.stages for block in stage):
        z = block.conv1.norm(block.conv1.conv(y.relu()))
        z = block.conv2.norm(block.conv2.conv(z.relu()))
        y = z + (y if isinstance(block.shortcut, nn.Identity) else block.shortcut.norm(block.shortcut.conv(y)))
    return network.head(y.relu().mean((-2, -1)))


@pytest.mark.parametrize(("name", "depth"), [("msresnet18_cifar", (2, 1, 1)), ("msresnet18", (2, 1, 1, 1))])
def test_it_is_a_pre_activation_resnet_at_every_time_step(name: str, depth: tuple[int, ...]) -> None:
    images = torch.randn(3, 3, 32, 32)
    network = twin(name, depth, T=2)
    with torch.no_grad():
        logits = network(images)
        for step in logits:
            torch.testing.assert_close(step, written_out(network, images))
    assert logits.abs().max() > 0.01
    assert not any(isinstance(module, gac.LIFNode) for module in network.modules())


def test_its_parameters_are_the_spiking_networks() -> None:
    torch.manual_seed(0)
    spiking = gac.create_model("msresnet18_cifar", 5, 1, width=4, depth=[2, 1, 1]).state_dict()
    ours = twin().state_dict()
    assert ours.keys() == spiking.keys()
    assert all(torch.equal(ours[name], spiking[name]) for name in ours)


@pytest.mark.parametrize(
    ("name", "activation", "message"),
    [
        ("gac_msresnet18_cifar", "relu", "gac coding weights spikes"),
        ("msresnet18_cifar", "gelu", "activation must be one of lif, relu, got 'gelu'"),
    ],
)
def test_what_makes_no_twin_is_refused(name: str, activation: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gac.create_model(name, 5, 1, width=4, depth=[1, 1, 1], activation=activation)


def test_constants_of_neurons_are_refused_where_there_are_none() -> None:
    with pytest.raises(InputError, match="activation is 'relu', which has no neurons: leave out neuron, tau"):
        gac.create_model("msresnet18_cifar", 5, 1, activation="relu", neuron="cifar", tau=3.0)


def test_it_is_trained_loaded_evaluated_and_begun_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Config(
        data=DataConfig(name="synthetic", image_size=8, synthetic_images=40, synthetic_classes=3),
        model=ModelConfig(name="msresnet18_cifar", T=1, width=4, depth=[1, 1, 1], activation="relu"),
        train=TrainConfig(epochs=2, batch_size=16),
        device="cpu",
    )
    train(config, tmp_path / "relu")
    file = tmp_path / "relu" / "best.pt"
    network = gac.load_checkpoint(file)
    assert isinstance(network.lif, nn.ReLU)
    payload = read_checkpoint(file)
    report = evaluate_checkpoint(file, payload, read_config(payload))
    assert report.scores.top1 == pytest.approx(payload["metrics"]["test_top1"])
    spiking = replace(config, model=replace(config.model, T=2, activation="lif"))
    train(replace(spiking, train=replace(config.train, epochs=1, init=str(file))), tmp_path / "spiking")
    assert "was trained with activation relu" in caplog.text
