"""The figures of the throughput and of the kernel benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.candidates import STYLES
from benchmarks.common import PRECISIONS
from gac.files import atomic_write

if TYPE_CHECKING:
    from benchmarks.kernels import Row
    from benchmarks.throughput import Cell

RC = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
COLORS = {"forward": "#56B4E9", "backward": "#0072B2"}


def throughput_figure(cells: Sequence[Cell], title: str, environment: Mapping[str, str]) -> Figure:
    """Return training throughput over T, a line for each implementation, a panel for each batch and precision.

    The vertical axis is images/s x T: computing T steps without any gain or loss is a horizontal line. Bars are
    quartiles; a cross on the axis marks what ran out of memory.
    """
    batches = list(dict.fromkeys(cell.batch for cell in cells))
    precisions = list(dict.fromkeys(cell.precision for cell in cells))
    names = [name for name in STYLES if any(cell.implementation == name for cell in cells)]
    with mpl.rc_context(RC):
        figure, grid = _panels(len(batches), len(precisions), max(2.8, 5.6 / len(precisions)), 2.4, title, environment)
        for axes_row, batch in zip(grid, batches, strict=True):
            for axes, precision in zip(axes_row, precisions, strict=True):
                panel = [cell for cell in cells if (cell.batch, cell.precision) == (batch, precision)]
                _draw_throughput(axes, panel, names)
                axes.set_title(f"batch {batch}, {PRECISIONS[precision].title}")
            # After all panels of the row, which share the axis: fixing one end stops its scaling.
            axes_row[0].set_ylim(bottom=0)
            axes_row[0].set_ylabel("training, images/s × T")
        for axes in grid[-1]:
            axes.set_xlabel("time steps T")
        handles = [Line2D([], [], color=STYLES[name][0], marker=STYLES[name][1], label=name) for name in names]
        if any(cell.train is None for cell in cells):
            handles.append(Line2D([], [], color="#444444", marker="x", linestyle="none", label="out of memory"))
        # In two rows: a single panel is narrower than one.
        figure.legend(handles=handles, loc="outside lower center", ncols=(len(handles) + 1) // 2)
    return figure


def _draw_throughput(axes: Axes, cells: Sequence[Cell], names: Sequence[str]) -> None:
    def rate(cell: Cell, ms: float) -> float:
        return 1000 * cell.batch * cell.T / ms

    for name in names:
        color, marker = STYLES[name]
        mine = sorted((cell for cell in cells if cell.implementation == name), key=lambda cell: cell.T)
        measured = [cell for cell in mine if cell.train is not None]
        middle = [rate(cell, cell.train.median_ms) for cell in measured]
        # The short duration is the high throughput.
        high, low = ([rate(cell, cell.train.quartiles_ms[i]) for cell in measured] for i in (0, 1))
        bars = [[m - b for m, b in zip(middle, low, strict=True)], [a - m for a, m in zip(high, middle, strict=True)]]
        style = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.4, "capsize": 2.5}
        axes.errorbar([cell.T for cell in measured], middle, yerr=bars, **style)
        for cell in mine:
            if cell.train is None:
                axes.plot(cell.T, 0, color=color, marker="x", clip_on=False)
    axes.margins(x=0.06)
    axes.set_xticks(sorted({cell.T for cell in cells}))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    axes.grid(axis="y")


def bandwidth_figure(rows: Sequence[Row], copied: float, title: str, environment: Mapping[str, str]) -> Figure:
    """Return a figure with a panel for each dtype; a bar is the bytes per second of one pass over those of a copy."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    groups = list(dict.fromkeys((row.operation, row.shape) for row in rows))
    with mpl.rc_context(RC):
        figure, (grid,) = _panels(1, len(dtypes), 6.5, 0.34 * len(groups) + 1.2, title, environment)
        for axes, dtype in zip(grid, dtypes, strict=True):
            for offset, (direction, color) in zip((-0.19, 0.19), COLORS.items(), strict=True):
                bars = [row for row in rows if (row.dtype, row.direction) == (dtype, direction) and row.bandwidth]
                places = [groups.index((row.operation, row.shape)) + offset for row in bars]
                shares = [100 * row.bandwidth / copied for row in bars]
                axes.barh(places, shares, height=0.36, color=color, label=direction)
            axes.axvline(100, color="#444444", linewidth=0.8)
            axes.set_yticks(
                range(len(groups)), [f"{name}  {' × '.join(map(str, shape[2:]))}" for name, shape in groups]
            )
            axes.set_xlim(left=0)
            axes.set_xlabel("% of copy bandwidth")
            axes.grid(axis="x")
            axes.set_title(dtype)
        # Shared: the first operation on top.
        grid[0].invert_yaxis()
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _panels(
    rows: int, columns: int, width: float, height: float, title: str, environment: Mapping[str, str]
) -> tuple[Figure, Sequence[Sequence[Axes]]]:
    """Return a figure with panels of some size in inches; its title says where the measurement was made."""
    where = environment["CPU"] if environment["device"] == "CPU" else environment["device"].split(",")[0]
    figure = Figure(figsize=(columns * width, rows * height + 1.2), dpi=200, layout="constrained")
    figure.suptitle(f"{title}\n{where}; torch {environment['torch'].split(',')[0]}", fontsize=9.5)
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row")


def write(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
