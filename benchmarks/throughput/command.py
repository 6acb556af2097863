"""The command line of python -m benchmarks.throughput."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from benchmarks.agreement import Agreement, check_agreement
from benchmarks.command_line import Parser, at_least, new_file, run
from benchmarks.contender import LAYOUTS, PRECISIONS
from benchmarks.environment import describe_environment, format_environment
from benchmarks.implementations import IMPLEMENTATIONS, REFERENCE, Implementation, NetworkSize
from benchmarks.output import write_json
from benchmarks.throughput import plot
from benchmarks.throughput.measure import Cell, Schedule, measure
from benchmarks.throughput.report import TABLE, json_cell, table_row
from gac.errors import InputError
from gac.training.device import select_device
from gac.training.precision import DTYPES

MODULE = "benchmarks.throughput"
METHOD = (
    "A training step is the forward pass, the cross entropy of the logits' mean over time, the backward pass and SGD"
    " (momentum, weight decay; loss scaling in fp16) on one batch of random images that stays on the device. Evaluation"
    " is the forward pass. Times are medians, in brackets the quartiles, of single steps that follow without a pause;"
    " the implementations take turns."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run(_measure_and_report, arguments)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(MODULE, f"Measure the throughput of GAC-MS-ResNet-18 (CIFAR size) on random data. {METHOD}")
    positive = at_least(1)
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=list(IMPLEMENTATIONS),
        help="what to compare: our network with the CUDA kernels or with SpikingJelly's execution, SpikingJelly's own"
        " layers, a plain loop over time steps; those that the device cannot run are skipped",
    )
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
        help="memory order of images and weights; auto: NHWC in half precision on a GPU, except for the step-loop,"
        " which does not keep it, else NCHW",
    )
    parser.add_argument("--width", type=positive, default=64, metavar="C", help="channels of the first stage's input")
    parser.add_argument(
        "--depth", nargs=3, type=positive, default=[3, 3, 2], metavar="N", help="blocks in each of the three stages"
    )
    parser.add_argument("--image-size", type=at_least(8), default=32, metavar="PIXELS", help="side of the images")
    parser.add_argument("--num-classes", type=positive, default=100, metavar="K", help="number of classes")
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
    size = NetworkSize(options.width, tuple(options.depth), options.image_size, options.num_classes)
    implementations, precisions, skipped = _what_runs(options, device)

    environment = describe_environment(MODULE, arguments, device)
    print(format_environment(environment))
    network = f"width {size.width}, depth {list(size.depth)}, {size.image_size} x {size.image_size} pixels"
    print(f"{'network':<14}{network}, {size.num_classes} classes")
    for name, reason in skipped.items():
        print(f"{'skipped':<14}{name}: {reason}")
    if device.type == "cpu":
        print(f"{'memory':<14}not measured on a CPU")

    agreements = _check_all(implementations, size, options.time_steps, precisions, device)
    for line in _summary(agreements):
        print(f"{'equality':<14}{line}")
    print(f"\n{TABLE.header()}", flush=True)

    report: dict[str, Any] = {
        "environment": environment,
        "method": METHOD,
        "network": asdict(size),
        "skipped": skipped,
        "agreement": [asdict(agreement) for agreement in agreements],
        "cells": [],
    }
    schedule = Schedule(options.warmup, options.rounds, options.steps)
    cells: list[Cell] = []
    settings = product(dict.fromkeys(options.time_steps), dict.fromkeys(options.batch), precisions)
    for T, batch, precision in settings:
        group = measure(implementations, size, T, batch, precision, options.layout, schedule, device)
        for cell in group:
            print(TABLE.row(table_row(cell)), flush=True)
        cells += group
        report["cells"] += [json_cell(cell) for cell in group]
        # Written each time: what is measured stays, whatever happens next.
        if options.json is not None:
            write_json(options.json, report)
    if options.plot is not None:
        plot.draw(cells, size, environment, options.plot)


def _what_runs(options: Namespace, device: torch.device) -> tuple[list[Implementation], list[str], dict[str, str]]:
    """Return the implementations and precisions that can run, and why the others cannot. Raises InputError if none."""
    missing = {name: IMPLEMENTATIONS[name].missing(device) for name in dict.fromkeys(options.implementations)}
    lacking = {name: _lacks(device, name) for name in dict.fromkeys(options.precision)}
    for option, reasons in (("--implementations", missing), ("--precision", lacking)):
        if all(reasons.values()):
            raise InputError(f"{option}: nothing can run, {'; '.join(f'{k}: {v}' for k, v in reasons.items())}")
    skipped = {name: reason for name, reason in (missing | lacking).items() if reason is not None}
    implementations = [IMPLEMENTATIONS[name] for name in missing if name not in skipped]
    return implementations, [name for name in lacking if name not in skipped], skipped


def _lacks(device: torch.device, precision: str) -> str | None:
    if precision == "fp16" and device.type != "cuda":
        return "needs a CUDA device"
    if precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return "the GPU has no bfloat16 arithmetic"
    return None


def _check_all(
    implementations: Sequence[Implementation],
    size: NetworkSize,
    time_steps: Sequence[int],
    precisions: Sequence[str],
    device: torch.device,
) -> list[Agreement]:
    timed_half = [DTYPES[precision] for precision in precisions if precision != "fp32"]
    dtypes = {
        implementation.name: [
            torch.float32,
            *(timed_half if implementation.neuron_type is REFERENCE.neuron_type else []),
        ]
        for implementation in implementations
    }
    return [
        agreement
        for T in dict.fromkeys(time_steps)
        for agreement in check_agreement(implementations, size, T, dtypes, device)
    ]


def _summary(agreements: Sequence[Agreement]) -> list[str]:
    """Return the largest difference of each quantity with its limit, a line for each dtype."""
    worst: dict[str, dict[str, Agreement]] = {}
    for agreement in agreements:
        of_dtype = worst.setdefault(agreement.dtype, {})
        seen = of_dtype.get(agreement.quantity, agreement)
        of_dtype[agreement.quantity] = max(seen, agreement, key=lambda each: each.difference)
    return [
        f"{dtype}: "
        + ", ".join(f"{name} {each.difference:.0e} (limit {each.limit:.0e})" for name, each in of_dtype.items())
        for dtype, of_dtype in worst.items()
    ]
