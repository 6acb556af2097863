"""Show where the time of a step goes: python -m benchmarks.profile (--help lists all options).

On a GPU every kernel that the profiler (CUPTI) recorded counts with its duration, shared evenly where kernels
overlap; idle is the time in which none ran. On a CPU every operator counts with its own time, without that of the
operators inside it. Kernels of this package are a group each; all others are grouped by their names (the rules are in
the JSON file and in benchmarks/profile.py).
"""

import re
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import candidates, common
from benchmarks.candidates import NETWORKS, Candidate, Implementation, Setting
from benchmarks.common import OUT_OF_MEMORY, MeasurementError, Table
from benchmarks.equality import begin
from gac.command_line import at_least
from gac.ops.cuda.compiler import KERNEL_FOLDER

TABLE = Table(("group", 30), ("ms/step", 9), ("share", 7), ("calls/step", 10))
# In idle time no kernel runs (on a GPU), or none of torch's operators (on a CPU).
IDLE, OTHER = "idle", "other"
# The first pattern that is found in the name of a kernel or an operator (aten::) decides, whatever its case.
RULES = {
    "BatchNorm": r"batch_?norm|\bbn_|bn_[fb]w",
    # Before the convolutions, whose names have memory formats too: these are what channels_last is to avoid.
    "layout conversions": r"nchw_?to_?nhwc|nhwc_?to_?nchw",
    "convolutions": r"conv(?!ert)|cudnn|implicit_gemm|winograd|[fdw]grad|fprop|nchw|nhwc",
    "neurons (SpikingJelly)": r"^_?(forward|backward)_kernel|lif|surrogatespike",
    "neurons (step by step)": r"\bspike",
    "optimiser and loss scaling": r"multi_tensor_apply|optimizer|sgd|\b_?amp_",
    "loss": r"softmax|nll_loss|cross_entropy",
    "matrix products": r"gemm|gemv|nvjet|splitk|cublas|aten::(mm|addmm|linear|matmul|bmm)\b",
    "copies and casts": r"memcpy|memset|copy|catarray|fill"
    r"|aten::(to|contiguous|clone|cat|stack|repeat|zeros?_?|empty.*)$",
    "reductions": r"reduce|aten::(sum|mean|max|amax)\b",
    "element by element": r"elementwise|vectorized"
    r"|aten::(add|sub|rsub|mul|div|neg|abs|ge|gt|lt|eq|clamp|sigmoid|where|relu|threshold)",
}


def kernel_group(name: str) -> str:
    """Return the group of a GPU kernel: its own name for this package's, else by RULES."""
    ours = re.match(r"(?:void )?(\w+)\s*(?:<|\(|$)", name)
    return ours[1] if ours is not None and ours[1] in our_kernels() else operator_group([name])


def operator_group(names: Sequence[str]) -> str:
    """Return the group of an operator by RULES: the operators that it is a part of decide before it.

    ``names`` begin with the outermost and end with its own; the backward pass names nodes by the class behind them.
    """
    matches = (group for name in names for group, rule in RULES.items() if re.search(rule, name, re.IGNORECASE))
    return next(matches, OTHER)


