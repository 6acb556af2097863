"""Measure convolutions over spikes by events on the CPU against dense ones: python -m benchmarks.events (--help).

Each shape is that of a 3 x 3 convolution of GAC-MS-ResNet-18 on T x B frames, with spikes at random. The rival is
torch's float32 convolution (oneDNN) in the faster of both memory orders. The forward pass by events has everything that
a call does: lists of the spikes, weights in tiles, memory for the result; the weight gradient takes the forward's
lists. Before anything is timed the results are compared with torch's in float64. Times are medians of single calls,
which take turns; the crossover is the density at which both take as long, by interpolation.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any
from unittest import mock

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common, plot
from benchmarks.common import MeasurementError, Report, Table
from gac.command_line import at_least
from gac.errors import InputError
from gac.ops import c_kernels, event_conv

SHAPES = ((128, 32), (256, 16), (512, 8))
"""Channels, and side of the frames in pixels."""
ORDERS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
COLORS = ("#0072B2", "#D55E00", "#009E73")
TABLE = Table(
    *(("channels", 8), ("pixels", 7), ("density", 7), ("pass", 15), ("order", 5)),
    *(("events ms", 9), ("[quartiles]", 16), ("dense ms", 9), ("[quartiles]", 16), ("speed-up", 8)),
)
Calls = dict[tuple[str, str], Callable[[], object]]


def make_calls(spikes: Tensor, weight: Tensor, gradient: Tensor) -> dict[str, Calls]:
    """Return what is timed, by pass, and then by who ("events" or "dense") and memory order."""
    calls: dict[str, Calls] = {"forward": {}, "weight gradient": {}}
    for order, memory_format in ORDERS.items():
        x, w, g = (tensor.contiguous(memory_format=memory_format) for tensor in (spikes, weight, gradient))
        _, index, count = event_conv._forward(x, w, 1, 1)
        if index is None:
            raise MeasurementError(f"events are not used for {len(weight)} channels; nothing was timed")
        calls["forward"]["events", order] = lambda x=x, w=w: event_conv._forward(x, w, 1, 1)[0]
        calls["forward"]["dense", order] = lambda x=x, w=w: F.conv2d(x, w, padding=1)
        calls["weight gradient"]["events", order] = lambda x=x, w=w, g=g, index=index, count=count: (
            event_conv._weight_gradient(g, x, w, index, count, 1, 1)
        )
        calls["weight gradient"]["dense", order] = lambda x=x, w=w, g=g: event_conv._dense_gradients(
            g, x, w, 1, 1, torch.float32, (False, True)
        )[1]
    return calls


def check(calls: dict[str, Calls], spikes: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Raise MeasurementError unless all calls give what torch does in float64, but for the rounding of sums."""
    x, w = spikes.double(), weight.double().requires_grad_()
    exact = F.conv2d(x, w, padding=1)
    wanted = {"forward": exact, "weight gradient": torch.autograd.grad(exact, w, gradient.double())[0]}
    for what, of_pass in calls.items():
        for (who, order), call in of_pass.items():
            error = (call().double() - wanted[what]).abs().max() / wanted[what].abs().max()
            if not error <= 1e-5:
                raise MeasurementError(f"{what} of {who} in {order} is off by {error:.1e}; nothing was timed")


def measure(shape: tuple[int, int], density: float, options: Namespace) -> list[dict[str, Any]]:
    """Return what the JSON file holds of one shape and density: a row for each pass and memory order of events."""
    (channels, side), frames = shape, options.frames
    torch.manual_seed(0)
    spikes = (torch.rand(frames, channels, side, side) < density).float()
    weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
    gradient = torch.randn(spikes.shape)
    calls = make_calls(spikes, weight, gradient)
    check(calls, spikes, weight, gradient)
    rows = []
    for what, of_pass in calls.items():
        timings = common.time_in_turns(of_pass, torch.device("cpu"), options.rounds, options.repeats)
        dense = min((timings["dense", order] for order in ORDERS), key=lambda timing: timing["median_ms"])
        for order in ORDERS:
            events = timings["events", order]
            place = {"channels": channels, "side": side, "frames": frames, "density": density}
            speed_up = dense["median_ms"] / events["median_ms"]
            rows.append(place | {"pass": what, "order": order, "events": events, "dense": dense, "speed_up": speed_up})
    return rows


