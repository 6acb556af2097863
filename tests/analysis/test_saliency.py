"""Saliency: Grad-CAM is what its definition says at every time step, for every image on its own."""

import pytest
import torch
from torch import Tensor, nn

import gac
from gac import create_model
from gac.analysis.saliency import measure_saliency
from gac.data.digits import load_digits
from gac.errors import InputError
from lively import lively

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor]:
    network, transform, _ = gac.load_pretrained("digits")
    return network, transform(load_digits().splits["test"].images[:5])


def by_hand(network: nn.Module, layer: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    kept = []
    hook = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    outputs = network(images).mean(0)
    hook.remove()
    (gradient,) = torch.autograd.grad(outputs[range(len(images)), targets].sum(), kept[0])
    return (gradient.mean((-2, -1), keepdim=True) * kept[0]).sum(2).transpose(0, 1).detach()


@pytest.mark.parametrize("layer", ["stages.0", "stages.2", "stages.1.0.lif2", "coding"])
def test_maps_are_grad_cam_of_each_image_and_step(trained: tuple[nn.Module, Tensor], layer: str) -> None:
    network, images = trained
    found = measure_saliency(network, images.split(2), layer)
    assert found.targets.tolist() == network(images).mean(0).argmax(-1).tolist()
    expected = by_hand(network, network.get_submodule(layer), images, found.targets)
    assert found.maps.shape == expected.shape
    torch.testing.assert_close(found.maps, expected, rtol=1e-4, atol=1e-7)
    assert (found.maps.abs().amax((1, 2, 3)) > 1e-5).all()
    torch.testing.assert_close(found.mean, expected.mean(1), rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.inference_mode():
        other = measure_saliency(network, [images.clone()], layer, (found.targets + 1) % 10)
    assert not torch.allclose(other.maps, found.maps)


@pytest.mark.parametrize(
    ("layer", "spiking"),
    [("stages.0", "stages.1.0.lif1"), ("stages.2", "lif"), ("lif", "lif"), ("coding.gate", "stages.0.0.lif1")],
)
def test_spikes_are_those_that_the_layer_leads_to(trained: tuple[nn.Module, Tensor], layer: str, spiking: str) -> None:
    network, images = trained
    found = measure_saliency(network, images.split(2), layer)
    kept = []
    with torch.no_grad():
        hook = network.get_submodule(spiking).register_forward_hook(lambda *call: kept.append(call[-1]))
        network(images)
        hook.remove()
    assert found.spiking_layer == spiking
    assert found.spikes.tolist() == kept[0].sum((0, 2)).tolist()
    assert found.spikes.any()


@pytest.mark.parametrize("steps", [1, 3])
def test_only_the_first_steps_are_looked_at_where_only_they_are_scored(
    trained: tuple[nn.Module, Tensor], steps: int
) -> None:
    network, images = trained
    found = measure_saliency(network, images.split(2), "stages.1", steps=steps)
    with torch.no_grad():
        assert found.targets.tolist() == network(images)[:steps].mean(0).argmax(-1).tolist()

    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network(x)[:steps]

    expected = by_hand(First(), network.stages[1], images, found.targets)
    assert expected[:, steps:].count_nonzero() == 0
    torch.testing.assert_close(found.maps, expected[:, :steps], rtol=1e-4, atol=1e-7)
    every = measure_saliency(network, images.split(2), "stages.1", found.targets)
    assert (found.spikes <= every.spikes).all()
    assert found.spikes.sum() < every.spikes.sum()


def test_the_network_stays_as_it_was_and_runs_fused_as_well(neurons_on_kernels: None) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 8)
    network = lively(create_model("gac_msresnet18_cifar", 3, 2, width=4, depth=[1, 1, 1], backend="torch"), images)
    expected = measure_saliency(network, [images], "stages.1", torch.tensor([1, 2]))
    network.set_backend("auto")
    network.train()
    found = measure_saliency(network, [images], "stages.1", torch.tensor([1, 2]))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-4, atol=1e-7)


def test_what_cannot_be_shown_is_refused(trained: tuple[nn.Module, Tensor]) -> None:
    network, images = trained
    for layer, reason in (
        ("stage.2", r"no layer 'stage.2' \(did you mean stages.2\?\)"),
        ("head", r"layer head gives \[4, 5, 10\], and a saliency map needs \[T, B, C, H, W\]"),
        ("stem.conv", r"layer stem.conv gives \[5, 16, 8, 8\]"),
        ("stages", "layer stages does not run"),
    ):
        with pytest.raises(InputError, match=reason):
            measure_saliency(network, [images], layer)
    for targets, reason in (
        ([1], "from 0 to 9 for"),
        ([1, 2, 3, 4, 10], "from 0 to 9"),
        ([1] * 6, "of 5 images, got 6"),
    ):
        with pytest.raises(InputError, match=f"targets must be .*{reason}"):
            measure_saliency(network, images.split(2), "stages.2", torch.tensor(targets))
    with pytest.raises(InputError, match="no images"):
        measure_saliency(network, [], "stages.2")
    with pytest.raises(
        InputError, match=r"BatchFirst gives \[4, 4, 10\], and a saliency map needs outputs \[T, B, K\]"
    ):
        measure_saliency(gac.BatchFirst(network), [images[:4]], "net.stages.2")

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).mean(0)

    with pytest.raises(InputError, match=r"Mean gives \[5, 10\], and a saliency map needs outputs"):
        measure_saliency(Mean(), [images], "net.stages.2")
    assert not any(module._forward_hooks for module in network.modules())
