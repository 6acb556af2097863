"""All implementations at one setting, in turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.command_line import MeasurementError
from benchmarks.contender import Contender
from benchmarks.implementations import REFERENCE, Implementation, NetworkSize
from benchmarks.timing import Timing, or_out_of_memory, release_cached_memory, time_in_turns


@dataclass(frozen=True)
class Cell:
    """The measurements of one implementation at one setting; None is what ran out of memory.

    ``layout`` is the memory order of images and weights. ``peak_bytes`` is the most that tensors took at once in a
    training step, weights and optimiser included; None on a CPU, where it is not measured.
    """

    implementation: str
    T: int
    batch: int
    precision: str
    layout: str
    train: Timing | None
    evaluation: Timing | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Schedule:
    """How often the steps run: ``warmup`` >= 2 untimed ones, then ``rounds`` turns of ``steps`` timed ones."""

    warmup: int
    rounds: int
    steps: int


def measure(
    implementations: Sequence[Implementation],
    size: NetworkSize,
    T: int,
    batch: int,
    precision: str,
    layout: str,
    schedule: Schedule,
    device: torch.device,
) -> list[Cell]:
    """Measure implementations with equal weights at one setting.

    Args:
        implementations: What to compare; they take turns.
        size: Size of the network.
        T: Number of time steps.
        batch: Images per batch.
        precision: "fp32", "fp16" or "bf16".
        layout: "NCHW", "NHWC", or "auto" for what suits each implementation.
        schedule: How often the steps run.
        device: Where they run.

    Raises:
        MeasurementError: If the loss of a network is not finite at the end.
    """
    torch.manual_seed(0)
    weights = REFERENCE.build(size, T).state_dict()
    layouts = {each.name: _layout(each, precision, layout, device) for each in implementations}
    contenders: dict[str, Contender] = {}
    peaks: dict[str, int] = {}
    for each in implementations:
        before = _allocated(device)
        contender = or_out_of_memory(
            lambda each=each: Contender(each, size, T, batch, precision, layouts[each.name], weights, device)
        )
        if contender is None:
            continue
        contenders[each.name] = contender
        peak = or_out_of_memory(lambda contender=contender: _warm_up(contender, schedule.warmup, device))
        if peak is not None:
            peaks[each.name] = peak - before
        contender.rest()
        release_cached_memory(device)

    def time_all(calls: dict[str, Callable[[], None]]) -> dict[str, Timing | None]:
        return time_in_turns(calls, lambda name: contenders[name].rest(), device, schedule.rounds, schedule.steps)

    train = time_all({name: contenders[name].train_step for name in peaks})
    for name, timing in train.items():
        if timing is not None and not contenders[name].loss.isfinite():
            raise MeasurementError(f"{name}, T={T}, batch {batch}, {precision}: the loss is not finite any more")
    for contender in contenders.values():
        contender.network.eval()
    evaluation = time_all({name: contender.eval_step for name, contender in contenders.items()})
    return [
        Cell(
            name,
            T,
            batch,
            precision,
            layout,
            train.get(name),
            evaluation.get(name),
            peaks.get(name) if device.type == "cuda" else None,
        )
        for name, layout in layouts.items()
    ]


def _layout(implementation: Implementation, precision: str, requested: str, device: torch.device) -> str:
    if requested != "auto":
        return requested
    # What the convolutions of each run fastest with.
    fast_in_half = device.type == "cuda" and implementation.keeps_channels_last
    return "NHWC" if precision != "fp32" and fast_in_half else "NCHW"


def _warm_up(contender: Contender, steps: int, device: torch.device) -> int:
    """Train some steps and return the bytes that tensors took at most in the last (0 on a CPU)."""
    for _ in range(steps - 1):
        contender.train_step()
    # From here on: the first step tries algorithms out, which takes memory that training does not.
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    contender.train_step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
