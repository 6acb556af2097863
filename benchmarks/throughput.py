"""python -m benchmarks.throughput: the implementations' training and evaluation (--help lists all options)."""

import gc
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks import candidates, common, plot
from benchmarks.candidates import (
    FLOOR,
    IMPLEMENTATIONS,
    NOT_REPLAYED,
    Candidate,
    ConvolutionFloor,
    Implementation,
    Setting,
)
from benchmarks.common import MeasurementError, NetworkSize, Table, Timing, at_least, or_out_of_memory, time_in_turns
from benchmarks.equality import begin, check_networks
from gac.errors import InputError

METHOD = (
    "A training step is the forward pass, the cross entropy of the logits' mean over time, the backward pass and SGD"
    " (momentum, weight decay; loss scaling in fp16) on one batch of random images that stays on the device. Evaluation"
    " is the forward pass. Times are medians, in brackets the quartiles, of single steps that follow without a pause;"
    " the implementations take turns. ours-cupy-graph is ours-cupy with its steps replayed as CUDA graphs, as"
    " train.cuda_graph does; its memory is that of the step while it is captured, and stays taken between its steps."
    f" {FLOOR} is no network but only the residual blocks' convolutions: forward, data"
    " gradient and weight gradient (in evaluation: forward)."
)
COLUMNS = (("implementation", 17), ("T", 2), ("batch", 5), ("precision", 9), ("layout", 6))
TABLE = Table(
    *COLUMNS,
    *(("train ms", 13), ("[quartiles]", 16), ("x floor", 7), ("images/s", 9), ("time steps/s", 12)),
    *(("ms/time step", 12), ("peak GiB", 8), ("eval images/s", 13), ("[quartiles]", 16)),
)
LARGEST_BATCH_TABLE = Table(("implementation", 14), *COLUMNS[1:2], *COLUMNS[3:], ("largest batch", 13), ("peak GiB", 8))
# A batch counts as the largest if one that is 1/16 larger does not fit.
REFINEMENT = 16


