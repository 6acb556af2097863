"""Replayed steps against called ones: the benchmarks may time a replay only if it does the same work.

They should be equal to the bit. The limits are those of rounding all the same, in case a library chooses another
algorithm while it is captured.
"""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import candidates
from benchmarks.candidates import IMPLEMENTATIONS, REFERENCE, Candidate, Implementation, Setting
from benchmarks.common import PRECISIONS, MeasurementError, NetworkSize
from benchmarks.equality import compare
from deferred import Deferred
from gac.execution import cuda_graph
from recorded_graph import CaptureByRecording

CPU = torch.device("cpu")
SIZE = NetworkSize("gac_msresnet18_cifar", width=8, depth=(1, 1, 1), image_size=8, num_classes=3)
REPLAYED = dataclasses.replace(REFERENCE, name="ours-torch-graph", replayed=True)
# Of results in a precision, as a relative root mean square.
ROUNDING = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1.6e-2}
# Fewer images have larger gradients, which fp16's own first scale would let overflow.
LOSS_SCALE = 128.0


def check(replayed: Implementation, precision: str = "bf16", device: torch.device = CPU) -> dict[str, float]:
    """Compare replayed steps with as many plain ones. Raises MeasurementError if they differ."""
    setting = Setting(SIZE, 2, 4, precision, "auto", device)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        plain = dataclasses.replace(replayed, replayed=False, overlapped=False)
        got, wanted = (outcome(each, setting) for each in (replayed, plain))
    found = compare("replays", got, wanted, ROUNDING[precision])
    return {each["quantity"]: each["difference"] for each in found}


def outcome(each: Implementation, setting: Setting) -> dict[str, list[torch.Tensor]]:
    """Return what two training steps after the warm-up, and an evaluation step after a capture, give."""
    torch.manual_seed(0)
    candidate = each.work(each, setting, setting.weights())
    candidate.scaler = torch.amp.GradScaler(setting.device.type, LOSS_SCALE, enabled=setting.precision == "fp16")
    parameters = list(candidate.network.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    # The first replayed step makes the steps of its warm-up too.
    for _ in range(2 if each.replayed else 2 + candidates.WARM_UP_CALLS):
        loss = candidate.train_step()
    found = {
        "loss": [loss.clone()],
        "gradients": [parameter.grad.clone() for parameter in parameters],
        "weights' change": [now.detach() - then for now, then in zip(parameters, start, strict=True)],
        "running statistics": [buffer.clone() for buffer in candidate.network.buffers()],
    }
    candidate.rest()
    candidate.network.eval()
    candidate.eval_step()
    with torch.no_grad():
        # Weights that the capture has not seen.
        for parameter in parameters:
            parameter *= 1.1
    return found | {"logits": [candidate.eval_step().clone()]}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "CaptureOnDevice", lambda device: CaptureByRecording())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["ours-cupy-graph", "ours-cupy-overlap"])
@pytest.mark.gpu
def test_replays_on_a_gpu_do_the_work(name: str, precision: str) -> None:
    assert len(check(IMPLEMENTATIONS[name], precision, torch.device("cuda"))) == 5


def test_replays_of_the_kernels_do_the_work(recorded: None, neurons_on_kernels: None, monkeypatch) -> None:
    # Every step takes a second here, and a recording needs none before it.
    for module in (cuda_graph, candidates):
        monkeypatch.setattr(module, "WARM_UP_CALLS", 0)
    executor = Deferred()
    monkeypatch.setattr(candidates, "select_executor", lambda wanted, device: executor if wanted else None)
    assert set(check(IMPLEMENTATIONS["ours-cupy-overlap"]).values()) == {0.0}
    assert executor.joins == [9]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen", ["training", "evaluation"])
def test_replays_without_work_are_found(frozen: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(CaptureByRecording):
        def __call__(self, function: Callable) -> Callable:
            result = function()
            return lambda: result

    captures: Iterator = iter([Frozen(), Frozen()] if frozen == "training" else [CaptureByRecording(), Frozen()])
    monkeypatch.setattr(candidates, "CaptureOnDevice", lambda device: next(captures))
    quantity = "(loss|gradients)" if frozen == "training" else "logits"
    with pytest.raises(MeasurementError, match=f"replays: {quantity} differ"):
        check(REPLAYED, precision)


def test_replays_with_the_weights_of_the_capture_are_found(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Candidate._run

    def with_cast_weights_kept(candidate: Candidate, step: Callable) -> torch.Tensor:
        with candidate.setting.autocast():
            return run(candidate, step)

    check(REPLAYED)
    monkeypatch.setattr(Candidate, "_run", with_cast_weights_kept)
    with pytest.raises(MeasurementError, match="replays: "):
        check(REPLAYED)


def test_replays_that_miss_an_update_are_found(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    update, steps = torch.optim.SGD.step, []

    def step(optimizer: torch.optim.SGD) -> None:
        # The three of the warm-up, then the captured one.
        steps.append(optimizer)
        if len(steps) != 4:
            update(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(MeasurementError, match="replays: "):
        check(REPLAYED)
