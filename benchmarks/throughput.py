"""Measure the throughput of a GAC-MS-ResNet: python -m benchmarks.throughput (--help lists all options).

A training step is the forward pass, the cross entropy of the logits' mean over time, the backward pass and SGD
(momentum, weight decay; loss scaling in fp16) on one batch of random images that stays on the device; with --checkpoint
these are test images, and the learning rate is so small that firing rates stay. Evaluation is the forward pass. Times
are medians, in brackets the quartiles, of single steps that follow without a pause; the implementations take turns.
ours-cupy has the CUDA kernels, ours-cupy-graph its steps replayed as CUDA graphs, as train.cuda_graph does (its memory
is that of the step while it is captured, and stays taken between its steps), ours-cupy-overlap the same with weight
gradients on a second stream, as train.overlap_weight_gradients does; ours-c has their C versions and convolutions by
events on the CPU, whose time depends on how many inputs spike: "density" lists it for the blocks' convolutions in their
order; ours-torch has no kernels. spikingjelly has that library's own layers, step-loop a plain loop over time steps.
convolution-floor is no network but only the residual blocks' convolutions: forward, data gradient and weight gradient
(in evaluation: forward).
"""

import gc
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import candidates, common, plot
from benchmarks.candidates import FLOOR, IMPLEMENTATIONS, Candidate, Implementation, Setting
from benchmarks.common import OUT_OF_MEMORY, Table, Timing, or_out_of_memory
from benchmarks.equality import begin
from gac.command_line import at_least
from gac.errors import InputError
from gac.models.ms_resnet import MSResNet

TABLE = Table(
    *(("implementation", 17), ("T", 2), ("batch", 5), ("precision", 9), ("layout", 6)),
    *(("train ms", 13), ("[quartiles]", 16), ("x floor", 7), ("images/s", 9), ("time steps/s", 12)),
    *(("ms/time step", 12), ("peak GiB", 8), ("eval images/s", 13), ("[quartiles]", 16)),
)
LARGEST_BATCH_TABLE = Table(
    *(("implementation", 14), ("T", 2), ("precision", 9), ("layout", 6), ("largest batch", 13), ("peak GiB", 8))
)


def print_cell(cell: dict[str, Any], floor: Timing | None) -> None:
    """Print a cell of :func:`measure` as a row of TABLE; ``floor`` is the convolutions' training step."""
    train, evaluation = cell["train"], cell["evaluation"]
    row = [OUT_OF_MEMORY, *6 * "-"]
    if train != OUT_OF_MEMORY:
        ms, (low, high) = train["median_ms"], train["quartiles_ms"]
        of_floor = "-" if floor in (None, OUT_OF_MEMORY) else f"{ms / floor['median_ms']:.2f}"
        rates = _rate(train["images_per_second"]), _rate(train["time_steps_per_second"])
        row = [f"{ms:.2f}", f"[{low:.2f}, {high:.2f}]", of_floor, *rates, f"{train['ms_per_time_step']:.2f}"]
        row.append(_gib(cell["peak_bytes"]))
    if evaluation == OUT_OF_MEMORY:
        row += [OUT_OF_MEMORY, "-"]
    else:
        low, high = (_rate(1000 * cell["batch"] / ms) for ms in reversed(evaluation["quartiles_ms"]))
        row += [_rate(evaluation["images_per_second"]), f"[{low}, {high}]"]
    TABLE.row(*(cell[key] for key in ("implementation", "T", "batch", "precision", "layout")), *row)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def _with_rates(timing: Timing, setting: Setting) -> Timing:
    if timing == OUT_OF_MEMORY:
        return timing
    ms, rate = timing["median_ms"], 1000 * setting.batch / timing["median_ms"]
    rates = {"images_per_second": rate, "time_steps_per_second": rate * setting.T, "ms_per_time_step": ms / setting.T}
    return timing | rates


