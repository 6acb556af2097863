"""One training step: its update, its totals, and loss scaling, which the CPU has too."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gac.config import TrainConfig
from gac.training.distillation import Distillation, Teacher
from gac.training.ema import MovingAverage
from gac.training.optim import classification_loss, make_optimizer
from gac.training.step import TrainingStep
from gac.training.totals import Totals

CPU = torch.device("cpu")
CONFIG = TrainConfig(learning_rate=0.1)


class TwoSteps(nn.Linear):
    """A linear network with two equal time steps: [B, 3] to [T=2, B, 4]."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).expand(2, -1, -1)


def make_step(
    config: TrainConfig = CONFIG,
    scale: float | None = None,
    ema_decay: float | None = None,
    teacher: nn.Module | None = None,
) -> TrainingStep:
    """Return a step of a small network, with loss scaling from ``scale`` on, as on a CUDA device, if it is given."""
    torch.manual_seed(0)
    network = TwoSteps(3, 4)
    optimizer = make_optimizer(network.parameters(), config, CPU)
    if scale is not None:
        (group,) = optimizer.param_groups
        group.update(fused=True, lr=torch.tensor(config.learning_rate))
        optimizer._step_supports_amp_scaling = True
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    average = None if ema_decay is None else MovingAverage(network, ema_decay)
    distillation = None if teacher is None else Distillation(config, Teacher(teacher, ""))
    return TrainingStep(network, optimizer, scaler, config, CPU, average, distillation=distillation)


def batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=generator), torch.randint(4, (size,), generator=generator)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_steps_are_those_of_a_plain_loop(scale: float | None) -> None:
    config = replace(CONFIG, loss="tet", label_smoothing=0.1)
    step, plain = make_step(config, scale), make_step(config).network
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-5)
    loss_sum, hits = 0.0, 0
    for size, seed in ((5, 1), (3, 2)):
        images, labels = batch(size, seed)
        step(images, labels, labels)
        optimizer.zero_grad()
        logits = plain(images)
        loss = classification_loss(logits, labels, "tet", 0.1)
        loss.backward()
        optimizer.step()
        loss_sum += size * loss.item()
        hits += (logits.mean(0).argmax(-1) == labels).sum().item()
    torch.testing.assert_close(step.network.weight, plain.weight)
    totals = step.totals.read()
    assert totals == Totals(step=2, images=8, loss=totals.loss, correct=hits)
    assert totals.loss == pytest.approx(loss_sum, rel=1e-6)
    assert totals.mean_loss == totals.loss / 8
    assert totals.top1 == 100 * hits / 8


def test_a_new_epoch_counts_anew_but_for_the_steps() -> None:
    step = make_step()
    images, labels = batch(4, 1)
    step(images, labels, labels)
    step(images * math.nan, labels, labels)
    step.totals.begin_epoch()
    assert step.totals.read() == Totals(step=2, bad_loss=2, bad_gradient=2)


def test_what_is_to_be_learnt_may_differ_from_what_is_counted() -> None:
    step = make_step()
    images, labels = batch(6, 1)
    predicted = step.network(images)[0].argmax(-1).detach()
    step(images, torch.full((6, 4), 0.25), predicted)
    assert step.totals.read().correct == 6
    step = make_step()
    step(images, labels, (predicted + 1) % 4)
    assert step.totals.read().correct == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_step_that_is_not_finite_is_kept(value: float) -> None:
    step = make_step()
    images, labels = batch(4, 1)
    for factor in (1.0, 1.0, value, 1.0, value):
        step(images * factor, labels, labels)
    totals = step.totals.read()
    assert (totals.bad_loss, totals.bad_scale, totals.skipped) == (3, math.inf, 0)
    assert totals.bad_gradient == 3


def test_a_large_gradient_is_finite() -> None:
    step = make_step(replace(CONFIG, learning_rate=1e-30))
    images, labels = batch(4, 1)
    step(images * 1e30, labels, labels)  # its square is beyond float32
    assert step.totals.read().bad_gradient == math.inf


def test_an_overflow_under_loss_scaling_is_skipped_and_counted() -> None:
    step = make_step(scale=2.0**127)
    before = step.network.weight.detach().clone()
    images, labels = batch(4, 1)
    step(images * 8, labels, labels)
    assert step.network.weight.equal(before)
    assert step.totals.read().skipped == 1
    while step.totals.read().skipped == step.totals.read().step:
        step(images * 8, labels, labels)
    assert not step.network.weight.equal(before)
    totals = step.totals.read()
    assert (totals.bad_loss, totals.bad_gradient, totals.bad_scale) == (math.inf,) * 3


def test_a_loss_scale_that_falls_below_one_is_kept() -> None:
    step = make_step(scale=4.0)
    images, labels = batch(4, 1)
    step.network.weight.register_hook(lambda gradient: gradient * math.inf)
    for _ in range(4):
        step(images, labels, labels)
    totals = step.totals.read()
    assert (totals.skipped, totals.bad_scale) == (4, 3)  # 4 -> 2 -> 1 -> 1/2
    assert totals.bad_gradient == math.inf


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["plain", "scaled"])
@pytest.mark.parametrize("limit", [0.05, 1e6], ids=["clipped", "within"])
def test_gradients_are_clipped_by_their_norm_without_the_loss_scale(limit: float, scale: float | None) -> None:
    config = replace(CONFIG, momentum=0.0, weight_decay=0.0, gradient_clip_norm=limit)
    step, plain = make_step(config, scale), make_step(config).network
    images, labels = batch(5, 1)
    classification_loss(plain(images), labels, "mean").backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), limit)
    assert 0.05 < norm < 1e6
    before = {name: parameter.detach().clone() for name, parameter in step.network.named_parameters()}
    step(images, labels, labels)
    for (name, parameter), other in zip(step.network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * other.grad)