def print_row(row: dict[str, Any]) -> None:
    """Print a row of :func:`measure` in TABLE."""
    times = []
    for who in ("events", "dense"):
        low, high = row[who]["quartiles_ms"]
        times += [f"{row[who]['median_ms']:.2f}", f"[{low:.2f}, {high:.2f}]"]
    place = str(row["channels"]), f"{row['side']} x {row['side']}", f"{row['density']:.2f}", row["pass"], row["order"]
    TABLE.row(*place, *times, f"{row['speed_up']:.2f}")


def crossover(rows: list[dict[str, Any]]) -> float | None:
    """Return the density from which events are slower than the dense convolution; None if it was not passed."""
    rows = sorted(rows, key=lambda row: row["density"])
    for before, after in pairwise(rows):
        if before["speed_up"] >= 1 > after["speed_up"]:
            gained = (before["speed_up"] - 1) / (before["speed_up"] - after["speed_up"])
            return before["density"] + gained * (after["density"] - before["density"])
    return None


def figure(rows: list[dict[str, Any]], environment: dict[str, str]) -> Figure:
    """Return speed-up over density: a panel for each pass, a line for each shape and memory order."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    with mpl.rc_context(plot.RC):
        drawn, (grid,) = plot.panels((1, len(passes)), (3.6, 2.6), "3 × 3 convolutions over spikes", environment)
        for axes, what in zip(grid, passes, strict=True):
            shapes = common.grouped([row for row in rows if row["pass"] == what], "channels", "side")
            for ((channels, side), of_shape), color in zip(shapes.items(), COLORS, strict=False):
                for (order,), line in common.grouped(of_shape, "order").items():
                    densities, ratios = np.array([(row["density"], row["speed_up"]) for row in line]).T
                    label = f"{channels} channels, {side} × {side}, {order}"
                    style = {"color": color, "linestyle": "-" if order == "NHWC" else "--", "marker": "o"}
                    axes.plot(densities, ratios, label=label, markersize=3, linewidth=1.2, **style)
            axes.axhline(1, color="#444444", linewidth=0.8)
            used = event_conv.MAX_DENSITY if what == "forward" else event_conv.MAX_GRADIENT_DENSITY
            axes.axvline(used, color="#888888", linewidth=0.8, linestyle=":")
            axes.set_title(what)
            axes.set_xlabel("density: inputs that spike (dotted: used up to here)")
            axes.grid(axis="y")
        # After both panels, which share the axis: fixing one end stops its scaling.
        grid[0].set_ylim(bottom=0)
        grid[0].set_ylabel("times as fast as the dense convolution")
        drawn.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawn


def _measure_and_report(options: Namespace, report: Report) -> None:
    if report.device.type != "cpu":
        raise InputError(f"convolutions by events run on the CPU, not on {report.device}: leave out --device")
    if not (status := c_kernels.status()).ok:
        raise InputError(f"the C kernels cannot run: {status.reason}")
    if not all(0 <= density <= 1 for density in options.densities):
        raise InputError(f"--densities: expected numbers from 0 to 1, got {' '.join(map(str, options.densities))}")
    report.begin()
    print()
    TABLE.header()
    # At every density, whatever the package would choose.
    with mock.patch.multiple(event_conv, MAX_DENSITY=1.0, MAX_GRADIENT_DENSITY=1.0):
        for shape, density in product(SHAPES, options.densities):
            rows = measure(shape, density, options)
            for row in rows:
                print_row(row)
            report.add("rows", rows)
    print()
    for (channels, side, what, order), rows in common.grouped(
        report.data["rows"], "channels", "side", "pass", "order"
    ).items():
        found = crossover(rows)
        title = f"{channels} channels, {side} x {side}, {what}, {order}"
        if found is None:
            slowest, fastest = (pick(row["speed_up"] for row in rows) for pick in (min, max))
            report.line("crossover", f"{title}: not passed, {slowest:.2f} to {fastest:.2f} times as fast")
        else:
            report.line("crossover", f"{title}: density {found:.2f}")
    if options.plot is not None:
        plot.write(figure(report.data["rows"], report.environment), options.plot)


PARSER = common.make_parser("benchmarks.events", __doc__, "all measurements", "the speed-up over the density")
PARSER.set_defaults(device="cpu")
help = "the parts of the inputs that spike"
PARSER.add("--densities", help, type=float, default=[0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], metavar="PART")
PARSER.add("--frames", "frames T x B", type=at_least(1), default=24, metavar="N")
PARSER.add("--rounds", "turns that everyone gets", type=at_least(1), default=5)
PARSER.add("--repeats", "timed calls in a turn, after an untimed one", type=at_least(1), default=2)
main = common.program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
