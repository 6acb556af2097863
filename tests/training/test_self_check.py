"""The trial of replays before a run: what it finds, and that it leaves no trace."""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data import Data, build_data
from gac.execution import random_state
from gac.execution.cuda_graph import Graphs
from gac.execution.distributed import SINGLE_PROCESS
from gac.training import self_check
from gac.training.ema import MovingAverage
from gac.training.optim import make_optimizer, parameter_groups
from gac.training.self_check import check_replays
from gac.training.setup import create_network
from gac.training.step import TrainingStep
from recorded_graph import CaptureByRecording
from run_results import assert_same

pytestmark = pytest.mark.usefixtures("one_thread", "optimiser_of_the_gpu")

CPU = torch.device("cpu")
CONFIG = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=8, synthetic_classes=3),
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1], neuron="imagenet", temporal_init="alive", backend="torch"),
    train=TrainConfig(epochs=4, batch_size=4, learning_rate=0.2, cutmix="off", ema_decay=0.8),
    device="cpu",
)


@pytest.fixture
def optimiser_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the copy an optimiser that takes rate and loss scale from the device."""
    monkeypatch.setattr(self_check, "make_optimizer", lambda *arguments: of_the_gpu(make_optimizer(*arguments)))


def of_the_gpu(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group.update(fused=True, lr=torch.as_tensor(group["lr"]))
    optimizer._step_supports_amp_scaling = True
    return optimizer


def make_step(config: Config = CONFIG, scale: float | None = None) -> tuple[TrainingStep, Data]:
    torch.manual_seed(0)
    sizes = {"batch_size": config.train.batch_size, "eval_batch_size": 4}
    data = build_data(config.data, device=CPU, **sizes, seed=0, normalize=True)
    network = create_network(config, data, SINGLE_PROCESS)
    optimizer = of_the_gpu(make_optimizer(parameter_groups(network, config.train), config.train, CPU))
    scaler = torch.amp.GradScaler("cpu", scale or 1.0, enabled=scale is not None)
    average = MovingAverage(network, config.train.ema_decay) if config.train.ema_decay > 0 else None
    return TrainingStep(network, optimizer, scaler, config.train, CPU, average), data


def everything(step: TrainingStep) -> dict[str, Any]:
    return {
        "network": step.network.state_dict(),
        "training": [module.training for module in step.network.modules()],
        "gradients": [parameter.grad is None for parameter in step.network.parameters()],
        "optimizer": step.optimizer.state_dict(),
        "scaler": step.scaler.state_dict(),
        "average": step.average.state_dict(),
        "totals": step.totals.tensor,
        "random": random_state.capture(CPU),
    }


def verdict(
    capture: Callable[[], Any], config: Config, step: TrainingStep, data: Data, caplog: pytest.LogCaptureFixture
) -> str | None:
    """Return why replays are not used, or None if they are."""
    graphs = Graphs(capture)
    with caplog.at_level(logging.INFO):
        check_replays(graphs, step, config, data)
    (record,) = (each for each in caplog.records if each.getMessage().startswith("CUDA graphs are"))
    assert (record.levelno == logging.WARNING) is not graphs.in_use
    return None if graphs.in_use else record.getMessage().partition("by the host: ")[2]


@pytest.mark.parametrize(
    ("options", "scale", "steps"),
    [
        ({}, None, 0),
        ({"optimizer": "adamw", "cutmix": "epoch", "gradient_clip_norm": 0.5, "accumulate_steps": 2}, 2.0**16, 1),
        ({"loss": "tet", "checkpoint_activations": True, "freeze": "stem.*", "freeze_batch_norm": True}, 2.0**16, 1),
    ],
    ids=["sgd", "adamw", "frozen"],
)
def test_right_replays_are_used_and_the_trial_leaves_no_trace(
    options: dict[str, Any], scale: float | None, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, **options))
    step, data = make_step(config, scale)
    for _ in range(steps):
        # As when a run resumes: optimiser and average have a past.
        labels = torch.tensor([0, 1, 2, 0])
        step(torch.randn(4, 3, 8, 8), labels, labels)
    before = copy.deepcopy(everything(step))
    assert verdict(CaptureByRecording, config, step, data, caplog) is None
    assert_same(everything(step), before)


Fault = Callable[[Any, Sequence[Tensor]], Callable[[], AbstractContextManager]]
"""Called with a step and its inputs when it is captured, it returns the context in which a replay calls the step."""


class Faulty(CaptureByRecording):
    """Calls the step in place of a replay, with a fault; capturing does nothing, as on a device."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault

    def __call__(self, function: Any) -> Callable[[], Any]:
        context = self.fault(function.func, function.args)

        def replay() -> Any:
            with context():
                return function()

        return replay


def stale(choose: Callable[[Any, Sequence[Tensor]], Tensor]) -> Fault:
    """Return the fault of reading what a tensor held in the capture."""

    def fault(step: Any, inputs: Sequence[Tensor]) -> Callable[[], AbstractContextManager]:
        tensor = choose(step, inputs)
        captured = tensor.clone()

        @contextmanager
        def context() -> Iterator[None]:
            with torch.no_grad():
                tensor.copy_(captured)
            yield

        return context

    return fault


def unwritten(choose: Callable[[TrainingStep], Sequence[Tensor]]) -> Fault:
    """Return the fault of not writing some tensors, because the kernel that does is missing."""

    def fault(step: TrainingStep, inputs: Sequence[Tensor]) -> Callable[[], AbstractContextManager]:
        @contextmanager
        def context() -> Iterator[None]:
            before = [tensor.clone() for tensor in choose(step)]
            yield
            with torch.no_grad():
                for tensor, value in zip(choose(step), before, strict=True):
                    tensor.copy_(value)

        return context

    return fault


