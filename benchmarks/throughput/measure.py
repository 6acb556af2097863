"""All implementations at one setting, in turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.command_line import MeasurementError
from benchmarks.contender import Contender, Workload
from benchmarks.convolution_floor import FLOOR, ConvolutionFloor
from benchmarks.implementations import REFERENCE, Implementation, choose_layout
from benchmarks.network_size import NetworkSize
from benchmarks.replayed_contender import ReplayedContender
from benchmarks.timing import Timing, or_out_of_memory, release_cached_memory, time_in_turns


@dataclass(frozen=True)
class Cell:
    """The measurements of one implementation at one setting; None is what ran out of memory.

    ``layout`` is the memory order of images and weights. ``peak_bytes`` is the most that tensors took at once in a
    training step, weights and optimiser included (of a replayed step: while it was captured, as the replays work in
    that memory without asking for any); None on a CPU, where it is not measured, and for the floor, which has no
    network's memory.
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
    with_floor: bool,
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
        with_floor: Measure the convolutions alone as well; their cell is the last.
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
    layouts = {each.name: choose_layout(each, precision, layout, device) for each in implementations}
    prepare: dict[str, Callable[..., Workload]] = {
        each.name: partial(ReplayedContender if each.replayed else Contender, each) for each in implementations
    }
    if with_floor:
        layouts[FLOOR] = choose_layout(REFERENCE, precision, layout, device)
        prepare[FLOOR] = ConvolutionFloor
    workloads: dict[str, Workload] = {}
    peaks: dict[str, int] = {}
    for name, make in prepare.items():
        before = _allocated(device)
        arguments = (size, T, batch, precision, layouts[name], weights, device)
        workload = or_out_of_memory(lambda make=make, arguments=arguments: make(*arguments))
        if workload is None:
            continue
        workloads[name] = workload
        peak = or_out_of_memory(lambda workload=workload: _warm_up(workload, schedule.warmup, device))
        if peak is not None:
            peaks[name] = peak - before
        workload.rest()
        release_cached_memory(device)

    def time_all(calls: dict[str, Callable[[], None]]) -> dict[str, Timing | None]:
        return time_in_turns(calls, lambda name: workloads[name].rest(), device, schedule.rounds, schedule.steps)

    train = time_all({name: workloads[name].train_step for name in peaks})
    for name, timing in train.items():
        if timing is not None and workloads[name].diverged():
            raise MeasurementError(f"{name}, T={T}, batch {batch}, {precision}: the loss is not finite any more")
    for workload in workloads.values():
        workload.start_evaluation()
    evaluation = time_all({name: workload.eval_step for name, workload in workloads.items()})
    return [
        Cell(
            name,
            T,
            batch,
            precision,
            layout,
            train.get(name),
            evaluation.get(name),
            peaks.get(name) if device.type == "cuda" and name != FLOOR else None,
        )
        for name, layout in layouts.items()
    ]


def _warm_up(workload: Workload, steps: int, device: torch.device) -> int:
    """Train some steps and return the bytes that tensors took at most in the last (0 on a CPU)."""
    for _ in range(steps - 1):
        workload.train_step()
    # A replayed step is captured anew.
    workload.rest()
    # From here on: the first step tries algorithms out, which takes memory that training does not.
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    workload.train_step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