@cache
def our_kernels() -> frozenset[str]:
    """Return the names of this package's kernels, read off their sources."""
    declaration = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(")
    return frozenset(name for path in KERNEL_FOLDER.glob("*.cu") for name in declaration.findall(path.read_text()))


def profile_steps(step: Callable[[], object], steps: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Return, for each group, its milliseconds and calls in one step, and the time of each name in it.

    ``step`` has been warmed up.
    """
    # The outermost range: what is left of it on a CPU when all operators are taken away is idle.
    with torch.profiler.profile() as profiler, torch.profiler.record_function(IDLE):
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    groups: dict[str, dict[str, Any]] = {}
    for group, name, ms in (_gpu_times if device.type == "cuda" else _cpu_times)(profiler.events()):
        found = groups.setdefault(group, {"ms": 0.0, "calls": 0.0, "names": defaultdict(float)})
        found["ms"] += ms / steps
        found["calls"] += 1 / steps
        found["names"][name] += ms / steps
    return groups


def _gpu_times(events: Iterable[FunctionEvent]) -> Iterable[tuple[str, str, float]]:
    """Yield group, name and milliseconds of everything that ran."""
    names, spans = what_ran(events)
    if not names:
        raise MeasurementError("the profiler recorded nothing of the GPU: is another profiler (CUPTI) active?")
    shares, idle = divide_time(spans)
    for name, microseconds in zip(names, shares, strict=True):
        yield kernel_group(name), name, microseconds / 1000
    yield IDLE, IDLE, idle / 1000


def what_ran(events: Iterable[FunctionEvent]) -> tuple[list[str], list[tuple[float, float]]]:
    """Return the names of kernels, copies and fills on the GPU, and their starts and ends in microseconds."""
    ran = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return [event.name for event in ran], [(event.time_range.start, event.time_range.end) for event in ran]


def divide_time(spans: Sequence[tuple[float, float]]) -> tuple[list[float], float]:
    """Return each span's share of the time from the first start to the last end, and what is left: the idle time.

    Moments in which several kernels run, on several streams, are divided evenly among them.
    """
    moments, places = np.unique(spans, return_inverse=True)
    starts, ends = places.reshape(-1, 2).T
    begun, ended = (np.bincount(places, minlength=len(moments)) for places in (starts, ends))
    running, durations = np.cumsum(begun - ended)[:-1], np.diff(moments)
    # What a kernel that ran all the time would have got at each moment.
    share = np.append(0, np.cumsum(durations / np.maximum(running, 1)))
    return (share[ends] - share[starts]).tolist(), durations[running == 0].sum().item()


def _cpu_times(events: Iterable[FunctionEvent]) -> Iterable[tuple[str, str, float]]:
    """Yield group, name and milliseconds of every operator."""
    for event in events:
        names = _path(event)
        # What is not in the range, before and after the steps, is the profiler's own.
        if names[0] == IDLE:
            yield IDLE if len(names) == 1 else operator_group(names[1:]), event.name, event.self_cpu_time_total / 1000


def _path(event: FunctionEvent | None) -> list[str]:
    return [] if event is None else [*_path(event.cpu_parent), event.name]


def _measure_and_report(options: Namespace, report: common.Report) -> None:
    more = {"rules": RULES, "step": options.step, "breakdowns": []}
    implementations, (setting,) = begin(options, report, **more)
    for each in implementations:
        found = common.or_out_of_memory(partial(_profile, each, setting, options))
        torch.cuda.empty_cache()
        if found is None:
            print(f"\n{each.name}: {OUT_OF_MEMORY}")
            continue
        without, profiled = found["timing"]["median_ms"], found["profiled_ms"]
        times = f"{without:.2f} ms without profiler, {profiled:.2f} ms with it"
        print(f"\n{each.name}, {found['layout']}: {options.step} step {times}")
        TABLE.header()
        for name, group in sorted(found["groups"].items(), key=lambda item: -item[1]["ms"]):
            TABLE.row(name, f"{group['ms']:.3f}", f"{100 * group['ms'] / profiled:.1f} %", f"{group['calls']:.0f}")
        report.add("breakdowns", [found])


def _profile(implementation: Implementation, setting: Setting, options: Namespace) -> dict[str, Any]:
    """Return where the time of one implementation's step went; the groups, idle included, add up to ``profiled_ms``.

    ``timing`` is the step without the profiler, which slows the host down: where a GPU waits for its host, the profile
    has more idle time than the step.
    """
    candidate = Candidate(implementation, setting, setting.weights())
    step = candidate.train_step
    if options.step == "evaluation":
        candidate.network.eval()
        step = candidate.eval_step
    for _ in range(options.warmup):
        step()
    timing = common.timing(common.take_turn(step, setting.device, options.steps))
    groups = profile_steps(step, options.steps, setting.device)
    candidate.check_loss()
    found = {"implementation": implementation.name, "layout": implementation.layout(setting), "timing": timing}
    return found | {"profiled_ms": sum(group["ms"] for group in groups.values()), "groups": groups}


PARSER = common.make_parser("benchmarks.profile", __doc__, "everything")
# A replayed step has the kernels of the step itself, and no idle time between them.
candidates.add_options(PARSER, NETWORKS, T=6, batch=256, precision="fp32")
PARSER.add("--step", "what to profile", choices=("training", "evaluation"), default="training")
PARSER.add("--warmup", "untimed steps before", type=at_least(2), default=4)
PARSER.add("--steps", "profiled steps; as many are timed without profiler", type=at_least(1), default=5)
main = common.program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