def measure(implementations: Sequence[Implementation], setting: Setting, options: Namespace) -> list[dict[str, Any]]:
    """Return what the JSON file holds of implementations with equal weights at one setting.

    ``peak_bytes`` is the most that tensors took at once in a training step, weights and optimiser included; None on a
    CPU, where it is not measured, and for the floor. Raises MeasurementError if a loss is not finite at the end.
    """
    weights, device, on_gpu = setting.weights(), setting.device, setting.device.type == "cuda"
    workloads: dict[str, Candidate] = {}
    densities: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for each in implementations:
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        workload = or_out_of_memory(partial(each.work, each, setting, weights))
        if workload is None:
            continue
        workloads[each.name] = workload
        peak = or_out_of_memory(partial(_warm_up, workload, options.warmup, device))
        if peak is not None:
            peaks[each.name] = peak - before
        workload.rest()
        torch.cuda.empty_cache()
    turns = {"rounds": options.rounds, "repeats": options.steps, "settle": options.settle}
    turns["after_turn"] = lambda name: workloads[name].rest()
    timings = {"train": common.time_in_turns({name: workloads[name].train_step for name in peaks}, device, **turns)}
    for name, timing in timings["train"].items():
        if timing != OUT_OF_MEMORY:
            workloads[name].check_loss()
    fired = next((each for each in workloads.values() if isinstance(each.network, MSResNet)), None)
    if fired is not None:
        densities = {"train": fired.densities()}
    for workload in workloads.values():
        workload.network.eval()
    if fired is not None:
        densities["evaluation"] = fired.densities()
    eval_steps = {name: workload.eval_step for name, workload in workloads.items()}
    timings["evaluation"] = common.time_in_turns(eval_steps, device, **turns)
    return [
        setting.describe(each)
        | {what: _with_rates(taken.get(each.name, OUT_OF_MEMORY), setting) for what, taken in timings.items()}
        | {"peak_bytes": peaks.get(each.name) if on_gpu and each.name != FLOOR else None, "densities": densities}
        for each in implementations
    ]


def _warm_up(workload: Candidate, steps: int, device: torch.device) -> int:
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
    """Return the most images that a GPU trains on at once, to 1/16, and the bytes that tensors took; 0 if none fits."""
    weights, peaks = setting.weights(), {}

    def fits(batch: int) -> bool:
        make = partial(Candidate, implementation, replace(setting, batch=batch), weights)
        peaks[batch] = or_out_of_memory(lambda: _warm_up(make(), 2, setting.device))
        # Autograd graphs hold cycles, which keep their tensors until they are collected.
        gc.collect()
        torch.cuda.empty_cache()
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
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _measure_and_report(options: Namespace, report: common.Report) -> None:
    device = report.device
    if options.largest_batch:
        options.implementations = [name for name in options.implementations if name in candidates.NETWORKS]
        if device.type != "cuda":
            raise InputError("--largest-batch needs a GPU: on a CPU, memory is not measured and has no fixed end")
        if not options.implementations:
            raise InputError(f"--largest-batch needs one of the implementations {', '.join(candidates.NETWORKS)}")
        options.batch = 1
    implementations, settings = begin(options, report)
    if device.type == "cpu":
        report.line("memory", "not measured on a CPU")
    print()
    if options.largest_batch:
        LARGEST_BATCH_TABLE.header()
        for setting, each in product(settings, implementations):
            batch, peak = find_largest_batch(each, setting)
            found = replace(setting, batch=batch).describe(each) | {"peak_bytes": peak}
            LARGEST_BATCH_TABLE.row(each.name, setting.T, setting.precision, found["layout"], batch, _gib(peak))
            report.add("largest_batches", [found])
        return
    TABLE.header()
    for setting in settings:
        cells = measure(implementations, setting, options)
        floor = {cell["implementation"]: cell["train"] for cell in cells}.get(FLOOR)
        for cell in cells:
            print_cell(cell, floor)
        for what, of_layers in cells[0]["densities"].items() if cells else ():
            report.line("density", f"{what}: {' '.join(f'{density:.3f}' for density in of_layers)}")
        report.add("cells", cells)
    if options.plot is not None:
        size = settings[0].size
        title = f"{size.network}, width {size.width}, {size.image_size} × {size.image_size} pixels"
        plot.write(plot.throughput_figure(report.data["cells"], title, report.environment), options.plot)


PARSER = common.make_parser("benchmarks.throughput", __doc__, "all measurements", "the training throughput")
candidates.add_options(PARSER, IMPLEMENTATIONS, T=[1, 2, 4, 6, 8], batch=[64, 256], precision=list(common.PRECISIONS))
help = (
    "time nothing, but search the largest batch whose training step fits into the GPU's memory, to 1/16 of it"
    " (--batch does not count then, and ours-cupy-graph and -overlap, which need what ours-cupy needs, are left out)"
)
PARSER.add("--largest-batch", help, action="store_true")
help = (
    "a checkpoint of train.py: its weights, and test images of its data set from where its configuration says, so that"
    " layers fire as after training; network, size and T are its own, and those options do not count"
)
PARSER.add("--checkpoint", help, type=Path, metavar="FILE")
help = "untimed steps before the first round; the last gives the memory"
PARSER.add("--warmup", help, type=at_least(2), default=4)
PARSER.add("--rounds", "turns that every implementation gets", type=at_least(1), default=5)
PARSER.add("--steps", "timed steps in a turn, after untimed ones", type=at_least(1), default=3)
help = "seconds of untimed steps in a turn on a GPU: its clock is higher at first than it stays"
PARSER.add("--settle", help, type=at_least(0), default=1, metavar="SECONDS")
main = common.program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
