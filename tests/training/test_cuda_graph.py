"""Replayed calls, on the CPU with a capture that runs the function again, and on a GPU with CUDA graphs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gac.training.cuda_graph import WARM_UP_CALLS, Replayed

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class CaptureByRunning:
    """Stands for CUDA's capture: runs nothing when it captures, and the captured function at every replay."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, function: Callable) -> Callable:
        self.captured += 1
        return function


def test_replays_begin_after_the_warm_up_and_see_new_values() -> None:
    capture, addresses = CaptureByRunning(), []

    def double(x: torch.Tensor) -> torch.Tensor:
        addresses.append(x.data_ptr())
        return 2 * x

    replayed = Replayed(double, torch.device("cpu"), capture)
    inputs = [torch.full((3,), float(i)) for i in range(WARM_UP_CALLS + 3)]
    assert [replayed(x)[0].item() for x in inputs] == [2.0 * i for i in range(WARM_UP_CALLS + 3)]
    assert capture.captured == 1
    assert addresses[:WARM_UP_CALLS] == [x.data_ptr() for x in inputs[:WARM_UP_CALLS]]
    assert len(set(addresses[WARM_UP_CALLS:])) == 1
    assert addresses[-1] not in [x.data_ptr() for x in inputs]


def test_every_size_layout_and_dtype_has_a_graph_of_its_own() -> None:
    capture = CaptureByRunning()
    replayed = Replayed(lambda x, y: x.double() + y, torch.device("cpu"), capture)
    x = torch.randn(2, 3, 4, 4)
    variants = [(x, x), (x[:1], x[:1]), (x.to(memory_format=torch.channels_last), x), (x, x.double())]
    for _ in range(WARM_UP_CALLS + 2):
        for a, b in variants:
            assert torch.equal(replayed(a, b), a.double() + b)
    assert capture.captured == len(variants)


def _train(device: str, replay: bool, capture: Callable | None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    network(torch.zeros(2, 3, 8, 8))
    network.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=device == "cuda")
    loss_sum = torch.zeros((), device=device)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        loss_sum.add_(loss.detach())

    run = Replayed(step, torch.device(device), capture) if replay else step
    generator = torch.Generator().manual_seed(1)
    for i in range(12):
        size = 3 if i % 6 == 5 else 4  # the last batch of an epoch is smaller
        images = torch.randn(size, 3, 8, 8, generator=generator).to(device)
        run(images, torch.randint(5, (size,), generator=generator).to(device))
    return [loss_sum, *network.state_dict().values()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_training_by_replays_is_training(device: str) -> None:
    capture = CaptureByRunning() if device == "cpu" else None
    for replayed, plain in zip(_train(device, True, capture), _train(device, False, None), strict=True):
        torch.testing.assert_close(replayed, plain, rtol=0, atol=0 if device == "cpu" else 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_reading_a_value_on_the_host_cannot_be_captured() -> None:
    device = torch.device("cuda")
    replayed = Replayed(lambda x: x.sum().item(), device)
    x = torch.ones(3, device=device)
    for _ in range(WARM_UP_CALLS):
        assert replayed(x) == 3.0
    with pytest.raises(RuntimeError, match="captur"):
        replayed(x)
