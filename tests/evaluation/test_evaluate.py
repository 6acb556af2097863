"""Evaluation counts by hand."""

import math
from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import monitor, neuron
from torch import Tensor, nn

from gac.data.interface import UNLABELLED
from gac.errors import InputError
from gac.evaluation.evaluate import EvaluationStep, evaluate
from gac.execution.cuda_graph import WARM_UP_CALLS, CaptureOnDevice, Graphs
from gac.models import create_model
from recorded_graph import CaptureByRecording

CPU = torch.device("cpu")


class Given(nn.Module):
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
    result = evaluate(EvaluationStep(Given(), CPU), [(outputs[:2], labels[:2]), (outputs[2:], labels[2:])])
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
    result = evaluate(EvaluationStep(Given(), CPU), [(outputs, torch.arange(8))])
    assert result.top1 == pytest.approx(100 / 8)
    assert result.top5 == pytest.approx(500 / 8)


def test_of_equal_outputs_the_first_is_the_prediction_as_in_top1() -> None:
    # Ten equal outputs, and a float32 sum over time that differs from the mean in its last bit.
    outputs = torch.cat([torch.zeros(1, 3, 10, 1), torch.rand(400, 3, 10, 1).mul(3).round().div(10)])
    labels = outputs.squeeze(-1).cumsum(1)[:, -1].argmax(-1)
    predictions = []
    result = evaluate(EvaluationStep(Given(), CPU), [(outputs, labels)], classes=predictions)
    ((found, ranked, probabilities),) = predictions
    assert result.top1 == result.top5 == 100
    assert torch.equal(found, labels)
    assert torch.equal(ranked[:, 0], labels)
    assert ranked[0].tolist() == [0, 1, 2, 3, 4]
    assert torch.allclose(probabilities[0], torch.full((5,), 0.1))


def test_images_without_labels_add_nothing() -> None:
    outputs = torch.randn(4, 2, 7, 1)
    labels = torch.tensor([3, UNLABELLED, 0, UNLABELLED])
    some, all_ = (
        evaluate(EvaluationStep(Given(), CPU), [batch])
        for batch in ((outputs[labels >= 0], labels[labels >= 0]), (outputs, labels))
    )
    assert (all_.images, all_.correct) == (4, some.correct)
    assert 4 * all_.loss == pytest.approx(2 * some.loss)
    assert 4 * all_.top5 == 2 * some.top5


@pytest.mark.parametrize("training", [True, False])
def test_runs_in_evaluation_mode_and_leaves_the_mode_as_it_was(training: bool) -> None:
    network = nn.Sequential(nn.Dropout(0.5), Given()).train(training)
    images = torch.ones(4, 2, 3, 1)
    result = evaluate(EvaluationStep(network, CPU), [(images, torch.zeros(4, dtype=torch.int64))])
    assert result.loss == pytest.approx(math.log(3))  # dropout would tell the classes apart
    assert network.training is training


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_come_in_the_memory_order_asked_for(channels_last: bool) -> None:
    seen = []

    class Watching(Given):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.is_contiguous(memory_format=torch.channels_last))
            return super().forward(images)

    step = EvaluationStep(Watching(), CPU, channels_last=channels_last)
    evaluate(step, [(torch.randn(2, 3, 4, 1), torch.zeros(2, dtype=torch.int64))])
    assert seen == [channels_last]


def test_an_empty_test_set_is_refused() -> None:
    with pytest.raises(InputError, match="no images"):
        evaluate(EvaluationStep(Given(), CPU), [])


def spiking(device: torch.device) -> nn.Module:
    """A small network with live neurons, and weights and statistics as training leaves them."""
    torch.manual_seed(0)
    network = create_model("msresnet18_cifar", 3, 2, width=4, depth=[1, 1, 1], neuron="imagenet").train()
    with torch.no_grad():
        for _ in range(10):
            network(torch.randn(8, 3, 8, 8))
    return network.to(device)


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 8, 8), torch.randint(3, (size,))) for size in sizes]


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_replayed_batches_count_as_they_are(device: str, amp: str) -> None:
    device = torch.device(device)
    capture = CaptureByRecording() if device == CPU else CaptureOnDevice(device)
    network = spiking(device)
    if device == CPU:
        # The recorder sees the modules' operations in any case; in bfloat16 they round more than the C kernels.
        network.set_backend("torch")
    plain, replayed = (
        EvaluationStep(network, device, amp),
        EvaluationStep(network, device, amp, graphs=Graphs(lambda: capture)),
    )
    test_set = [(images.to(device), labels.to(device)) for images, labels in batches(4, 4, 3)]
    found = []
    for _ in range(WARM_UP_CALLS + 2):
        expected = evaluate(plain, test_set)
        found.append(evaluate(replayed, test_set))
        assert found[-1] == replace(
            expected,
            # The sums are in the same order.
            loss=expected.loss if device == CPU else pytest.approx(expected.loss, rel=1e-3),
            images_per_second=found[-1].images_per_second,
        )
        with torch.no_grad():
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor *= 1.3
    assert len({score.loss for score in found}) == len(found)
    if device == CPU:
        assert (capture.captured, capture.replays) == (2, 3 * len(found) - 2 * WARM_UP_CALLS)


def test_a_batch_that_hooks_watch_is_not_replayed() -> None:
    capture = CaptureByRecording()
    step = EvaluationStep(spiking(CPU), CPU, graphs=Graphs(lambda: capture))
    ((images, labels),) = batches(4)
    step.network.eval()
    for _ in range(WARM_UP_CALLS + 1):
        expected = [result.clone() for result in step(images, labels)]
    assert capture.replays == 1
    with monitor.OutputMonitor(step.network, neuron.BaseNode) as spikes:
        for _ in range(2):
            assert all(map(torch.equal, step(images, labels), expected))
        assert [0 < each.mean() < 1 for each in spikes["lif"]] == [True, True]
    handle = step.network.head.register_forward_pre_hook(lambda module, inputs: None)
    step(images, labels)
    assert capture.replays == 1
    handle.remove()
    assert all(map(torch.equal, step(images, labels), expected))
    assert (capture.captured, capture.replays) == (1, 2)