def parameter(step: TrainingStep) -> Tensor:
    return step.network.get_parameter("stages.1.0.conv2.conv.weight")


ALL_OF_IT = r" differs by (\S+) between a replay and the step, which changes it by \1$"


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (stale(lambda step, inputs: inputs[0]), ".* differs by .* between a replay and the step, which"),
        (stale(lambda step, inputs: inputs[1]), ".* differs by .* between a replay and the step, which"),
        (stale(lambda step, inputs: inputs[2]), "correct differs by"),
        (stale(lambda step, inputs: step.optimizer.param_groups[0]["lr"]), "stem.conv.weight differs by"),
        (unwritten(lambda step: [*step.network.parameters()]), "stem.conv.weight" + ALL_OF_IT),
        (unwritten(lambda step: [parameter(step)]), "stages.1.0.conv2.conv.weight" + ALL_OF_IT),
        (
            unwritten(lambda step: [step.network.get_buffer("stages.2.0.conv1.norm.running_var")]),
            "stages.2.0.conv1.norm.running_var" + ALL_OF_IT,
        ),
        (
            unwritten(lambda step: [step.optimizer.state[parameter(step)]["momentum_buffer"]]),
            "momentum_buffer of stages.1.0.conv2.conv.weight" + ALL_OF_IT,
        ),
        (
            unwritten(lambda step: [step.average.network.head.bias]),
            "the average of head.bias" + ALL_OF_IT,
        ),
        (unwritten(lambda step: [step.average.state_dict()["updates"]]), "the number of averages differs by"),
        (unwritten(lambda step: [step.totals.tensor]), "step differs by 1 between"),
        (unwritten(lambda step: [step.scaler._growth_tracker]), "a replay left the loss scaler with {.*}, the step"),
    ],
    ids=[
        *("images", "targets", "labels", "rate", "update", "one weight", "one statistic", "momentum", "average"),
        *("averages", "totals", "scaler"),
    ],
)
def test_faults_of_replays_are_found(fault: Fault, found: str, caplog: pytest.LogCaptureFixture) -> None:
    step, data = make_step(scale=2.0**16)
    before = copy.deepcopy(everything(step))
    why = verdict(lambda: Faulty(fault), CONFIG, step, data, caplog)
    assert why is not None
    assert re.match(found, why), why
    assert_same(everything(step), before)


@pytest.mark.parametrize(
    ("choose", "found"),
    [
        (lambda step, inputs: inputs[0], ".* in evaluation differs by"),
        (lambda step, inputs: inputs[1], ".* in evaluation differs by"),
        (lambda step, inputs: step.network.head.bias, ".* in evaluation differs by"),
    ],
    ids=["images", "labels", "weights"],
)
def test_faults_of_replays_in_evaluation_are_found(choose: Any, found: str, caplog: pytest.LogCaptureFixture) -> None:
    step, data = make_step()
    before = copy.deepcopy(everything(step))
    kinds = iter([CaptureByRecording, CaptureByRecording, lambda: Faulty(stale(choose))])
    why = verdict(lambda: next(kinds)(), CONFIG, step, data, caplog)
    assert why is not None
    assert re.match(found, why), why
    assert_same(everything(step), before)


def test_rounding_is_no_fault_where_two_steps_round_differently(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, data = make_step()
    plain, noise = torch.optim.SGD.step, 1e-3

    def rounding_otherwise(optimizer: torch.optim.SGD) -> None:
        for group in optimizer.param_groups:
            for each in group["params"]:
                scale = noise * torch.rand(each.shape, generator=generator)
                each.grad = each.grad * (1 + scale)
        plain(optimizer)

    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch.optim.SGD, "step", rounding_otherwise)

    def nothing(step: TrainingStep, inputs: Sequence[Tensor]) -> Callable[[], AbstractContextManager]:
        return nullcontext

    assert verdict(lambda: Faulty(nothing), CONFIG, step, data, caplog) is None
    # In noise that large no fault would show.
    noise = 3.0
    caplog.clear()
    why = verdict(lambda: Faulty(nothing), CONFIG, step, data, caplog)
    assert re.match(r"of \d+ tensors that a step changes, \d+ come out differently each time", why)


def test_a_step_that_changes_nothing_proves_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = TrainingStep._backward

    def overflowing(step: TrainingStep, *arguments: Any) -> tuple[Tensor, Tensor]:
        result = backward(step, *arguments)
        parameter(step).grad.fill_(torch.inf)
        return result

    monkeypatch.setattr(TrainingStep, "_backward", overflowing)
    step, data = make_step(scale=1.0)
    assert verdict(CaptureByRecording, CONFIG, step, data, caplog).startswith("loss scaling skips the step")


class WithoutMemory(CaptureByRecording):
    """A library of CUDA's has no memory for what runs before the capture."""

    def warm_up(self, function: Callable[[], Any]) -> Any:
        raise self.error

    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def test_memory_that_is_full_outside_of_a_capture_is_a_reason_too(caplog: pytest.LogCaptureFixture) -> None:
    step, data = make_step()
    before = copy.deepcopy(everything(step))
    why = verdict(WithoutMemory, CONFIG, step, data, caplog)
    assert why == "cpu has no memory to try graphs on a copy of the network"
    assert_same(everything(step), before)


def test_other_errors_of_the_trial_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WithoutMemory, "error", RuntimeError("CUDA error: an illegal memory access was encountered"))
    step, data = make_step()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        check_replays(Graphs(WithoutMemory), step, CONFIG, data)
