"""Evaluation counts by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from gac.errors import InputError
from gac.training.evaluate import evaluate

CPU = torch.device("cpu")


class Replay(nn.Module):
    """Returns the outputs that the images carry: [B, T, K, 1] to [T, B, K]."""

    def forward(self, images: Tensor) -> Tensor:
        return images.squeeze(-1).transpose(0, 1)


def test_counts_and_loss_of_outputs_known_in_advance() -> None:
    # Two steps, three classes. Image 0 is right from the first step on, image 1 only on average, image 2
    # never.
    outputs = torch.tensor(
        [
            [[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]],
            [[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]],
            [[0.0, 0.0, 4.0], [0.0, 0.0, 4.0]],
        ]
    ).unsqueeze(-1)
    labels = torch.tensor([0, 1, 1])
    result = evaluate(Replay(), [(outputs[:2], labels[:2]), (outputs[2:], labels[2:])], CPU)
    assert (result.images, result.correct) == (3, 2)
    assert result.top1_by_time == pytest.approx([100 / 3, 200 / 3])
    assert result.top1 == result.top1_by_time[-1]
    assert result.top5 == 100  # three classes: all of them are among the five largest
    means = [[2.0, 0.0, 0.0], [0.5, 1.5, 0.0], [0.0, 0.0, 4.0]]
    losses = [math.log(sum(map(math.exp, mean))) - mean[label] for mean, label in zip(means, (0, 1, 1), strict=True)]
    assert result.loss == pytest.approx(sum(losses) / 3)
    assert result.images_per_second > 0


def test_top5_of_many_classes() -> None:
    outputs = torch.arange(8.0).reshape(1, 1, 8, 1).expand(8, 1, 8, 1)
    result = evaluate(Replay(), [(outputs, torch.arange(8))], CPU)
    assert result.top1 == pytest.approx(100 / 8)
    assert result.top5 == pytest.approx(500 / 8)


@pytest.mark.parametrize("training", [True, False])
def test_runs_in_evaluation_mode_and_leaves_the_mode_as_it_was(training: bool) -> None:
    network = nn.Sequential(nn.Dropout(0.5), Replay()).train(training)
    images = torch.ones(4, 2, 3, 1)
    result = evaluate(network, [(images, torch.zeros(4, dtype=torch.int64))], CPU)
    assert result.loss == pytest.approx(math.log(3))  # dropout would tell the classes apart
    assert network.training is training


def test_an_empty_test_set_is_refused() -> None:
    with pytest.raises(InputError, match="no images"):
        evaluate(Replay(), [], CPU)