@dataclass(frozen=True)
class Cell:
    """The measurements of one implementation at one setting; None is what ran out of memory.

    ``peak_bytes`` is the most that tensors took at once in a training step, weights and optimiser included (of a
    replayed step: while it was captured, as the replays work in that memory without asking for any); None on a CPU,
    where it is not measured, and for the floor, which has no network's memory.
    """

    implementation: str
    T: int
    batch: int
    precision: str
    layout: str
    train: Timing | None
    evaluation: Timing | None
    peak_bytes: int | None

    def print(self, floor: "Cell | None") -> None:
        """Print it as a row of TABLE; ``floor`` is only the convolutions at the same setting."""
        row = [self.implementation, str(self.T), str(self.batch), self.precision, self.layout]
        if self.train is None:
            row += ["out of memory", *6 * "-"]
        else:
            ms, images = self.train.median_ms, 1000 * self.batch / self.train.median_ms
            low, high = self.train.quartiles_ms
            times_floor = "-" if floor is None or floor.train is None else f"{ms / floor.train.median_ms:.2f}"
            row += [f"{ms:.2f}", f"[{low:.2f}, {high:.2f}]", times_floor, _rate(images), _rate(images * self.T)]
            row += [f"{ms / self.T:.2f}", _gib(self.peak_bytes)]
        if self.evaluation is None:
            row += ["out of memory", "-"]
        else:
            rates = (1000 * self.batch / ms for ms in (self.evaluation.median_ms, *self.evaluation.quartiles_ms))
            median, high, low = map(_rate, rates)
            row += [median, f"[{low}, {high}]"]
        TABLE.row(*row)

    def as_json(self) -> dict[str, Any]:
        """Return everything measured: ms, images/s, time steps/s (images/s x T), bytes."""
        return {**vars(self), "train": self._json(self.train), "evaluation": self._json(self.evaluation)}

    def _json(self, timing: Timing | None) -> dict[str, Any] | str:
        if timing is None:
            return "out of memory"
        images, per_step = 1000 * self.batch / timing.median_ms, timing.median_ms / self.T
        rates = {"images_per_second": images, "time_steps_per_second": images * self.T, "ms_per_time_step": per_step}
        return timing.as_json() | rates


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def measure(implementations: Sequence[Implementation], setting: Setting, options: Namespace) -> list[Cell]:
    """Measure implementations with equal weights at one setting, and only the convolutions if asked for, as the last.

    Raises MeasurementError if the loss of a network is not finite at the end.
    """
    weights, device = setting.weights(), setting.device
    on_gpu = device.type == "cuda"
    prepare = {each.name: partial(candidates.make_candidate, each, setting, weights) for each in implementations}
    layouts = {each.name: each.layout(setting.layout, setting.precision, device) for each in implementations}
    if FLOOR in options.implementations:
        prepare[FLOOR] = partial(ConvolutionFloor, setting, weights)
        layouts[FLOOR] = candidates.REFERENCE.layout(setting.layout, setting.precision, device)
    workloads: dict[str, Candidate | ConvolutionFloor] = {}
    peaks: dict[str, int] = {}
    for name, make in prepare.items():
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        workload = or_out_of_memory(make)
        if workload is None:
            continue
        workloads[name] = workload
        peak = or_out_of_memory(lambda workload=workload: _warm_up(workload, options.warmup, device))
        if peak is not None:
            peaks[name] = peak - before
        workload.rest()
        common.release_cached_memory(device)

    def time_all(calls: dict[str, Callable[[], object]]) -> dict[str, Timing | None]:
        return time_in_turns(calls, device, options.rounds, options.steps, lambda name: workloads[name].rest())

    train = time_all({name: workloads[name].train_step for name in peaks})
    for name, timing in train.items():
        if timing is not None and workloads[name].diverged():
            where = f"{name}, T={setting.T}, batch {setting.batch}, {setting.precision}"
            raise MeasurementError(f"{where}: the loss is not finite any more")
    for workload in workloads.values():
        workload.start_evaluation()
    evaluation = time_all({name: workload.eval_step for name, workload in workloads.items()})
    place = (setting.T, setting.batch, setting.precision)
    peaks = {name: peak for name, peak in peaks.items() if on_gpu and name != FLOOR}
    return [
        Cell(name, *place, layout, train.get(name), evaluation.get(name), peaks.get(name))
        for name, layout in layouts.items()
    ]


def _warm_up(workload: Candidate | ConvolutionFloor, steps: int, device: torch.device) -> int:
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


def find_largest_batch(implementation: Implementation, setting: Setting) -> tuple[int, int | None]:
    """Return the most images that a GPU trains on at once, and the bytes that tensors took; 0 if not even one fits."""
    weights, peaks = setting.weights(), {}

    def train(batch: int) -> int:
        candidate = Candidate(implementation, replace(setting, batch=batch), weights)
        torch.cuda.reset_peak_memory_stats(setting.device)
        # The optimiser's state exists, and has to fit, from the second step on.
        candidate.train_step()
        candidate.train_step()
        torch.cuda.synchronize(setting.device)
        return torch.cuda.max_memory_allocated(setting.device)

    def fits(batch: int) -> bool:
        peaks[batch] = or_out_of_memory(lambda: train(batch))
        # Autograd graphs hold cycles, which keep their tensors until they are collected.
        gc.collect()
        common.release_cached_memory(setting.device)
        return peaks[batch] is not None

    batch = largest(fits)
    return batch, peaks.get(batch)


def largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, to 1/16 of it, or 0; all numbers below one that fits are taken to fit.

    The powers of two first, then the interval between the last that fits and the first that does not is halved.
    """
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // REFINEMENT):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def make_parser() -> common.Parser:
    """Return the parser of the command line."""
    purpose = "Measure the throughput of a GAC-MS-ResNet on random data."
    parser = common.Parser("benchmarks.throughput", purpose, METHOD)
    add, positive, names = parser.add_argument, at_least(1), [*IMPLEMENTATIONS, FLOOR]
    help = (
        "what to compare: our network with the CUDA kernels, called or replayed as CUDA graphs, or without them,"
        " SpikingJelly's own layers, a plain loop over time steps, only the convolutions; those that the device cannot"
        " run are skipped"
    )
    add("--implementations", nargs="+", choices=names, default=names, help=help)
    NetworkSize.add_options(parser)
    add("--time-steps", nargs="+", type=positive, default=[1, 2, 4, 6, 8], metavar="T", help="numbers of time steps")
    add("--batch", nargs="+", type=positive, default=[64, 256], metavar="B", help="images per batch")
    help = "float32, or autocast to half precision; those that the device lacks are skipped"
    add("--precision", nargs="+", choices=common.PRECISIONS, default=list(common.PRECISIONS), help=help)
    help = (
        "memory order of images and weights; auto on a GPU: NHWC with our kernels, and in half precision for all but"
        " the step-loop, which does not keep it; else NCHW"
    )
    add("--layout", choices=("auto", *candidates.MEMORY_FORMATS), default="auto", help=help)
    help = (
        "time nothing, but search the largest batch whose training step fits into the GPU's memory, to 1/16 of it"
        " (--batch does not count then, and ours-cupy-graph, which needs what ours-cupy needs, is left out)"
    )
    add("--largest-batch", action="store_true", help=help)
    help = "untimed steps before the first round; the last gives the memory"
    add("--warmup", type=at_least(2), default=4, help=help)
    add("--rounds", type=positive, default=5, help="turns that every implementation gets")
    add("--steps", type=positive, default=3, help="timed steps in a turn, after an untimed one")
    parser.add_common_options("all measurements", "the training throughput")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return common.run(make_parser(), _measure_and_report, arguments)


def _measure_and_report(options: Namespace, device: torch.device, report: common.Report) -> None:
    if options.largest_batch:
        if device.type != "cuda":
            raise InputError("--largest-batch needs a GPU: on a CPU, memory is not measured and has no fixed end")
        options.implementations = [name for name in options.implementations if name in NOT_REPLAYED]
        if not options.implementations:
            raise InputError(f"--largest-batch needs one of the implementations {', '.join(NOT_REPLAYED)}")
    networks = [name for name in options.implementations if name != FLOOR]
    size, implementations, precisions = begin(options, networks, options.precision, device, report)
    if device.type == "cpu":
        report.line("memory", "not measured on a CPU")
    check_networks(implementations, size, options.time_steps, precisions, device, report)
    print()
    time_steps = dict.fromkeys(options.time_steps)
    if options.largest_batch:
        LARGEST_BATCH_TABLE.header()
        for T, precision, each in product(time_steps, precisions, implementations):
            batch, peak = find_largest_batch(each, Setting(size, T, 1, precision, options.layout, device))
            layout = each.layout(options.layout, precision, device)
            LARGEST_BATCH_TABLE.row(each.name, str(T), precision, layout, str(batch), _gib(peak))
            place = {"implementation": each.name, "T": T, "precision": precision, "layout": layout}
            report.add("largest_batches", [{**place, "batch": batch, "peak_bytes": peak}])
        return
    TABLE.header()
    cells: list[Cell] = []
    for T, batch, precision in product(time_steps, dict.fromkeys(options.batch), precisions):
        found = measure(implementations, Setting(size, T, batch, precision, options.layout, device), options)
        for cell in found:
            cell.print(next((each for each in found if each.implementation == FLOOR), None))
        cells += found
        report.add("cells", [cell.as_json() for cell in found])
    if options.plot is not None:
        title = f"{size.network}, width {size.width}, {size.image_size} × {size.image_size} pixels"
        plot.write(plot.throughput_figure(cells, title, report.environment), options.plot)


if __name__ == "__main__":
    sys.exit(main())
