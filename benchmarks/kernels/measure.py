"""Times an operation and its peer at one layer's size."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.comparison import Operation
from benchmarks.kernels.operations import Case, FusedOperation, Setting
from benchmarks.replay import replay
from benchmarks.timing import Timing, or_out_of_memory, release_cached_memory, time_in_turns

# A replay is long against what its launch and its events cost.
REPLAY_SECONDS = 2e-3
MOST_CALLS = 256
# Successive calls get other tensors until this many times the second-level cache has gone by.
CACHES = 3
MOST_COPIES = 32
# Far beyond the caches of either.
GPU_COPY_BYTES = 2**30
CPU_COPY_BYTES = 2**27


@dataclass(frozen=True)
class Site:
    """Where an operation runs: shape [T, B, C, H, W] of its input, and the number of layers with that shape."""

    shape: tuple[int, ...]
    layers: int


@dataclass(frozen=True)
class Row:
    """One direction of an operation at one site; timings of single calls, None where memory ran out."""

    operation: str
    site: Site
    dtype: str
    direction: str
    bytes: int
    ours: Timing | None
    peer: Timing | None

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second of ours at the median."""
        return None if self.ours is None else 1000 * self.bytes / self.ours.median_ms


@dataclass(frozen=True)
class Schedule:
    """How often a replay runs: ``rounds`` turns of ``repeats`` timed ones."""

    rounds: int
    repeats: int


def copy_bandwidth(device: torch.device, schedule: Schedule) -> float:
    """Return the bytes per second that torch's copy of a large tensor reads and writes together."""
    size = GPU_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    run = replay([lambda: target.copy_(source)], device)
    timing = time_in_turns({"copy": run}, lambda name: None, device, schedule.rounds, schedule.repeats)["copy"]
    return 1000 * 2 * size / timing.median_ms


def measure(
    operation: FusedOperation,
    site: Site,
    dtype: torch.dtype,
    preset: str,
    schedule: Schedule,
    copy_bandwidth: float,
    device: torch.device,
) -> list[Row]:
    """Return a row for the forward pass and, where there is one, for the backward pass."""
    setting = Setting(site.shape, dtype, preset, device, kernels=device.type == "cuda")
    case = operation.make_case(setting)
    copies = _copies(case, device)
    cases = [case, *(operation.make_case(setting) for _ in range(copies - 1))]
    rows = []
    for direction, moved in (("forward", case.forward_bytes), ("backward", case.backward_bytes)):
        if moved > 0:
            calls = _forward_calls if direction == "forward" else _backward_calls
            timings = _time(cases, calls, moved / copy_bandwidth, schedule, device)
            release_cached_memory(device)
            name = str(dtype).removeprefix("torch.")
            rows.append(Row(operation.name, site, name, direction, moved, timings["ours"], timings["peer"]))
    return rows


def _time(
    cases: Sequence[Case],
    calls: Callable[[Sequence[Case], str], list[Callable[[], object]]],
    expected_seconds: float,
    schedule: Schedule,
    device: torch.device,
) -> dict[str, Timing | None]:
    """Return the timing of one call of "ours" and of "peer"."""
    # A CPU's calls are long enough as they are.
    wanted = math.ceil(REPLAY_SECONDS / expected_seconds) if device.type == "cuda" else 1
    times = math.ceil(min(wanted, MOST_CALLS) / len(cases))
    # Results too go round, or they would be written into the cache.
    replays = {
        name: or_out_of_memory(lambda name=name: replay(calls(cases, name) * times, device, keep=len(cases)))
        for name in ("ours", "peer")
    }
    fitting = {name: run for name, run in replays.items() if run is not None}
    timings = time_in_turns(fitting, lambda name: None, device, schedule.rounds, schedule.repeats)
    return {name: _divide(timings.get(name), times * len(cases)) for name in replays}


def _copies(case: Case, device: torch.device) -> int:
    """Return how many sets of tensors to go through, so that none is found in the cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, math.ceil(CACHES * cache / case.forward_bytes))


def _forward_calls(cases: Sequence[Case], name: str) -> list[Callable[[], object]]:
    return [partial(getattr(case, name), *case.inputs.values()) for case in cases]


def _backward_calls(cases: Sequence[Case], name: str) -> list[Callable[[], object]]:
    return [_backward_call(getattr(case, name), case.inputs) for case in cases]


def _backward_call(run: Operation, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    outputs = [output for output in run(*inputs.values()).values() if output.requires_grad]
    grad_outputs = [torch.randn_like(output) for output in outputs]
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    return lambda: torch.autograd.grad(outputs, wanted, grad_outputs, retain_graph=True)


def _divide(timing: Timing | None, calls: int) -> Timing | None:
    return None if timing is None else Timing(tuple(sample / calls for sample in timing.samples_ms))
