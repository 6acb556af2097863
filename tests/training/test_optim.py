"""Learning rate, optimiser and loss against PyTorch's and SpikingJelly's own."""

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based.functional import temporal_efficient_training_cross_entropy
from torch import nn

from gac.config import TrainConfig
from gac.training.optim import classification_loss, learning_rate_at, load_optimizer, make_optimizer, parameter_groups

BATCHES = 7


def test_cosine_per_epoch_is_pytorchs() -> None:
    config = TrainConfig(epochs=9, learning_rate=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    for epoch in range(9):
        for batch in (0, BATCHES - 1):
            rate = learning_rate_at(config, epoch, batch, BATCHES)
            assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_cosine_per_batch_is_pytorchs() -> None:
    config = TrainConfig(epochs=3, learning_rate=0.2, schedule_step="batch")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3 * BATCHES)
    for step in range(3 * BATCHES):
        rate = learning_rate_at(config, *divmod(step, BATCHES), BATCHES)
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule_step", ["epoch", "batch"])
def test_warmup_rises_linearly_to_the_full_rate(schedule_step: str) -> None:
    config = TrainConfig(epochs=5, learning_rate=0.1, warmup_epochs=2, schedule_step=schedule_step)
    rates = [learning_rate_at(config, *divmod(step, BATCHES), BATCHES) for step in range(5 * BATCHES)]
    for step in range(2 * BATCHES):
        assert rates[step] == pytest.approx(0.1 * (step + 1) / (2 * BATCHES))
    assert rates[2 * BATCHES] == pytest.approx(0.1)
    assert rates[3 * BATCHES] == pytest.approx(0.075)  # a third of the cosine
    assert rates[-1] > 0


def test_weight_decay_is_on_all_parameters_alike() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    config = TrainConfig(weight_decay=5e-5, momentum=0.8)
    optimizer = make_optimizer(network.parameters(), config, torch.device("cpu"))
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 4
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (5e-5, 0.8, False)