def test_an_overflow_is_skipped_with_clipping_too() -> None:
    step = make_step(replace(CONFIG, gradient_clip_norm=1.0), scale=2.0**127, ema_decay=0.5)
    before = step.network.weight.detach().clone()
    images, labels = batch(4, 1)
    step(images * 8, labels, labels)
    assert step.totals.read().skipped == 1
    assert step.network.weight.equal(before)
    assert step.average.network.weight.equal(before)


def test_a_gradient_that_is_not_finite_is_seen_before_it_is_clipped() -> None:
    step = make_step(replace(CONFIG, gradient_clip_norm=1.0))
    images, labels = batch(4, 1)
    step.network.weight.register_hook(lambda gradient: gradient * math.inf)
    step(images, labels, labels)
    assert step.totals.read().bad_gradient == 1


def test_every_step_that_is_not_skipped_goes_into_the_average() -> None:
    step, plain = (make_step(CONFIG, scale, ema_decay=0.5) for scale in (2.0**127, None))
    images, labels = batch(4, 1)
    overflows = 0
    while step.totals.read().skipped == step.totals.read().step:
        assert overflows < 20
        step(images * 8, labels, labels)
        overflows += 1
    plain(images * 8, labels, labels)
    assert overflows > 1
    torch.testing.assert_close(step.average.network.weight, plain.average.network.weight)
    # One update keeps a tenth.
    start = make_step().network.weight
    torch.testing.assert_close(plain.average.network.weight, 0.1 * start + 0.9 * plain.network.weight)


@pytest.mark.parametrize("parts", [2, 5, 7])
def test_micro_batches_add_up_to_the_batch(parts: int) -> None:
    # 5 images in parts of 3 and 2, and in no more than 5.
    whole, step = make_step(), make_step(replace(CONFIG, accumulate_steps=parts))
    sizes = []
    step.network.register_forward_hook(lambda network, inputs, outputs: sizes.append(len(inputs[0])))
    images, labels = batch(5, 1)
    for each in (whole, step):
        each(images, labels, labels)
    torch.testing.assert_close(step.network.weight, whole.network.weight)
    assert sizes == ([3, 2] if parts == 2 else [1] * 5)
    found, expected = step.totals.read(), whole.totals.read()
    assert found == expected._replace(loss=found.loss)
    assert found.loss == pytest.approx(expected.loss)


def test_a_part_counts_by_its_share_of_the_batch() -> None:
    # As on a rank that has 2 of 8 images; the other ranks' gradients would be added.
    step, plain = make_step(), make_step()
    step.batch_images = 8
    images, labels = batch(2, 1)
    before = plain.network.weight.detach().clone()
    for each in (step, plain):
        each(images, labels, labels)
    decay = CONFIG.learning_rate * CONFIG.weight_decay * before
    moved = [each.network.weight.detach() - before + decay for each in (step, plain)]
    torch.testing.assert_close(4 * moved[0], moved[1])


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_a_step_that_was_broken_off_is_forgotten(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, gradient_clip_norm=limit)
    step, undisturbed = make_step(config, scale=1024.0), make_step(config, scale=1024.0)
    images, labels = batch(4, 1)

    def fail(optimizer: torch.optim.Optimizer) -> None:
        raise RuntimeError("not while a graph is captured")

    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    with pytest.raises(RuntimeError, match="captured"):
        step(images, labels, labels)
    monkeypatch.undo()
    step.abandon()
    for each in (step, undisturbed):
        each(images, labels, labels)
    assert torch.equal(step.network.weight, undisturbed.network.weight)
    assert step.totals.read() == undisturbed.totals.read()
    assert step.scaler.state_dict() == undisturbed.scaler.state_dict()


HOOKS = {
    "forward": lambda step, hook: step.network.register_forward_hook(hook),
    "backward": lambda step, hook: step.network.register_full_backward_pre_hook(hook),
    "of every module": lambda step, hook: register_module_forward_hook(hook),
    "of the teacher": lambda step, hook: step.distillation.teacher.network.register_forward_pre_hook(hook),
    "of a gradient": lambda step, hook: step.network.weight.register_hook(hook),
    "after a gradient": lambda step, hook: step.network.bias.register_post_accumulate_grad_hook(hook),
    "of several gradients": lambda step, hook: register_multi_grad_hook([*step.network.parameters()], hook),
    "before the optimiser": lambda step, hook: step.optimizer.register_step_pre_hook(hook),
    "after the optimiser": lambda step, hook: step.optimizer.register_step_post_hook(hook),
    "before every optimiser": lambda step, hook: register_optimizer_step_pre_hook(hook),
    "after every optimiser": lambda step, hook: register_optimizer_step_post_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_step_knows_of_every_hook_that_it_calls(kind: str) -> None:
    step, called = make_step(teacher=TwoSteps(3, 4)), []
    images, labels = batch(4, 1)
    assert not step.has_hooks()
    handle = HOOKS[kind](step, lambda *arguments: called.append(kind))
    try:
        assert step.has_hooks()
        step(images, labels, labels)
    finally:
        handle.remove()
    assert called
    assert not step.has_hooks()
