"""Reading totals back."""

import pytest
import torch

from gac.training.totals import DeviceTotals, Readback, Totals, over_ranks


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
