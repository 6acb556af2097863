"""The gate for fused execution: it must pass the kernels, and find what they could do wrong."""

import pytest
import torch

from benchmarks import agreement
from benchmarks.command_line import MeasurementError
from benchmarks.comparison import Difference
from benchmarks.implementations import IMPLEMENTATIONS, REFERENCE
from benchmarks.network_size import NetworkSize
from benchmarks.teacher_forcing import compare_fused
from gac.execution.device import autocast
from gac.models import fused

CPU = torch.device("cpu")
# A block with an identity shortcut, blocks with a normalised one, and the last block.
SIZE = NetworkSize("gac_msresnet18", width=8, depth=(2, 1, 1, 1), image_size=32, num_classes=3)
T = 2
QUANTITIES = {
    "fused: share of changed spikes",
    "fused: other activations",
    "fused: gradients",
    "fused: BatchNorm gradients",
    "fused: running statistics",
}


def compare(backend: str = "cupy") -> list[Difference]:
    torch.manual_seed(0)
    reference = REFERENCE.build(SIZE, T).double()
    images = torch.randn(2, 3, SIZE.image_size, SIZE.image_size, dtype=torch.float64)
    agreement._roughen(reference, images)
    network = REFERENCE.build(SIZE, T)
    network.load_state_dict(reference.state_dict())
    network.set_backend(backend)
    return compare_fused(network, reference, images, torch.float16, autocast(CPU, "fp16"))


def failed() -> set[str]:
    return {each.quantity.removeprefix("fused: ") for each in compare() if not each.within}


def test_passes_the_kernels(neurons_on_kernels):
    found = compare()
    assert {each.quantity for each in found} == QUANTITIES
    assert all(each.within for each in found), found


def test_says_nothing_of_a_network_that_runs_its_modules():
    assert compare(backend="torch") == []


def scaled(name: str):
    """The fused operation ``name``, whose input's gradient is wrong by 1 percent."""
    operation = getattr(fused, name)

    def wrong(y, *others):
        return operation(y.detach() + 1.01 * (y - y.detach()), *others)

    return wrong


@pytest.mark.parametrize("name", ["norm_lif", "residual_lif", "lif_pool", "gate_lif"])
def test_finds_wrong_gradients(name, neurons_on_kernels, monkeypatch):
    monkeypatch.setattr(fused, name, scaled(name))
    assert "gradients" in failed()


def test_finds_wrong_constants(neurons_on_kernels, monkeypatch):
    constants = fused._constants

    def wrong(neuron):
        parameters, surrogate = constants(neuron)
        return type(parameters)(**{**vars(parameters), "decay": 0.26}), surrogate

    monkeypatch.setattr(fused, "_constants", wrong)
    assert "share of changed spikes" in failed()


def test_finds_a_norm_in_the_wrong_place(neurons_on_kernels, monkeypatch):
    residual = fused.residual_lif

    def wrong(y, normalization, *others):
        exchanged = type(normalization)(**{**vars(normalization), "bias": normalization.weight})
        return residual(y, exchanged, *others)

    monkeypatch.setattr(fused, "residual_lif", wrong)
    assert {"share of changed spikes", "other activations"} <= failed()


def test_finds_statistics_that_do_not_move(neurons_on_kernels, monkeypatch):
    norm = type(REFERENCE.build(SIZE, T).stages[0][0].conv1.norm)
    normalization = norm.normalization

    def still(self, y):
        kept = self.running_mean.clone(), self.running_var.clone()
        found = normalization(self, y)
        self.running_mean.copy_(kept[0])
        self.running_var.copy_(kept[1])
        return found

    monkeypatch.setattr(norm, "normalization", still)
    assert "running statistics" in failed()


def test_is_part_of_the_gate(neurons_on_kernels, monkeypatch):
    ours = IMPLEMENTATIONS["ours-cupy"]
    found = agreement.check_agreement([ours], SIZE, T, {ours.name: [torch.float16]}, CPU)
    assert {each.quantity for each in found} >= QUANTITIES
    monkeypatch.setattr(fused, "norm_lif", scaled("norm_lif"))
    with pytest.raises(
        MeasurementError, match="ours-cupy is not the network of ours-torch: fused: gradients in float16"
    ):
        agreement.check_agreement([ours], SIZE, T, {ours.name: [torch.float16]}, CPU)


def test_finds_another_normalisation_in_evaluation(neurons_on_kernels, monkeypatch):
    norm = type(REFERENCE.build(SIZE, T).stages[0][0].conv1.norm)
    normalization = norm.normalization

    def of_the_batch(self, y):
        return normalization(self.train(), y)

    monkeypatch.setattr(norm, "normalization", of_the_batch)
    assert {"share of changed spikes", "gradients", "running statistics"} <= failed()
