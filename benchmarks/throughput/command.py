"""The command line of python -m benchmarks.throughput."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from benchmarks.agreement import check_all, summary
from benchmarks.command_line import Parser, at_least, new_file, run
from benchmarks.contender import PRECISIONS
from benchmarks.convolution_floor import FLOOR
from benchmarks.environment import describe_environment, format_environment
from benchmarks.implementations import IMPLEMENTATIONS, LAYOUTS, REFERENCE, Implementation, choose_layout, what_runs
from benchmarks.network_size import NetworkSize, add_network_options, network_size
from benchmarks.output import write_json
from benchmarks.throughput import plot
from benchmarks.throughput.largest_batch import find_largest_batch
from benchmarks.throughput.measure import Cell, Schedule, measure
from benchmarks.throughput.report import LARGEST_BATCH_TABLE, TABLE, json_cell, largest_batch_row, table_row
from gac.errors import InputError
from gac.execution.device import select_device

MODULE = "benchmarks.throughput"
METHOD = (
    "A training step is the forward pass, the cross entropy of the logits' mean over time, the backward pass and SGD"
    " (momentum, weight decay; loss scaling in fp16) on one batch of random images that stays on the device. Evaluation"
    " is the forward pass. Times are medians, in brackets the quartiles, of single steps that follow without a pause;"
    " the implementations take turns. ours-cupy-graph is ours-cupy with its steps replayed as CUDA graphs, as"
    " train.cuda_graph does; its memory is that of the step while it is captured, and stays taken between its steps."
    f" {FLOOR} is no network but the residual blocks' convolutions alone: forward, data"
    " gradient and weight gradient (in evaluation: forward)."
)

# By --largest-batch.
SEARCHED = [name for name, each in IMPLEMENTATIONS.items() if not each.replayed]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run(_measure_and_report, arguments)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(MODULE, f"Measure the throughput of a GAC-MS-ResNet on random data. {METHOD}")
    positive = at_least(1)
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=[*IMPLEMENTATIONS, FLOOR],
        default=[*IMPLEMENTATIONS, FLOOR],
        help="what to compare: our network with the CUDA kernels, called or replayed as CUDA graphs, or"
        " without them, SpikingJelly's own layers, a plain loop over time steps, the convolutions alone;"
        " those that the device cannot run are skipped",
    )
    add_network_options(parser)
    parser.add_argument(
        "--time-steps", nargs="+", type=positive, default=[1, 2, 4, 6, 8], metavar="T", help="numbers of time steps"
    )
    parser.add_argument("--batch", nargs="+", type=positive, default=[64, 256], metavar="B", help="images per batch")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="float32, or autocast to half precision; those that the device lacks are skipped",
    )
    parser.add_argument(
        "--layout",
        choices=("auto", *LAYOUTS),
        default="auto",
        help="memory order of images and weights; auto on a GPU: NHWC with our kernels, and in half precision for all"
        " but the step-loop, which does not keep it; else NCHW",
    )
    parser.add_argument(
        "--largest-batch",
        action="store_true",
        help="time nothing, but search the largest batch whose training step fits into the GPU's memory, to 1/16 of it"
        " (--batch does not count then, and ours-cupy-graph, which needs what ours-cupy needs, is left out)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU where there is one")
    parser.add_argument(
        "--warmup", type=at_least(2), default=4, help="untimed steps before the first round; the last gives the memory"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="turns that every implementation gets")
    parser.add_argument("--steps", type=positive, default=3, help="timed steps in a turn, after an untimed one")
    parser.add_argument("--json", type=new_file(".json"), metavar="FILE", help="write all measurements there")
    parser.add_argument("--plot", type=new_file(".png"), metavar="FILE", help="draw the training throughput there")
    return parser


def _measure_and_report(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    device = select_device(options.device)
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        # Triton launches on the current device, wherever the tensors are.
        torch.cuda.set_device(device)
    if options.largest_batch:
        if device.type != "cuda":
            raise InputError("--largest-batch needs a GPU: on a CPU, memory is not measured and has no fixed end")
        options.implementations = [name for name in options.implementations if name in SEARCHED]
        if not options.implementations:
            raise InputError(f"--largest-batch needs one of the implementations {', '.join(SEARCHED)}")
    size = network_size(options)
    networks = [name for name in options.implementations if name != FLOOR]
    implementations, precisions, skipped = what_runs(networks, options.precision, device)

    environment = describe_environment(MODULE, arguments, device)
    print(format_environment(environment))
    print(f"{'network':<14}{size}")
    for name, reason in skipped.items():
        print(f"{'skipped':<14}{name}: {reason}")
    if device.type == "cpu":
        print(f"{'memory':<14}not measured on a CPU")

    agreements = check_all(implementations, size, options.time_steps, precisions, device)
    for line in summary(agreements):
        print(f"{'equality':<14}{line}")

    report: dict[str, Any] = {
        "environment": environment,
        "method": METHOD,
        "network": asdict(size),
        "skipped": skipped,
        "agreement": [asdict(agreement) for agreement in agreements],
    }
    if options.largest_batch:
        _search_largest_batches(implementations, size, precisions, options, device, report)
    else:
        _time(implementations, size, precisions, options, device, report)


def _search_largest_batches(
    implementations: Sequence[Implementation],
    size: NetworkSize,
    precisions: Sequence[str],
    options: Namespace,
    device: torch.device,
    report: dict[str, Any],
) -> None:
    print(f"\n{LARGEST_BATCH_TABLE.header()}", flush=True)
    report["largest_batches"] = []
    for T, precision, each in product(dict.fromkeys(options.time_steps), precisions, implementations):
        torch.manual_seed(0)
        weights = REFERENCE.build(size, T).state_dict()
        layout = choose_layout(each, precision, options.layout, device)
        found = find_largest_batch(each, size, T, precision, layout, weights, device)
        print(LARGEST_BATCH_TABLE.row(largest_batch_row(found)), flush=True)
        report["largest_batches"].append(asdict(found))
        if options.json is not None:
            write_json(options.json, report)


def _time(
    implementations: Sequence[Implementation],
    size: NetworkSize,
    precisions: Sequence[str],
    options: Namespace,
    device: torch.device,
    report: dict[str, Any],
) -> None:
    print(f"\n{TABLE.header()}", flush=True)
    schedule = Schedule(options.warmup, options.rounds, options.steps)
    with_floor = FLOOR in options.implementations
    report["cells"] = []
    cells: list[Cell] = []
    settings = product(dict.fromkeys(options.time_steps), dict.fromkeys(options.batch), precisions)
    for T, batch, precision in settings:
        group = measure(implementations, with_floor, size, T, batch, precision, options.layout, schedule, device)
        floor = next((cell for cell in group if cell.implementation == FLOOR), None)
        for cell in group:
            print(TABLE.row(table_row(cell, floor)), flush=True)
        cells += group
        report["cells"] += [json_cell(cell) for cell in group]
        # Written each time: what is measured stays, whatever happens next.
        if options.json is not None:
            write_json(options.json, report)
    if options.plot is not None:
        plot.draw(cells, size, report["environment"], options.plot)
