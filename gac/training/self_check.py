"""Whether replays of training and evaluation steps do what the steps do, tried on a copy before a run needs them."""

import copy
import gc
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gac.config import Config, TrainConfig
from gac.data import Data, DataInfo
from gac.errors import InputError
from gac.evaluation.evaluate import EvaluationStep
from gac.execution import random_state
from gac.execution.cuda_graph import WARM_UP_CALLS, Capture, CaptureFailed, Graphs, Replayed
from gac.execution.device import memory_format, network_input
from gac.execution.resources import is_out_of_memory
from gac.training.freezing import training_mode
from gac.training.optim import load_optimizer, make_optimizer, parameter_groups, set_learning_rate
from gac.training.step import TrainingStep
from gac.training.totals import Totals

logger = logging.getLogger("gac")

# How far a replay may be from a step, as parts of what the step changes and of what two steps differ by. Our kernels
# repeat their results; cuDNN's weight gradients need not, and round by about 1e-3 in half precision. A stale input, a
# stale learning rate or a missing kernel shows in all of what it works on.
_OF_CHANGE = 0.01
_OF_NOISE = 10.0
# Gradients at this loss scale do not overflow, which would let a step change nothing.
_LOSS_SCALE = 2.0**10


class Batch(NamedTuple):
    """What a loader yields, with the targets of a training step and its learning rate."""

    images: Tensor
    targets: Tensor
    labels: Tensor
    learning_rate: float


class State(NamedTuple):
    """Tensors by name that a training step changes or an evaluation step returns, and the loss scaler's numbers."""

    tensors: dict[str, Tensor]
    scaler: dict[str, float]


def check_replays(graphs: Graphs, step: TrainingStep, config: Config, data: Data) -> None:
    """Let a run do without graphs, with one warning, unless replays of its steps do what the steps do.

    What both change in a copy of the network, its optimiser and average, and what both return in evaluation, is
    compared on two random batches as large as the run's. The run's own state and its random generators stay as they
    are, and the copy is gone when this returns. There has to be memory for a step and for its graph at the same time,
    which the run may need as well.

    Raises:
        InputError: If there is no memory for this and ``train.cuda_graph`` is true.
    """
    train, fault = config.train, None
    before = random_state.capture(step.device)
    try:
        size = min(train.batch_size, data.train.size)
        # CutMix and mixup make targets of another type, and so graphs of their own.
        for soft in (False, True) if train.cutmix != "off" or train.mixup_alpha > 0 else (False,):
            fault = fault or find_fault(step, graphs.make(), _batches(train, data.info, size, step.device, soft))
        size = min(train.eval_batch_size, data.test.size)
        fault = fault or find_evaluation_fault(
            step.network, train, graphs.make(), _batches(train, data.info, size, step.device)
        )
    except RuntimeError as error:
        if is_out_of_memory(error):
            fault = f"{step.device} has no memory to try graphs on a copy of the network"
            if graphs.demanded:
                raise InputError(
                    f"train.cuda_graph true: {fault} with train.batch_size {train.batch_size}: choose a smaller one, or"
                    " set train.cuda_graph to auto or false"
                ) from error
        elif isinstance(error, CaptureFailed):
            fault = str(error)
        else:
            raise
    finally:
        random_state.restore(before, step.device)
        gc.collect()
        if step.device.type == "cuda":
            torch.cuda.empty_cache()
    if fault is None:
        logger.info("CUDA graphs are used: tried on a copy of the network, replays did what the steps do")
    else:
        graphs.give_up(fault)


def find_fault(step: TrainingStep, capture: Capture, batches: Sequence[Batch]) -> str | None:
    """Return in what replays of a copy of ``step`` differ from it, in one line, or None if they do not.

    Replays are compared on all ``batches`` but the first, which is captured.

    Raises:
        CaptureFailed: If the step cannot be captured.
        RuntimeError: If there is not enough memory, in the capture (OutOfMemoryInCapture) or outside of it.
    """
    copied = _copy(step)
    replayed = Replayed(copied, capture)
    for _ in range(WARM_UP_CALLS + 1):
        _run(replayed, batches[0], copied)
        # Found out, and said, in the first call.
        if copied.executor is None:
            step.executor = None
    before = _clone(_state(copied))
    for batch in batches[1:]:
        states = []
        for function in (copied, copied, replayed):
            _reset(copied, before)
            _run(function, batch, copied)
            states.append(_clone(_state(copied)))
        if states[0].tensors["skipped"] != before.tensors["skipped"]:
            return "loss scaling skips the step on which they are tried, so that nothing can be compared"
        if (fault := _compare(before, *states)) is not None:
            return fault
    return None


