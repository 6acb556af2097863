"""The command line of python -m benchmarks.kernels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from benchmarks.command_line import MeasurementError, Parser, at_least, new_file, run
from benchmarks.comparison import Difference, compare
from benchmarks.environment import describe_environment, format_environment
from benchmarks.implementations import IMPLEMENTATIONS, REFERENCE
from benchmarks.kernels import plot
from benchmarks.kernels.measure import Row, Schedule, Site, copy_bandwidth, measure
from benchmarks.kernels.operations import OPERATIONS, FusedOperation, Setting
from benchmarks.kernels.report import TABLE, bandwidth_of_all_layers, json_row, table_row
from benchmarks.network_size import NetworkSize, add_network_options, network_size
from benchmarks.output import write_json
from benchmarks.recording import record_inputs
from benchmarks.replay import capturable_stream
from gac.errors import InputError
from gac.execution.device import select_device

MODULE = "benchmarks.kernels"
METHOD = (
    "Each operation runs on noise of the sizes that it meets in the network. GB/s are the bytes that it has to move"
    " (formulas in benchmarks/kernels/operations.py) over the median time of a call, and their share of what torch's"
    " copy of a large tensor reaches. On a GPU a call's time is a CUDA graph's of many calls, through more tensors than"
    " its cache holds. The peer is SpikingJelly's neuron with torch's layers on the same tensors, in turns."
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GATE_BATCH = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run(_measure_and_report, arguments)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(MODULE, f"Measure the fused operations. {METHOD}")
    positive = at_least(1)
    operations = "; ".join(f"{each.name}: {each.summary}" for each in OPERATIONS.values())
    parser.add_argument(
        "--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help=f"what to measure: {operations}"
    )
    add_network_options(parser)
    parser.add_argument("--time-steps", type=positive, default=6, metavar="T", help="number of time steps")
    parser.add_argument("--batch", type=positive, default=256, metavar="B", help="images per batch")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32", "float16"], help="type of the activations"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU where there is one")
    parser.add_argument("--rounds", type=positive, default=5, help="turns that ours and the peer get")
    parser.add_argument("--repeats", type=positive, default=5, help="timed replays in a turn, after an untimed one")
    parser.add_argument("--json", type=new_file(".json"), metavar="FILE", help="write all measurements there")
    parser.add_argument("--plot", type=new_file(".png"), metavar="FILE", help="draw the bandwidths there")
    return parser


def _measure_and_report(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    device = select_device(options.device)
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda" and (reason := IMPLEMENTATIONS["ours-cupy"].missing(device)):
        raise InputError(f"the fused operations cannot run: {reason}; --device cpu times their references")
    size = network_size(options)
    operations = [OPERATIONS[name] for name in dict.fromkeys(options.operations)]
    dtypes = [DTYPES[name] for name in dict.fromkeys(options.dtype)]

    environment = describe_environment(MODULE, arguments, device)
    print(format_environment(environment))
    print(f"{'network':<14}{size}")
    if device.type == "cpu":
        print(f"{'ours':<14}on a CPU the operations' references in torch, timed call by call")
    schedule = Schedule(options.rounds, options.repeats)
    with capturable_stream(device):
        sites = {operation.name: _sites(operation, size, options) for operation in operations}
        checked = _check_all(operations, sites, dtypes, size.family, device)
        print(f"{'equality':<14}{_worst(checked)}")
        copied = copy_bandwidth(device, schedule)
        print(f"{'copy':<14}{copied / 1e9:.4g} GB/s read and written\n\n{TABLE.header()}", flush=True)
        report: dict[str, Any] = {
            "environment": environment,
            "method": METHOD,
            "network": asdict(size),
            "copy_bytes_per_second": copied,
            "agreement": [{"what": what, **asdict(difference)} for what, difference in checked],
            "rows": [],
        }
        rows: list[Row] = []
        for operation, dtype in product(operations, dtypes):
            for site in sites[operation.name]:
                found = measure(operation, site, dtype, size.family, schedule, copied, device)
                for row in found:
                    print(TABLE.row(table_row(row, copied)), flush=True)
                rows += found
                report["rows"] += [json_row(row, copied) for row in found]
                # Written each time: what is measured stays, whatever happens next.
                if options.json is not None:
                    write_json(options.json, report)
    print()
    for line in _summary(rows, copied):
        print(line)
    if options.plot is not None:
        plot.draw(rows, copied, size, environment, options.plot)


def _sites(operation: FusedOperation, size: NetworkSize, options: Any) -> list[Site]:
    """Return the shapes that the operation meets in the network, each with the number of layers that have it."""
    network = REFERENCE.build(size, 1)
    inputs = record_inputs(network, operation.layers(network), size.image_size)
    shapes = Counter((options.time_steps, options.batch, *x.shape[-3:]) for x in inputs)
    return [Site(shape, layers) for shape, layers in shapes.items()]


def _check_all(
    operations: Sequence[FusedOperation],
    sites: dict[str, list[Site]],
    dtypes: Sequence[torch.dtype],
    preset: str,
    device: torch.device,
) -> list[tuple[str, Difference]]:
    """Compare ours, and in float32 the peer, with the float64 reference at all sizes but the batch.

    Raises:
        MeasurementError: If something differs by more than its limit.
    """
    torch.manual_seed(0)
    checked = []
    for operation, dtype in product(operations, dtypes):
        for site in sites[operation.name]:
            T, batch, *image = site.shape
            shape = (T, min(batch, GATE_BATCH), *image)
            case = operation.make_case(Setting(shape, dtype, preset, device, kernels=device.type == "cuda"))
            runs = {"ours": case.ours}
            # In half precision membranes on the threshold are common; SpikingJelly fires there, the original does not.
            if dtype == torch.float32:
                runs["peer"] = case.peer
            for name, function in runs.items():
                what = f"{operation.name}, {name}, {list(site.shape)}, {str(dtype).removeprefix('torch.')}"
                for difference in compare(function, case.reference, case.inputs):
                    if not difference.within:
                        raise MeasurementError(
                            f"{what}: {difference.quantity} is off by {difference.difference:.1e}, limit"
                            f" {difference.limit:.0e}; nothing was timed"
                        )
                    checked.append((what, difference))
    return checked


def _worst(checked: Sequence[tuple[str, Difference]]) -> str:
    what, difference = max(checked, key=lambda each: each[1].difference / each[1].limit)
    found = f"{difference.quantity} {difference.difference:.0e} (limit {difference.limit:.0e}) of {what}"
    return f"{len(checked)} comparisons with float64; closest to its limit: {found}"


def _summary(rows: Sequence[Row], copied: float) -> list[str]:
    lines = []
    for key in dict.fromkeys((row.operation, row.dtype, row.direction) for row in rows):
        bandwidth = bandwidth_of_all_layers([row for row in rows if (row.operation, row.dtype, row.direction) == key])
        share = "out of memory" if bandwidth is None else f"{100 * bandwidth / copied:.3g} % of copy"
        lines.append(f"{key[0]:<18}{key[1]:<10}{key[2]:<10}all layers: {share}")
    return lines
