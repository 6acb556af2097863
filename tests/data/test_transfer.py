from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gac.data.transfer import copy_ahead, make_beside


class Numbered(NamedTuple):
    pixels: Tensor
    number: int


def test_on_the_cpu_batches_pass_one_by_one():
    batches = (Numbered(torch.full((2,), number), number) for number in range(3))
    copied = copy_ahead(batches, torch.device("cpu"))
    assert next(copied).number == 0
    assert next(batches).number == 1


def test_batches_go_to_other_devices_as_well():
    (batch,) = copy_ahead([Numbered(torch.zeros(2), 7)], torch.device("meta"))
    assert (batch.pixels.device.type, batch.number) == ("meta", 7)


@pytest.mark.gpu
def test_cuda_batches_are_whole_in_order_and_one_ahead():
    # Large enough that reading, or reusing, memory before its time shows.
    sent = [
        Numbered(torch.full((64, 3, 224, 224), number, dtype=torch.uint8).pin_memory(), number) for number in range(12)
    ]
    source = iter(sent)
    sums = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in copy_ahead(source, torch.device("cuda", torch.cuda.current_device())):
            sums.append((batch.number, batch.pixels.double().mean()))
            if batch.number == 0:
                assert next(source).number == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [(number, mean.item()) for number, mean in sums] == [(n, n) for n in range(12) if n != 2]


def test_on_the_cpu_batches_are_made_one_by_one():
    batches = ((torch.full((2,), number),) for number in range(3))
    made = make_beside(batches, torch.device("cpu"))
    assert next(made)[0].tolist() == [0, 0]
    assert next(batches)[0].tolist() == [1, 1]


@pytest.mark.gpu
def test_cuda_batches_are_made_without_waiting_for_the_computation():
    device = torch.device("cuda", torch.cuda.current_device())
    busy = torch.cuda.Event()

    def batches():
        for number in range(6):
            # A copy from pageable memory waits for its stream, as torchvision's affine transforms do.
            yield (torch.full((64, 3, 224, 224), number, dtype=torch.float32).to(device),)

    sums = []
    for (images,) in make_beside(batches(), device):
        assert not sums or not busy.query()
        sums.append(images.double().mean())
        torch.cuda._sleep(200_000_000)
        busy.record()
    assert [mean.item() for mean in sums] == list(range(6))
