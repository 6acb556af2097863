"""The figure: training throughput over the number of time steps, a line for each implementation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.convolution_floor import FLOOR
from benchmarks.figure import RC, subtitle
from benchmarks.network_size import NetworkSize
from benchmarks.throughput.measure import Cell
from gac.files import atomic_write

# Okabe and Ito's colours, which colour-blind readers tell apart; markers for print in grey.
STYLES = {
    "ours-cupy": ("#0072B2", "o"),
    "ours-cupy-graph": ("#56B4E9", "v"),
    "ours-torch": ("#009E73", "s"),
    "spikingjelly": ("#D55E00", "^"),
    "step-loop": ("#666666", "D"),
    FLOOR: ("#000000", "_"),
}
PRECISION_TITLES = {"fp32": "float32", "fp16": "float16 autocast", "bf16": "bfloat16 autocast"}


def draw(cells: Sequence[Cell], size: NetworkSize, environment: Mapping[str, str], path: Path) -> None:
    """Write the figure as a PNG file."""
    figure = make_figure(cells, size, environment)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def make_figure(cells: Sequence[Cell], size: NetworkSize, environment: Mapping[str, str]) -> Figure:
    """Return a figure with a panel for each batch size (rows) and precision (columns).

    The vertical axis is images/s x T: computing T steps without any gain or loss is a horizontal line. Bars are
    quartiles; a cross on the axis marks what ran out of memory.
    """
    batches = list(dict.fromkeys(cell.batch for cell in cells))
    precisions = list(dict.fromkeys(cell.precision for cell in cells))
    names = [name for name in STYLES if any(cell.implementation == name for cell in cells)]
    rows, columns = len(batches), len(precisions)
    # In inches: panels keep their size, and the text its place, whatever their number; a single one is wider to
    # make room for title and legend.
    panel_width, panel_height, gap_x, gap_y = max(2.6, 5.0 / columns), 1.9, 0.2, 0.5
    left, right, top, bottom = 0.75, 0.2, 0.95, 1.1
    width = left + columns * panel_width + (columns - 1) * gap_x + right
    height = bottom + rows * panel_height + (rows - 1) * gap_y + top
    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), dpi=200)
        grid = figure.subplots(
            rows,
            columns,
            squeeze=False,
            sharex=True,
            sharey="row",
            gridspec_kw={
                "left": left / width,
                "right": 1 - right / width,
                "bottom": bottom / height,
                "top": 1 - top / height,
                "wspace": gap_x / panel_width,
                "hspace": gap_y / panel_height,
            },
        )
        for axes_row, batch in zip(grid, batches, strict=True):
            for axes, precision in zip(axes_row, precisions, strict=True):
                panel = [cell for cell in cells if (cell.batch, cell.precision) == (batch, precision)]
                _draw_panel(axes, panel, names)
                axes.set_title(f"batch {batch}, {PRECISION_TITLES[precision]}")
            # After all panels of the row, which share the axis: fixing one end stops its scaling.
            axes_row[0].set_ylim(bottom=0)
            axes_row[0].set_ylabel("training, images/s × T")
        for axes in grid[-1]:
            axes.set_xlabel("time steps T")
        handles = [
            Line2D([], [], color=STYLES[name][0], marker=STYLES[name][1], markersize=4.5, label=name) for name in names
        ]
        if any(cell.train is None for cell in cells):
            handles.append(Line2D([], [], color="#444444", marker="x", linestyle="none", label="out of memory"))
        figure.legend(
            handles=handles,
            loc="lower center",
            # In two rows: a single panel is narrower than one.
            ncols=(len(handles) + 1) // 2,
            frameon=False,
            handlelength=1.6,
            handletextpad=0.5,
            columnspacing=1.2,
        )
        network = f"{size.network}, width {size.width}, {size.image_size} × {size.image_size} pixels"
        figure.text(left / width, 1 - 0.12 / height, network, fontsize=10.5, va="top")
        figure.text(left / width, 1 - 0.36 / height, subtitle(environment), color="#444444", va="top")
    return figure


def _draw_panel(axes: Axes, cells: Sequence[Cell], names: Sequence[str]) -> None:
    for name in names:
        color, marker = STYLES[name]
        mine = sorted((cell for cell in cells if cell.implementation == name), key=lambda cell: cell.T)
        measured = [cell for cell in mine if cell.train is not None]
        middle = [_time_steps_per_second(cell, cell.train.median_ms) for cell in measured]
        # The short duration is the high throughput.
        above = [_time_steps_per_second(cell, cell.train.quartiles_ms[0]) for cell in measured]
        below = [_time_steps_per_second(cell, cell.train.quartiles_ms[1]) for cell in measured]
        axes.errorbar(
            [cell.T for cell in measured],
            middle,
            yerr=[
                [m - b for m, b in zip(middle, below, strict=True)],
                [a - m for a, m in zip(above, middle, strict=True)],
            ],
            color=color,
            marker=marker,
            markersize=4.5,
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2.5,
        )
        failed = [cell.T for cell in mine if cell.train is None]
        axes.plot(failed, [0] * len(failed), color=color, marker="x", linestyle="none", clip_on=False)
    axes.margins(x=0.06)
    axes.set_xticks(sorted({cell.T for cell in cells}))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    axes.grid(axis="y")


def _time_steps_per_second(cell: Cell, ms: float) -> float:
    return 1000 * cell.batch * cell.T / ms