class Stemmed(nn.Module):
    """A network with everything that the groups tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))
        self.body = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
        self.head = nn.Linear(2, 3)


BODY, STEM = ["body.0.weight", "head.weight"], ["stem.0.weight"]
SMALL = ["body.0.bias", "body.1.weight", "body.1.bias", "head.bias"]
STEM_SMALL = ["stem.1.weight", "stem.1.bias"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1e-3: BODY + STEM + SMALL + STEM_SMALL}),
        ({"weight_decay_on": "weights"}, {1e-3: BODY + STEM, 0.0: SMALL + STEM_SMALL}),
        ({"stem_weight_decay": 1e-5}, {1e-3: BODY + SMALL, 1e-5: STEM + STEM_SMALL}),
        (
            {"weight_decay_on": "weights", "stem_weight_decay": 1e-5},
            {1e-3: BODY, 1e-5: STEM, 0.0: SMALL + STEM_SMALL},
        ),
        ({"weight_decay_on": "weights", "stem_weight_decay": 0.0}, {1e-3: BODY, 0.0: STEM + SMALL + STEM_SMALL}),
    ],
)
def test_weight_decay_is_on_what_the_configuration_says(
    options: dict[str, object], expected: dict[float, list[str]]
) -> None:
    network = Stemmed()
    names = {parameter: name for name, parameter in network.named_parameters()}
    config = TrainConfig(weight_decay=1e-3, **options)
    optimizer = make_optimizer(parameter_groups(network, config), config, torch.device("cpu"))
    found = {group["weight_decay"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}
    assert found == {decay: set(parameters) for decay, parameters in expected.items()}
    # What has no decay does not move without a gradient.
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    zeros = {name for name, value in before.items() if not value.any()}
    assert moved == set(names.values()) - set(expected.get(0.0, [])) - zeros


CPU = torch.device("cpu")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_three_steps_are_those_of_plain_sgd(nesterov: bool, fused: bool) -> None:
    config = TrainConfig(nesterov=nesterov, weight_decay=0.01)
    weights = [nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    plain = torch.optim.SGD(weights[:1], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    ours = make_optimizer(weights[1:], config, CPU)
    ours.param_groups[0]["fused"] = fused
    for step in range(3):
        for weight, optimizer in zip(weights, (plain, ours), strict=True):
            weight.grad = torch.arange(5.0) - step
            optimizer.step()
        torch.testing.assert_close(weights[1], weights[0])
        torch.testing.assert_close(
            ours.state[weights[1]]["momentum_buffer"], plain.state[weights[0]]["momentum_buffer"]
        )
    assert not weights[0].equal(torch.linspace(-1, 1, 5))


def test_the_step_after_an_overflowed_first_one_is_a_first_step() -> None:
    weight = nn.Parameter(torch.ones(1000))
    optimizer = make_optimizer([weight], TrainConfig(weight_decay=0.0), CPU)
    optimizer.param_groups[0]["fused"] = True
    weight.grad = torch.full_like(weight, torch.inf)
    # What GradScaler sets when it found an overflow, and when it did not.
    optimizer.found_inf = torch.ones(())
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # memory from torch.empty is NaN
    try:
        optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert weight.equal(torch.ones(1000))
    optimizer.found_inf = torch.zeros(())
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((1000,), 1 - 0.1 * 2.0))


def test_adamw_is_pytorchs_and_its_state_comes_back() -> None:
    config = TrainConfig(optimizer="adamw", learning_rate=1e-3, weight_decay=0.05)
    weights = [nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    plain = torch.optim.AdamW(weights[:1], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05)
    ours = make_optimizer(weights[1:], config, CPU)
    for step in range(4):
        for weight, optimizer in zip(weights, (plain, ours), strict=True):
            weight.grad = torch.arange(5.0) - step
            optimizer.step()
        assert weights[0].equal(weights[1])
        # As if it were resumed after each step.
        state = ours.state_dict()
        ours = make_optimizer(weights[1:], config, CPU)
        load_optimizer(ours, state, CPU)
    with pytest.raises(ValueError, match=r"training\.optimizer is damaged: parameter 0 has \['exp_avg', 'exp_avg_sq'"):
        load_optimizer(make_optimizer(weights[1:], TrainConfig(), CPU), state, CPU)
    with pytest.raises(ValueError, match=r"train\.nesterov must be false with train\.optimizer adamw"):
        TrainConfig(optimizer="adamw", nesterov=True)


def test_without_momentum_there_is_no_buffer() -> None:
    optimizer = make_optimizer([nn.Parameter(torch.ones(3))], TrainConfig(momentum=0.0), CPU)
    assert not optimizer.state


def test_the_state_of_a_run_on_cuda_is_that_of_this_device() -> None:
    def gradient(step: int) -> torch.Tensor:
        return torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))

    weights = [nn.Parameter(torch.zeros(8, 4, 3, 3)) for _ in range(2)]
    source, target = (make_optimizer([weight], TrainConfig(), CPU) for weight in weights)
    weights[0].grad = gradient(0)
    source.step()
    state = source.state_dict()
    state["param_groups"][0]["fused"] = True
    state["state"][0]["momentum_buffer"] = gradient(0).contiguous(memory_format=torch.channels_last)

    load_optimizer(target, state, CPU)
    assert target.param_groups[0]["fused"] is False
    buffer = target.state[weights[1]]["momentum_buffer"]
    assert buffer.equal(gradient(0))
    assert buffer.stride() == weights[1].stride()
    # Also under the fused update, which takes the buffer's memory in the order of the weights.
    weights[1].data.copy_(weights[0].data)
    target.param_groups[0]["fused"] = True
    for weight, optimizer in zip(weights, (source, target), strict=True):
        weight.grad = gradient(1)
        optimizer.step()
    torch.testing.assert_close(weights[1], weights[0])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


LABELS = torch.tensor([3, 0, 1])


def test_tet_of_labels_is_spikingjellys(logits: torch.Tensor) -> None:
    expected = temporal_efficient_training_cross_entropy(logits, LABELS)
    torch.testing.assert_close(classification_loss(logits, LABELS, "tet"), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_tet_of_soft_targets_is_the_mean_over_time(logits: torch.Tensor, label_smoothing: float) -> None:
    targets = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(-1)
    losses = [F.cross_entropy(step, targets, label_smoothing=label_smoothing) for step in logits]
    loss = classification_loss(logits, targets, "tet", label_smoothing)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize("kind", ["mean", "tet"])
def test_one_hot_targets_mean_what_labels_mean(logits: torch.Tensor, kind: str) -> None:
    one_hot = F.one_hot(LABELS, 4).double()
    torch.testing.assert_close(
        classification_loss(logits, one_hot, kind, 0.1), classification_loss(logits, LABELS, kind, 0.1)
    )


def test_mean_is_the_cross_entropy_of_the_time_mean(logits: torch.Tensor) -> None:
    expected = -logits.mean(0).log_softmax(-1)[torch.arange(3), LABELS].mean()
    torch.testing.assert_close(classification_loss(logits, LABELS, "mean"), expected)
