"""python -m benchmarks.profile: where the time of a training or evaluation step goes (--help lists all options)."""

import json
import re
import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks import candidates, common
from benchmarks.candidates import NOT_REPLAYED, Candidate, Implementation, Setting
from benchmarks.common import MeasurementError, NetworkSize, Table, Timing, at_least
from benchmarks.equality import begin, check_networks
from gac.ops.cuda.compiler import KERNEL_FOLDER

METHOD = (
    "On a GPU every kernel that the profiler (CUPTI) recorded counts with its duration, shared evenly where kernels"
    " overlap; idle is the time in which none ran. On a CPU every operator counts with its own time, without that of"
    " the operators inside it. Kernels of this package are a group each; all others are grouped by their names (the"
    " rules are in the JSON file and in benchmarks/profile.py)."
)
TABLE = Table(("group", 30), ("ms/step", 9), ("share", 7), ("calls/step", 10))
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
"""What a GPU does, among the categories of a Chrome trace."""
IDLE = "idle"
"""No kernel runs (on a GPU), or none of torch's operators (on a CPU)."""
OTHER = "other"
# The first pattern that is found in the name decides, whatever its case.
KERNEL_RULES = (
    ("BatchNorm", r"batch_?norm|\bbn_|bn_[fb]w"),
    # Before the convolutions, whose names have memory formats too: these are what channels_last is to avoid.
    ("layout conversions", r"nchw_?to_?nhwc|nhwc_?to_?nchw"),
    ("matrix products", r"xmma_gemm(?!.*(fprop|[dw]grad))"),
    ("convolutions", r"conv(?!ert)|cudnn|xmma|implicit_gemm|winograd|[fdw]grad|fprop|nchw|nhwc"),
    ("neurons (SpikingJelly)", r"^_?(forward|backward)_kernel|lif"),
    ("optimiser and loss scaling", r"multi_tensor_apply|sgd|amp_"),
    ("loss", r"softmax|nll_loss"),
    ("matrix products", r"gemm|gemv|nvjet|splitk|cublas"),
    ("copies and casts", r"memcpy|memset|copy|catarray|fill"),
    ("reductions", r"reduce"),
    ("element by element", r"elementwise|vectorized"),
)
OPERATOR_RULES = (
    ("BatchNorm", r"batch_?norm"),
    ("convolutions", r"conv"),
    ("neurons (SpikingJelly)", r"lif|surrogatespike"),
    ("neurons (step by step)", r"trianglespike|rectanglespike"),
    ("optimiser and loss scaling", r"optimizer|sgd"),
    ("loss", r"softmax|nll_loss|cross_entropy"),
    ("matrix products", r"\b(mm|addmm|linear|matmul|bmm)\b"),
    ("copies and casts", r"copy|::(to|contiguous|clone|cat|stack|repeat|zeros?|zero_|fill_|empty.*)$"),
    ("reductions", r"::(sum|mean|max|amax)\b"),
    ("element by element", r"::(add|sub|rsub|mul|div|neg|abs|ge|gt|lt|eq|clamp|sigmoid|where|relu|threshold)"),
)


def kernel_group(name: str) -> str:
    """Return the group of a GPU kernel: its own name for this package's, else by KERNEL_RULES."""
    ours = re.match(r"(?:void )?(\w+)\s*(?:<|\(|$)", name)
    return ours[1] if ours is not None and ours[1] in our_kernels() else _first_match([name], KERNEL_RULES)


def operator_group(name: str, ancestors: Sequence[str]) -> str:
    """Return the group of an operator on a CPU, by OPERATOR_RULES: the operators it is a part of decide before it.

    ``ancestors`` are the names of those, the outermost last; the backward pass names nodes by the class behind them.
    """
    return _first_match([*reversed(ancestors), name], OPERATOR_RULES)


def _first_match(names: Sequence[str], rules: tuple[tuple[str, str], ...]) -> str:
    matches = (group for name in names for group, pattern in rules if re.search(pattern, name, re.IGNORECASE))
    return next(matches, OTHER)


