"""The gate for replayed steps: it must pass those of the kernels, and find steps that are not the called ones."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from recorded_graph import CaptureByRecording

from benchmarks import agreement, replayed_contender
from benchmarks.command_line import MeasurementError
from benchmarks.implementations import IMPLEMENTATIONS, REFERENCE
from benchmarks.network_size import NetworkSize
from benchmarks.replayed_contender import ReplayedContender, compare_replayed
from gac.execution import cuda_graph
from gac.execution.device import autocast

CPU = torch.device("cpu")
# As in tests/models/test_fused.py, so that no kernel has to be compiled for this file alone.
T = 3
SIZE = NetworkSize("gac_msresnet18_cifar", width=8, depth=(1, 1, 1), image_size=8, num_classes=3)
REPLAYED = dataclasses.replace(REFERENCE, name="ours-cupy-graph", float64=False, replayed=True)
QUANTITIES = {f"replayed: {name}" for name in ("loss", "gradients", "weights' change", "running statistics", "logits")}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed_contender, "CaptureOnDevice", lambda device: CaptureByRecording())


def check(dtype: torch.dtype = torch.bfloat16) -> None:
    agreement.check_agreement([REPLAYED], SIZE, T, {REPLAYED.name: [dtype]}, CPU)


def test_passes_the_kernels(recorded, neurons_on_kernels, monkeypatch):
    # Every step takes a second here, and a recording needs none before it.
    monkeypatch.setattr(cuda_graph, "WARM_UP_CALLS", 0)
    monkeypatch.setattr(replayed_contender, "WARM_UP_CALLS", 0)
    ours = IMPLEMENTATIONS["ours-cupy-graph"]
    weights = REFERENCE.build(SIZE, T).state_dict()
    found = compare_replayed(ours, SIZE, T, "bf16", "NHWC", weights, CPU)
    assert {each.quantity for each in found} == QUANTITIES
    assert [each.difference for each in found] == [0.0] * len(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["training", "evaluation"])
def test_finds_a_replay_without_work(frozen, dtype, monkeypatch):
    def capture(function: Callable) -> Callable:
        result = function()
        return lambda: result

    captures = iter([capture, capture] if frozen == "training" else [CaptureByRecording(), capture])
    monkeypatch.setattr(replayed_contender, "CaptureOnDevice", lambda device: next(captures))
    quantity = "(loss|gradients)" if frozen == "training" else "logits"
    with pytest.raises(
        MeasurementError, match=f"ours-cupy-graph is not the network of ours-torch: replayed: {quantity}"
    ):
        check(dtype)


def test_finds_weights_that_stay_those_of_the_capture(recorded, monkeypatch):
    replay = ReplayedContender._replay

    def with_cast_weights_kept(contender: ReplayedContender, *arguments: object) -> torch.Tensor:
        with autocast(CPU, contender._amp):
            return replay(contender, *arguments)

    check()
    monkeypatch.setattr(ReplayedContender, "_replay", with_cast_weights_kept)
    with pytest.raises(MeasurementError, match="replayed: "):
        check()


def test_finds_a_step_that_does_not_update(recorded, monkeypatch):
    steps = []

    def step(optimizer: torch.optim.SGD) -> None:
        # The four of the warm-up and the capture, then the called one.
        steps.append(optimizer)
        if len(steps) != 4:
            update(optimizer)

    update = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(MeasurementError, match="replayed: weights' change"):
        check()
    assert len(steps) == 5