def find_evaluation_fault(
    network: nn.Module, config: TrainConfig, capture: Capture, batches: Sequence[Batch]
) -> str | None:
    """Return in what replays of an evaluation step differ from it, as :func:`find_fault` does of a training step."""
    network = copy.deepcopy(network).eval()
    step = EvaluationStep(network, batches[0].images.device, config.amp, config.channels_last)
    replayed = Replayed(step, capture)

    def outcome(function: Callable[..., tuple[Tensor, ...]], batch: Batch) -> State:
        results = function(batch.images, batch.labels)
        names = ("hits", "the loss", "the classes", "their probabilities")
        return _clone(State({f"{name} in evaluation": each for name, each in zip(names, results, strict=True)}, {}))

    for _ in range(WARM_UP_CALLS + 1):
        before = outcome(replayed, batches[0])
    for batch in batches[1:]:
        with torch.no_grad():
            # As training changes weights and statistics between two evaluations.
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.mul_(1.3)
        if (fault := _compare(before, *(outcome(each, batch) for each in (step, step, replayed)))) is not None:
            return fault
    return None


def _copy(step: TrainingStep) -> TrainingStep:
    """Return a step with a network, optimiser and average of its own in the same state; a teacher is shared."""
    config, device = step.config, step.device
    network, average = copy.deepcopy((step.network, step.average))
    # As when a run resumes: a copied optimiser would not know any more that it takes the loss scale.
    optimizer = make_optimizer(parameter_groups(network, config), config, device)
    load_optimizer(optimizer, step.optimizer.state_dict(), device)
    scaler = torch.amp.GradScaler(device.type, _LOSS_SCALE, enabled=step.scaler.is_enabled())
    training_mode(network, config)
    copied = TrainingStep(network, optimizer, scaler, config, device, average, step.ranks, step.distillation)
    if step.executor is None:
        copied.executor = None
    return copied


def _batches(config: TrainConfig, info: DataInfo, size: int, device: torch.device, soft: bool = False) -> list[Batch]:
    """Return a batch to capture and two to compare, which noise makes as unlike as it can.

    Targets are labels, or ``soft``: probabilities, as CutMix makes them.
    """
    generator = torch.Generator(device).manual_seed(config.seed)
    frames = () if info.frames is None else (info.frames,)
    shape = (size, *frames, info.channels, info.height, info.width)
    found = []
    for contrast, brightness, share in ((1.0, 0.0, 1.0), (0.5, 1.0, 0.5), (2.0, -0.5, 1.0)):
        images = contrast * torch.randn(shape, generator=generator, device=device) + brightness
        labels = torch.randint(info.num_classes, (size,), generator=generator, device=device)
        scores = torch.rand((size, info.num_classes), generator=generator, device=device)
        targets = scores / scores.sum(1, keepdim=True) if soft else labels
        found.append(Batch(images, targets, labels, share * config.learning_rate))
    return found


def _run(function: Callable[[Tensor, Tensor, Tensor], None], batch: Batch, step: TrainingStep) -> None:
    """Call the step or its replay on a batch, each time with the same random numbers."""
    set_learning_rate(step.optimizer, batch.learning_rate)
    images = network_input(batch.images, memory_format(step.config, step.device))
    with random_state.apart(step.config.seed, step.device):
        function(images, batch.targets, batch.labels)


def _state(step: TrainingStep) -> State:
    """Return what a step changes in place."""
    tensors = step.network.state_dict()
    for weight, parameter in step.network.named_parameters():
        tensors |= {f"{name} of {weight}": value for name, value in step.optimizer.state.get(parameter, {}).items()}
    if step.average is not None:
        average = step.average.state_dict()
        tensors |= {f"the average of {name}": tensor for name, tensor in average["model"].items()}
        tensors["the number of averages"] = average["updates"]
    tensors |= dict(zip(Totals._fields, step.totals.tensor.unbind(), strict=True))
    return State(tensors, step.scaler.state_dict())


def _clone(state: State) -> State:
    return State({name: tensor.detach().clone() for name, tensor in state.tensors.items()}, state.scaler)


@torch.no_grad()
def _reset(step: TrainingStep, state: State) -> None:
    for name, tensor in _state(step).tensors.items():
        tensor.copy_(state.tensors[name])
    step.scaler.load_state_dict(state.scaler)


def _compare(before: State, stepped: State, again: State, replayed: State) -> str | None:
    """Return what a replay did differently from two steps from the same state, in one line, or None.

    ``before`` is that state, or what an evaluation step returned for another batch.
    """
    changed = judged = 0
    for name in before.tensors:
        here = stepped.tensors[name]
        change, noise, off = (_distance(here, other.tensors[name]) for other in (before, again, replayed))
        if not off <= _OF_CHANGE * change + _OF_NOISE * noise:
            return f"{name} differs by {off:.3g} between a replay and the step, which changes it by {change:.3g}"
        changed, judged = changed + (change > 0), judged + (_OF_NOISE * noise < change)
    if judged <= changed / 2:
        return f"of {changed} tensors that a step changes, {changed - judged} come out differently each time"
    if replayed.scaler != stepped.scaler:
        return f"a replay left the loss scaler with {replayed.scaler}, the step with {stepped.scaler}"
    return None


def _distance(a: Tensor, b: Tensor) -> float:
    # Infinities may be equal, and have no difference.
    return torch.where(a == b, 0.0, a.double() - b.double()).norm().item()
