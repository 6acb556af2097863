"""What a run that is not finite says."""

import math

import pytest
import torch
from torch import nn

from gac.config import TrainConfig
from gac.training.health import TrainingDiverged, check_totals, check_weights
from gac.training.totals import Totals

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
