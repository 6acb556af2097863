"""The moving average of the weights, against its definition and PyTorch's own."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gac.training.ema import MovingAverage

DONE, SKIPPED = torch.tensor(False), torch.tensor(True)


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))


def change(network: nn.Module, seed: int) -> None:
    """Move weights and statistics as a training step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator))
    network.train()(torch.randn(2, 1, 5, 5, generator=generator))


def state_of(average: MovingAverage) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in average.network.state_dict().items()}


def test_with_a_constant_decay_it_is_pytorchs() -> None:
    # The warm-up begins at 1/10.
    network = make_network()
    average = MovingAverage(network, 0.1)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.1), use_buffers=True)
    theirs.update_parameters(network)
    for step in range(5):
        change(network, step)
        average.update(DONE)
        # It truncates the average of the whole numbers.
        theirs.module[1].num_batches_tracked.fill_(step + 1)
        theirs.update_parameters(network)
    expected = theirs.module.state_dict()
    for key, value in average.network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key], msg=key)
    assert average.network[1].num_batches_tracked == 5


def test_the_first_updates_keep_less_than_the_decay_says() -> None:
    network = nn.Linear(1, 1, bias=False)
    average = MovingAverage(network, 0.9)
    expected = network.weight.item()
    for step in range(120):
        with torch.no_grad():
            network.weight.fill_(float(step % 7))
        average.update(DONE)
        kept = min(0.9, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * (step % 7)
        assert average.network.weight.item() == pytest.approx(expected, rel=1e-5)
    assert kept == 0.9


def test_a_skipped_step_changes_nothing() -> None:
    network = make_network()
    average, other = MovingAverage(network, 0.9), MovingAverage(network, 0.9)
    for step, skipped in enumerate((DONE, SKIPPED, SKIPPED, DONE)):
        before = state_of(average)
        change(network, step)
        average.update(skipped)
        if not skipped:
            other.update(DONE)
        else:
            assert all(torch.equal(value, before[key]) for key, value in state_of(average).items())
    assert all(torch.equal(value, state_of(other)[key]) for key, value in state_of(average).items())


def test_the_network_is_left_alone_and_the_average_is_not_trained() -> None:
    network = make_network()
    before = copy.deepcopy(network.state_dict())
    average = MovingAverage(network, 0.9)
    average.update(DONE)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training
    assert not average.network.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_it_continues_from_its_state() -> None:
    network = make_network()
    whole = MovingAverage(network, 0.9)
    for step in range(3):
        change(network, step)
        whole.update(DONE)
    resumed = MovingAverage(network, 0.9)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for step in range(3, 6):
        change(network, step)
        whole.update(DONE)
        resumed.update(DONE)
    assert all(torch.equal(value, state_of(whole)[key]) for key, value in state_of(resumed).items())


def test_an_update_reads_nothing() -> None:
    average = MovingAverage(make_network(), 0.9)
    # Every tensor is taken for a fake one, which has no value: reading it raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        average.update(DONE)
        with pytest.raises(DataDependentOutputException):
            bool(average._updates == 0)  # as AveragedModel does
