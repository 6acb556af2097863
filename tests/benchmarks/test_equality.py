"""The gate before networks are timed: it must pass what is equal, and find what an implementation could do wrong."""

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch

from benchmarks import candidates, equality
from benchmarks.candidates import IMPLEMENTATIONS, REFERENCE, Implementation, ReplayedCandidate
from benchmarks.common import MeasurementError, NetworkSize, Parser, Report
from benchmarks.peers import step_loop
from gac.execution import cuda_graph
from gac.execution.device import autocast
from gac.models import fused
from gac.neuron import LIFNode
from recorded_graph import CaptureByRecording

CPU = torch.device("cpu")
SIZE = NetworkSize("gac_msresnet18_cifar", width=8, depth=(1, 1, 1), image_size=8, num_classes=3)
IMAGENET_SIZE = NetworkSize("gac_msresnet18", width=8, depth=(1, 1, 1, 1), image_size=32, num_classes=3)
REPLAYED = dataclasses.replace(REFERENCE, name="ours-cupy-graph", replayed=True)
NETWORK = {"training logits", "loss gradients", "running statistics", "evaluation logits"}
NEURON = {"share of changed spikes", "gradient of x of a neuron"}
REPLAY = {f"replayed: {name}" for name in ("loss", "gradients", "weights' change", "running statistics", "logits")}


def check(implementation: Implementation, T: int = 2, size: NetworkSize = SIZE, precision: str = "bf16") -> list[dict]:
    report = Report(Parser("benchmarks.throughput", "", ""), [], CPU, None)
    report.begin()
    equality.check_networks([implementation], size, [T], [precision], CPU, report)
    return report.data["agreement"]


@pytest.mark.parametrize("size", [SIZE, IMAGENET_SIZE], ids=["cifar", "imagenet"])
@pytest.mark.parametrize("name", ["spikingjelly", "step-loop"])
@pytest.mark.parametrize("T", [1, 4])
def test_peers_pass_the_gate(name, T, size):
    found = check(IMPLEMENTATIONS[name], T, size)
    assert {(each["dtype"], each["quantity"]) for each in found} == {
        (dtype, quantity) for dtype in ("float32", "float64") for quantity in NETWORK
    }


def wrong_surrogate(monkeypatch):
    def backward(ctx, grad):
        return 1.01 * grad

    monkeypatch.setattr(step_loop.TriangleSpike, "backward", staticmethod(backward))


def fires_at_another_threshold(monkeypatch):
    def forward(ctx, membrane):
        ctx.save_for_backward(membrane)
        return (membrane > 1.01).to(membrane.dtype)

    monkeypatch.setattr(step_loop.TriangleSpike, "forward", staticmethod(forward))


def ungated(monkeypatch):
    monkeypatch.setattr(step_loop.GatedAttention, "forward", lambda self, x: self.lif(x))


