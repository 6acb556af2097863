"""The command line of python -m benchmarks.profile."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.agreement import check_all, summary
from benchmarks.command_line import MeasurementError, Parser, at_least, new_file, run
from benchmarks.contender import PRECISIONS, Contender
from benchmarks.environment import describe_environment, format_environment
from benchmarks.implementations import IMPLEMENTATIONS, LAYOUTS, REFERENCE, Implementation, choose_layout, what_runs
from benchmarks.network_size import NetworkSize, add_network_options, network_size
from benchmarks.output import Table, write_json
from benchmarks.profile import plot
from benchmarks.profile.groups import KERNEL_RULES, OPERATOR_RULES
from benchmarks.profile.measure import Breakdown, profile_steps
from benchmarks.timing import or_out_of_memory, release_cached_memory, time_in_turns
from gac.execution.device import select_device

MODULE = "benchmarks.profile"
# A replayed step has the kernels of the step itself, and no idle time between them.
PROFILED = [name for name, each in IMPLEMENTATIONS.items() if not each.replayed]
METHOD = (
    "On a GPU every kernel that the profiler (CUPTI) recorded counts with its duration, shared evenly where kernels"
    " overlap; idle is the time in which none ran. On a CPU every operator counts with its own time, without that of"
    " the operators inside it. Kernels of this package are a group each; all others are grouped by their names (the"
    " rules are in the JSON file and in benchmarks/profile/groups.py)."
)
TABLE = Table([("group", 30), ("ms/step", 9), ("share", 7), ("calls/step", 10)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run(_measure_and_report, arguments)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(MODULE, f"Show where the time of a step goes. {METHOD}")
    positive = at_least(1)
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=PROFILED,
        default=PROFILED,
        help="what to profile; those that the device cannot run are skipped",
    )
    add_network_options(parser)
    parser.add_argument("--step", choices=("training", "evaluation"), default="training", help="what to profile")
    parser.add_argument("--time-steps", type=positive, default=6, metavar="T", help="number of time steps")
    parser.add_argument("--batch", type=positive, default=256, metavar="B", help="images per batch")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="float32, or autocast to half precision"
    )
    parser.add_argument(
        "--layout",
        choices=("auto", *LAYOUTS),
        default="auto",
        help="memory order of images and weights; auto as in benchmarks.throughput",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU where there is one")
    parser.add_argument("--warmup", type=at_least(2), default=4, help="untimed steps before")
    parser.add_argument("--steps", type=positive, default=5, help="profiled steps; as many are timed without profiler")
    parser.add_argument("--json", type=new_file(".json"), metavar="FILE", help="write everything there")
    parser.add_argument("--plot", type=new_file(".png"), metavar="FILE", help="draw the groups there")
    return parser


def _measure_and_report(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    device = select_device(options.device)
    torch.backends.cudnn.benchmark = True
    size = network_size(options)
    implementations, _, skipped = what_runs(options.implementations, [options.precision], device)

    environment = describe_environment(MODULE, arguments, device)
    print(format_environment(environment))
    print(f"{'network':<14}{size}")
    for name, reason in skipped.items():
        print(f"{'skipped':<14}{name}: {reason}")
    agreements = check_all(implementations, size, [options.time_steps], [options.precision], device)
    for line in summary(agreements):
        print(f"{'equality':<14}{line}")

    report: dict[str, Any] = {
        "environment": environment,
        "method": METHOD,
        "rules": dict(KERNEL_RULES if device.type == "cuda" else OPERATOR_RULES),
        "network": asdict(size),
        "step": options.step,
        "skipped": skipped,
        "agreement": [asdict(agreement) for agreement in agreements],
        "breakdowns": [],
    }
    breakdowns = []
    for implementation in implementations:
        layout = choose_layout(implementation, options.precision, options.layout, device)
        found = or_out_of_memory(
            lambda each=implementation, layout=layout: _profile(each, size, options, layout, device)
        )
        release_cached_memory(device)
        if found is None:
            print(f"\n{implementation.name}: out of memory")
            continue
        _print(found, options.step)
        breakdowns.append(found)
        report["breakdowns"].append(asdict(found))
        # Written each time: what is measured stays, whatever happens next.
        if options.json is not None:
            write_json(options.json, report)
    if options.plot is not None and breakdowns:
        plot.draw(breakdowns, options, size, environment, options.plot)


def _profile(
    implementation: Implementation, size: NetworkSize, options: Any, layout: str, device: torch.device
) -> Breakdown:
    torch.manual_seed(0)
    weights = REFERENCE.build(size, options.time_steps).state_dict()
    contender = Contender(
        implementation, size, options.time_steps, options.batch, options.precision, layout, weights, device
    )
    step: Callable[[], None] = contender.train_step
    if options.step == "evaluation":
        contender.start_evaluation()
        step = contender.eval_step
    for _ in range(options.warmup):
        step()
    timing = time_in_turns({"step": step}, lambda name: None, device, rounds=1, repeats=options.steps)["step"]
    if timing is None:
        raise torch.OutOfMemoryError
    profiled_ms, groups = profile_steps(step, options.steps, device)
    if contender.diverged():
        raise MeasurementError(f"{implementation.name}: the loss is not finite any more")
    return Breakdown(implementation.name, layout, timing, profiled_ms, groups)


def _print(breakdown: Breakdown, step: str) -> None:
    ms = breakdown.timing.median_ms
    print(
        f"\n{breakdown.implementation}, {breakdown.layout}: {step} step {ms:.2f} ms without profiler,"
        f" {breakdown.profiled_ms:.2f} ms with it\n{TABLE.header()}"
    )
    for name, group in sorted(breakdown.groups.items(), key=lambda each: -each[1].ms):
        share = f"{100 * group.ms / breakdown.profiled_ms:.1f} %"
        print(TABLE.row([name, f"{group.ms:.3f}", share, f"{group.calls:.0f}"]), flush=True)
