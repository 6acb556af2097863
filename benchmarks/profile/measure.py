"""Profiles steps and adds up what ran in each group."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.command_line import MeasurementError
from benchmarks.profile.groups import IDLE, kernel_group, operator_group
from benchmarks.timing import Timing

GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
"""What a GPU does, among the categories of a Chrome trace."""


@dataclass
class Group:
    """The time of a group in one step in milliseconds, its calls in one step, and the time of each name in it."""

    ms: float = 0.0
    calls: float = 0.0
    names: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Breakdown:
    """Where the time of one implementation's step went; the groups, idle included, add up to ``profiled_ms``.

    ``timing`` is the step without the profiler, which slows the host down: where a GPU waits for its host, the profile
    has more idle time than the step.
    """

    implementation: str
    layout: str
    timing: Timing
    profiled_ms: float
    groups: dict[str, Group]


@dataclass(frozen=True)
class Record:
    """One kernel: name, start and end in microseconds."""

    name: str
    start: float
    end: float


def profile_steps(step: Callable[[], None], steps: int, device: torch.device) -> tuple[float, dict[str, Group]]:
    """Return the milliseconds of a step under the profiler, and those of each group; ``step`` has been warmed up."""
    if device.type == "cuda":
        return _profile_gpu(step, steps, device)
    return _profile_cpu(step, steps)


def _profile_gpu(step: Callable[[], None], steps: int, device: torch.device) -> tuple[float, dict[str, Group]]:
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        records = read_trace(json.loads(path.read_text()))
    if not records:
        raise MeasurementError("the profiler recorded nothing of the GPU: is another profiler (CUPTI) active?")
    shares, idle = divide_time(records)
    groups: dict[str, Group] = defaultdict(Group)
    for record, microseconds in zip(records, shares, strict=True):
        _count(groups[kernel_group(record.name)], record.name, microseconds / 1000, steps)
    _count(groups[IDLE], IDLE, idle / 1000, steps)
    return sum(group.ms for group in groups.values()), dict(groups)


def read_trace(trace: dict[str, Any]) -> list[Record]:
    """Return what ran on the GPU from a Chrome trace."""
    return [
        Record(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") in GPU_CATEGORIES
    ]


def divide_time(records: Sequence[Record]) -> tuple[list[float], float]:
    """Return each record's share of the time from the first start to the last end, and what is left: the idle time.

    Moments in which several records run, on several streams, are divided evenly among them.
    """
    moments = sorted({moment for record in records for moment in (record.start, record.end)})
    starting, ending = defaultdict(list), defaultdict(list)
    for number, record in enumerate(records):
        starting[record.start].append(number)
        ending[record.end].append(number)
    shares, idle = [0.0] * len(records), 0.0
    running: set[int] = set()
    for moment, following in pairwise(moments):
        running.difference_update(ending[moment])
        running.update(number for number in starting[moment] if records[number].end > moment)
        for number in running:
            shares[number] += (following - moment) / len(running)
        if not running:
            idle += following - moment
    return shares, idle


def _profile_cpu(step: Callable[[], None], steps: int) -> tuple[float, dict[str, Group]]:
    profile = torch.profiler.profile(activities=[ProfilerActivity.CPU])
    # The outermost range: what is left of it when all operators are taken away is idle.
    with profile as profiler, torch.profiler.record_function(IDLE):
        for _ in range(steps):
            step()
    groups: dict[str, Group] = defaultdict(Group)
    for event in profiler.events():
        ancestors = list(_ancestors(event))
        if event.name != IDLE and (not ancestors or ancestors[-1] != IDLE):
            # Before and after the steps: the profiler's own.
            continue
        group = IDLE if event.name == IDLE else operator_group(event.name, ancestors[:-1])
        _count(groups[group], event.name, event.self_cpu_time_total / 1000, steps)
    return sum(group.ms for group in groups.values()), dict(groups)


def _ancestors(event: Any) -> Iterable[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def _count(group: Group, name: str, ms: float, steps: int) -> None:
    group.ms += ms / steps
    group.calls += 1 / steps
    group.names[name] = group.names.get(name, 0.0) + ms / steps
