"""No step computes in float64 on a device that has no such numbers, as Apple's GPUs."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gac.config import ModelConfig, TrainConfig
from gac.evaluation import evaluate
from gac.execution.device import float_for_sums
from gac.models import create_model
from gac.training import ema, totals
from gac.training.optim import make_optimizer, parameter_groups
from gac.training.step import TrainingStep

MODEL = ModelConfig(T=2, width=4, depth=[1, 1, 1])
TRAIN = TrainConfig(batch_size=4, learning_rate=0.05, cutmix="off", gradient_clip_norm=1.0, ema_decay=0.9)
CPU = torch.device("cpu")


class NoFloat64(TorchDispatchMode):
    """Refuses operations that give float64, and counts all."""

    operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        self.operations += 1
        given = [each.dtype for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        assert torch.float64 not in given, function
        return result


def test_sums_are_in_the_widest_numbers_of_the_device() -> None:
    assert [float_for_sums(torch.device(name)) for name in ("cpu", "cuda", "xpu")] == [torch.float64] * 3
    assert float_for_sums(torch.device("mps")) == torch.float32


def test_training_and_evaluation_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ema, totals, evaluate):
        monkeypatch.setattr(module, "float_for_sums", lambda device: torch.float32)
    network = create_model(num_classes=3, **asdict(MODEL)).train()
    images, labels = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    with NoFloat64() as mode:
        average = ema.MovingAverage(network, TRAIN.ema_decay)
        optimizer = make_optimizer(parameter_groups(network, TRAIN), TRAIN, CPU)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        step = TrainingStep(network, optimizer, scaler, TRAIN, CPU, average)
        step(images, labels, labels)
        evaluate.EvaluationStep(network.eval(), CPU)(images, labels)
        assert step.totals.read().images == 4
    assert mode.operations > 100
