"""Reading totals back."""

import math

import pytest
import torch
from torch import nn

from gac.config import TrainConfig
from gac.training.totals import (
    DeviceTotals,
    Readback,
    Totals,
    TrainingDiverged,
    check_totals,
    check_weights,
    over_ranks,
)


def test_totals_begin_with_nothing_done_and_nothing_wrong() -> None:
    assert DeviceTotals(torch.device("cpu")).read() == Totals()


def test_on_the_cpu_the_values_are_those_of_now() -> None:
    tensor = torch.zeros(2, dtype=torch.float64)
    readback = Readback(tensor)
    for value in (1.0, 2.0):
        tensor.fill_(value)
        assert readback.poll() == [value, value]


@pytest.mark.gpu
def test_on_cuda_a_copy_comes_once_the_device_has_reached_it() -> None:
    tensor = torch.zeros(2, dtype=torch.float64, device="cuda")
    readback = Readback(tensor)
    torch.cuda._sleep(10**9)  # clock cycles
    tensor.fill_(1)
    assert readback.poll() is None
    tensor.fill_(2)
    assert readback.poll() is None, "the device is still asleep"
    torch.cuda.synchronize()
    assert readback.poll() == [1, 1]
    torch.cuda.synchronize()
    assert readback.poll() == [2, 2]


def test_totals_of_ranks_are_those_of_their_images_together() -> None:
    first = Totals(step=7, images=30, loss=60.0, correct=10, skipped=2, bad_loss=5)
    second = Totals(step=7, images=20, loss=15.0, correct=20, skipped=2, bad_loss=4, bad_scale=6)
    together = over_ranks([first, second])
    assert together == Totals(step=7, images=50, loss=75.0, correct=30, skipped=2, bad_loss=4, bad_scale=6)
    assert (together.mean_loss, together.top1) == (1.5, 60.0)
    assert not together.healthy
    assert Totals(step=7).healthy


CONFIG = TrainConfig(epochs=4, learning_rate=0.2, warmup_epochs=1)


@pytest.mark.parametrize(
    ("totals", "message"),
    [
        (Totals(bad_loss=7, bad_gradient=7), r"the loss is not finite at step 7 \(epoch 2, batch 2 of 5"),
        (Totals(bad_loss=8, bad_gradient=7), "a gradient is not finite at step 7 "),
        (Totals(bad_scale=20), r"loss scale has fallen below 1 at step 20 \(epoch 4, batch 5 of 5"),
        (Totals(bad_loss=1), r"batch 1 of 5, learning rate 0\.04\)"),
    ],
)
def test_the_first_cause_is_named_with_its_place_and_learning_rate(totals: Totals, message: str) -> None:
    with pytest.raises(TrainingDiverged, match=message) as error:
        check_totals(totals, CONFIG, batches=5)
    assert "\n" not in str(error.value)


def test_finite_totals_and_skipped_steps_pass() -> None:
    check_totals(Totals(step=9, images=3, loss=math.inf, skipped=4), CONFIG, batches=5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_weights_and_statistics_must_be_finite(name: str, value: float) -> None:
    network = nn.BatchNorm2d(3)
    check_weights(network, 6, CONFIG, batches=5)
    with torch.no_grad():
        getattr(network, name)[1] = value
    with pytest.raises(TrainingDiverged, match="a weight is not finite at step 6 "):
        check_weights(network, 6, CONFIG, batches=5)