def sees_fewer_frames(monkeypatch):
    """The same logits and gradients; only the running variance knows how many frames there were."""

    def forward(self, x):
        if not isinstance(self.layers[1], torch.nn.BatchNorm2d) or not torch.equal(x[:, 0], x[:, -1]):
            return self.layers(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.layers(x[:, 0]).unsqueeze(1).expand(-1, x.shape[1], -1, -1, -1)

    monkeypatch.setattr(step_loop.EveryFrame, "forward", forward)


@pytest.mark.parametrize(
    ("defect", "quantity"),
    [
        (wrong_surrogate, "loss gradients"),
        (fires_at_another_threshold, "training logits"),
        (ungated, "training logits"),
        (sees_fewer_frames, "running statistics"),
    ],
)
def test_the_gate_finds_defects_of_a_network(defect, quantity, monkeypatch):
    defect(monkeypatch)
    with pytest.raises(MeasurementError, match=f"step-loop is not the network of ours-torch: {quantity} in float64"):
        check(IMPLEMENTATIONS["step-loop"])


def test_the_gate_finds_exchanged_tensors():
    exchange = {"conv1": "conv2", "conv2": "conv1"}
    names = tuple(
        (re.sub("conv[12](?=..norm)", lambda found: exchange[found[0]], pattern), replacement)
        for pattern, replacement in step_loop.NAMES
    )
    assert names != step_loop.NAMES
    with pytest.raises(MeasurementError, match="training logits in float64"):
        check(dataclasses.replace(IMPLEMENTATIONS["step-loop"], names=names))


class WrongGradient(LIFNode):
    """Right spikes; a gradient that is wrong by 2 percent."""

    def multi_step_functional_forward(self, inputs: tuple, states: tuple, **kwargs: object) -> tuple:
        (spikes,), states = super().multi_step_functional_forward(inputs, states, **kwargs)
        return (spikes.detach() + 1.02 * (spikes - spikes.detach()),), states


class MissesSpikes(LIFNode):
    """Right but for the spikes of one pixel at the last time step."""

    def multi_step_functional_forward(self, inputs: tuple, states: tuple, **kwargs: object) -> tuple:
        (spikes,), states = super().multi_step_functional_forward(inputs, states, **kwargs)
        mask = torch.ones_like(spikes)
        mask[-1, ..., 0, 0] = 0
        return (spikes * mask,), states


@pytest.mark.parametrize(
    ("neuron_type", "quantity"), [(WrongGradient, "loss gradients"), (MissesSpikes, "training logits")]
)
def test_the_gate_finds_defects_of_a_neuron_without_float64(neuron_type, quantity):
    def build(size: NetworkSize, T: int) -> torch.nn.Module:
        network = REFERENCE.build(size, T)
        for module in candidates.neurons(network):
            module.__class__ = neuron_type if module.__class__ is LIFNode else module.__class__
        return network

    sound = dataclasses.replace(REFERENCE, name="kernels")
    assert {each["quantity"] for each in check(sound)} == NETWORK | {
        "share of changed spikes",
        "gradient of x of a neuron",
    }
    with pytest.raises(MeasurementError, match=f"kernels is not the network of ours-torch: {quantity}"):
        check(dataclasses.replace(sound, build=build))


def test_the_gate_finds_a_neuron_that_is_wrong_in_half_precision(monkeypatch):
    forward = LIFNode.multi_step_functional_forward

    def wrong(self, inputs: tuple, states: tuple, **kwargs: object) -> tuple:
        (spikes,), states = forward(self, inputs, states, **kwargs)
        return ((1 - spikes if spikes.dtype == torch.bfloat16 else spikes),), states

    monkeypatch.setattr(LIFNode, "multi_step_functional_forward", wrong)
    with pytest.raises(MeasurementError, match="ours-torch: share of changed spikes in bfloat16"):
        check(REFERENCE)


def test_a_silent_reference_is_refused(monkeypatch):
    monkeypatch.setattr(equality, "perturb", lambda network, images: network.stem.norm.bias.data.fill_(-100))
    with pytest.raises(MeasurementError, match="never or always fires"):
        check(REFERENCE)


class TestKernels:
    """The fused kernels, compiled for the CPU, as a GPU's gate checks them."""

    # A kernel of the gate takes a second here: one precision, and one shape of each operation.
    def test_pass(self, neurons_on_kernels):
        found = check(IMPLEMENTATIONS["ours-cupy"], precision="fp32")
        assert {each["quantity"] for each in found} >= NETWORK

    @pytest.mark.parametrize("name", ["norm_lif", "residual_lif", "lif_pool", "gate_lif"])
    def test_a_wrong_gradient_is_found(self, name, neurons_on_kernels, monkeypatch):
        operation = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda y, *others: operation(y.detach() + 1.01 * (y - y.detach()), *others))
        with pytest.raises(MeasurementError, match="ours-cupy is not the network of ours-torch: loss gradients"):
            check(IMPLEMENTATIONS["ours-cupy"], precision="fp32")


class TestReplays:
    @pytest.fixture
    def recorded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(candidates, "CaptureOnDevice", lambda device: CaptureByRecording())

    def test_of_the_kernels_pass(self, recorded, neurons_on_kernels, monkeypatch):
        # Every step takes a second here, and a recording needs none before it.
        for module in (cuda_graph, candidates, equality):
            monkeypatch.setattr(module, "WARM_UP_CALLS", 0)
        found = check(IMPLEMENTATIONS["ours-cupy-graph"])
        assert {each["quantity"]: each["difference"] for each in found if each["quantity"] in REPLAY} == dict.fromkeys(
            REPLAY, 0.0
        )

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("frozen", ["training", "evaluation"])
    def test_without_work_are_found(self, frozen, precision, monkeypatch):
        def capture(function: Callable) -> Callable:
            result = function()
            return lambda: result

        captures = iter([capture, capture] if frozen == "training" else [CaptureByRecording(), capture])
        monkeypatch.setattr(candidates, "CaptureOnDevice", lambda device: next(captures))
        quantity = "(loss|gradients)" if frozen == "training" else "logits"
        with pytest.raises(MeasurementError, match=f"ours-cupy-graph is not the network of .*: replayed: {quantity}"):
            check(REPLAYED, precision=precision)

    def test_with_the_weights_of_the_capture_are_found(self, recorded, monkeypatch):
        replay = ReplayedCandidate._replay

        def with_cast_weights_kept(candidate: ReplayedCandidate, *arguments: object) -> torch.Tensor:
            with autocast(CPU, candidate._amp):
                return replay(candidate, *arguments)

        check(REPLAYED)
        monkeypatch.setattr(ReplayedCandidate, "_replay", with_cast_weights_kept)
        with pytest.raises(MeasurementError, match="replayed: "):
            check(REPLAYED)

    def test_that_miss_an_update_are_found(self, recorded, monkeypatch):
        update, steps = torch.optim.SGD.step, []

        def step(optimizer: torch.optim.SGD) -> None:
            # The three of the warm-up, then the captured one.
            steps.append(optimizer)
            if len(steps) != 4:
                update(optimizer)

        monkeypatch.setattr(torch.optim.SGD, "step", step)
        with pytest.raises(MeasurementError, match="replayed: "):
            check(REPLAYED)
