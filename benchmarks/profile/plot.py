"""The figure: a stacked bar of groups for each implementation."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.figure import RC, subtitle
from benchmarks.network_size import NetworkSize
from benchmarks.profile.groups import IDLE, our_kernels
from benchmarks.profile.measure import Breakdown
from gac.files import atomic_write

# Groups below this share of the longest bar are drawn as one.
SMALL = 0.01
REST = "all groups below 1 %"
IDLE_COLOR, REST_COLOR = "#eeeeee", "#666666"


def draw(
    breakdowns: Sequence[Breakdown],
    options: Namespace,
    size: NetworkSize,
    environment: Mapping[str, str],
    path: Path,
) -> None:
    """Write the figure as a PNG file."""
    title = f"{size.network}: {options.step} step, T = {options.time_steps}, batch {options.batch}, {options.precision}"
    figure = make_figure(breakdowns, title, environment)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def make_figure(breakdowns: Sequence[Breakdown], title: str, environment: Mapping[str, str]) -> Figure:
    """Return a figure of one bar for each implementation, in milliseconds of a profiled step; idle comes last."""
    longest = max(breakdown.profiled_ms for breakdown in breakdowns)
    bars = [_large_groups(breakdown, SMALL * longest) for breakdown in breakdowns]
    totals: dict[str, float] = {}
    for bar in bars:
        for name, ms in bar.items():
            totals[name] = totals.get(name, 0.0) + ms
    names = sorted(totals, key=lambda name: (name == IDLE, name == REST, -totals[name]))
    # In inches.
    left, right, top, bottom, bar_height = 1.3, 2.7, 0.75, 0.6, 0.5
    width = 8.5
    height = top + max(bar_height * len(bars), 0.19 * len(names)) + bottom
    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), dpi=200)
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
        ends = [0.0] * len(bars)
        for name, color in zip(names, _colors(names), strict=True):
            lengths = [bar.get(name, 0.0) for bar in bars]
            axes.barh(range(len(bars)), lengths, left=ends, height=0.6, color=color, label=name)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        axes.set_yticks(range(len(bars)), [breakdown.implementation for breakdown in breakdowns])
        axes.invert_yaxis()
        axes.set_xlabel("ms per step")
        axes.grid(axis="x")
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="upper left",
            bbox_to_anchor=(1 - right / width, 1 - top / height),
            frameon=False,
            borderaxespad=0,
            fontsize=8,
        )
        figure.text(0.1 / width, 1 - 0.12 / height, title, fontsize=10.5, va="top")
        figure.text(0.1 / width, 1 - 0.36 / height, subtitle(environment), color="#444444", va="top")
    return figure


def _large_groups(breakdown: Breakdown, least_ms: float) -> dict[str, float]:
    bar = {name: group.ms for name, group in breakdown.groups.items() if group.ms >= least_ms or name == IDLE}
    rest = sum(group.ms for name, group in breakdown.groups.items() if name not in bar)
    return bar | ({REST: rest} if rest > 0 else {})


def _colors(names: Sequence[str]) -> list[tuple[float, ...] | str]:
    """Return blues for this package's kernels, other hues for all else."""
    ours = [name for name in names if name in our_kernels()]
    others = [name for name in names if name not in ours and name not in (IDLE, REST)]
    blues, hues = mpl.colormaps["Blues"], mpl.colormaps["Set2"]
    colors: dict[str, tuple[float, ...] | str] = {IDLE: IDLE_COLOR, REST: REST_COLOR}
    colors |= {name: blues(0.9 - 0.6 * i / max(1, len(ours) - 1)) for i, name in enumerate(ours)}
    colors |= {name: hues(i % hues.N) for i, name in enumerate(others)}
    return [colors[name] for name in names]