@cache
def our_kernels() -> frozenset[str]:
    """Return the names of this package's kernels, read off their sources."""
    declaration = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(")
    return frozenset(name for path in KERNEL_FOLDER.glob("*.cu") for name in declaration.findall(path.read_text()))


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


def profile_steps(step: Callable[[], object], steps: int, device: torch.device) -> tuple[float, dict[str, Group]]:
    """Return the milliseconds of a step under the profiler, and those of each group; ``step`` has been warmed up."""
    groups: dict[str, Group] = defaultdict(Group)
    for group, name, ms in (_gpu_times if device.type == "cuda" else _cpu_times)(step, steps, device):
        groups[group].ms += ms / steps
        groups[group].calls += 1 / steps
        groups[group].names[name] = groups[group].names.get(name, 0.0) + ms / steps
    return sum(group.ms for group in groups.values()), dict(groups)


def _gpu_times(step: Callable[[], object], steps: int, device: torch.device) -> Iterable[tuple[str, str, float]]:
    """Yield group, name and milliseconds of everything that ran."""
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
    shares, idle = divide_time([(start, end) for _, start, end in records])
    for (name, _, _), microseconds in zip(records, shares, strict=True):
        yield kernel_group(name), name, microseconds / 1000
    yield IDLE, IDLE, idle / 1000


def read_trace(trace: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return name, start and end in microseconds of what ran on the GPU from a Chrome trace."""
    ran = [event for event in trace["traceEvents"] if event.get("cat") in GPU_CATEGORIES]
    return [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in ran]


def divide_time(spans: Sequence[tuple[float, float]]) -> tuple[list[float], float]:
    """Return each span's share of the time from the first start to the last end, and what is left: the idle time.

    Moments in which several kernels run, on several streams, are divided evenly among them.
    """
    starting, ending = defaultdict(set), defaultdict(set)
    for number, (start, end) in enumerate(spans):
        starting[start].add(number)
        ending[end].add(number)
    shares, idle = [0.0] * len(spans), 0.0
    running: set[int] = set()
    for moment, following in pairwise(sorted(starting.keys() | ending.keys())):
        running |= starting[moment]
        running -= ending[moment]
        for number in running:
            shares[number] += (following - moment) / len(running)
        idle += 0 if running else following - moment
    return shares, idle


def _cpu_times(step: Callable[[], object], steps: int, device: torch.device) -> Iterable[tuple[str, str, float]]:
    """Yield group, name and milliseconds of every operator."""
    profile = torch.profiler.profile(activities=[ProfilerActivity.CPU])
    # The outermost range: what is left of it when all operators are taken away is idle.
    with profile as profiler, torch.profiler.record_function(IDLE):
        for _ in range(steps):
            step()
    for event in profiler.events():
        ancestors, parent = [], event.cpu_parent
        while parent is not None:
            ancestors.append(parent.name)
            parent = parent.cpu_parent
        # What is not in the range, before and after the steps, is the profiler's own.
        if event.name == IDLE or ancestors[-1:] == [IDLE]:
            group = IDLE if event.name == IDLE else operator_group(event.name, ancestors[:-1])
            yield group, event.name, event.self_cpu_time_total / 1000


def make_parser() -> common.Parser:
    """Return the parser of the command line."""
    parser = common.Parser("benchmarks.profile", "Show where the time of a step goes.", METHOD)
    add, positive = parser.add_argument, at_least(1)
    # A replayed step has the kernels of the step itself, and no idle time between them.
    help = "what to profile; those that the device cannot run are skipped"
    add("--implementations", nargs="+", choices=NOT_REPLAYED, default=NOT_REPLAYED, help=help)
    NetworkSize.add_options(parser)
    add("--step", choices=("training", "evaluation"), default="training", help="what to profile")
    add("--time-steps", type=positive, default=6, metavar="T", help="number of time steps")
    add("--batch", type=positive, default=256, metavar="B", help="images per batch")
    help = "float32, or autocast to half precision"
    add("--precision", choices=common.PRECISIONS, default="fp32", help=help)
    help = "memory order of images and weights; auto as in benchmarks.throughput"
    add("--layout", choices=("auto", *candidates.MEMORY_FORMATS), default="auto", help=help)
    add("--warmup", type=at_least(2), default=4, help="untimed steps before")
    add("--steps", type=positive, default=5, help="profiled steps; as many are timed without profiler")
    parser.add_common_options("everything")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return common.run(make_parser(), _measure_and_report, arguments)


def _measure_and_report(options: Namespace, device: torch.device, report: common.Report) -> None:
    more = {"rules": dict(KERNEL_RULES if device.type == "cuda" else OPERATOR_RULES), "step": options.step}
    names, precisions = options.implementations, [options.precision]
    size, implementations, _ = begin(options, names, precisions, device, report, **more)
    check_networks(implementations, size, [options.time_steps], precisions, device, report)
    report.update(breakdowns=[])
    setting = Setting(size, options.time_steps, options.batch, options.precision, options.layout, device)
    for each in implementations:
        found = common.or_out_of_memory(lambda each=each: _profile(each, setting, options))
        common.release_cached_memory(device)
        if found is None:
            print(f"\n{each.name}: out of memory")
            continue
        without, profiled = found.timing.median_ms, found.profiled_ms
        times = f"{without:.2f} ms without profiler, {profiled:.2f} ms with it"
        print(f"\n{each.name}, {found.layout}: {options.step} step {times}")
        TABLE.header()
        for name, group in sorted(found.groups.items(), key=lambda item: -item[1].ms):
            TABLE.row(name, f"{group.ms:.3f}", f"{100 * group.ms / profiled:.1f} %", f"{group.calls:.0f}")
        report.add("breakdowns", [asdict(found)])


def _profile(implementation: Implementation, setting: Setting, options: Namespace) -> Breakdown:
    candidate = Candidate(implementation, setting, setting.weights())
    step = candidate.train_step
    if options.step == "evaluation":
        candidate.start_evaluation()
        step = candidate.eval_step
    for _ in range(options.warmup):
        step()
    timing = common.time_in_turns({"step": step}, setting.device, rounds=1, repeats=options.steps)["step"]
    if timing is None:
        raise torch.OutOfMemoryError
    profiled_ms, groups = profile_steps(step, options.steps, setting.device)
    if candidate.diverged():
        raise MeasurementError(f"{implementation.name}: the loss is not finite any more")
    return Breakdown(implementation.name, candidate.layout, timing, profiled_ms, groups)


if __name__ == "__main__":
    sys.exit(main())
