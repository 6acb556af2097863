"""The figures of the throughput and of the kernel benchmark."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.candidates import IMPLEMENTATIONS
from benchmarks.common import OUT_OF_MEMORY, grouped
from gac.files import atomic_write, writing

RC = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False}
RC |= {"axes.axisbelow": True, "axes.edgecolor": "#444444", "grid.color": "#dddddd", "legend.frameon": False}
COLORS = {"forward": "#56B4E9", "backward": "#0072B2"}


def throughput_figure(cells: Sequence[dict[str, Any]], title: str, environment: Mapping[str, str]) -> Figure:
    """Return training throughput over T, a line for each implementation, a panel for each batch and precision.

    The vertical axis is images/s x T: computing T steps without any gain or loss is a horizontal line. Bars are
    quartiles; a cross on the axis marks what ran out of memory.
    """
    by_panel = grouped(cells, "batch", "precision")
    rows, columns = (len(set(values)) for values in zip(*by_panel, strict=True))
    with mpl.rc_context(RC):
        figure, grid = panels((rows, columns), (max(2.8, 5.6 / columns), 2.4), title, environment)
        for axes, ((batch, precision), of_panel) in zip(np.ravel(grid), by_panel.items(), strict=True):
            for (name,), of_line in grouped(of_panel, "implementation").items():
                _draw_line(axes, name, of_line)
            axes.set_xticks(sorted({cell["T"] for cell in cells}))
            axes.yaxis.set_major_formatter(lambda y, _: f"{y / 1000:g}k" if y >= 1000 else f"{y:g}")
            axes.grid(axis="y")
            axes.set_title(f"batch {batch}, {precision}")
        for axes, *_ in grid:
            # After all panels of the row, which share the axis: fixing one end stops its scaling.
            axes.set_ylim(bottom=0)
            axes.set_ylabel("training, images/s × T")
        for axes in grid[-1]:
            axes.set_xlabel("time steps T")
        handles, _ = grid[0][0].get_legend_handles_labels()
        if any(cell["train"] == OUT_OF_MEMORY for cell in cells):
            handles.append(Line2D([], [], color="#444444", marker="x", linestyle="none", label=OUT_OF_MEMORY))
        # In two rows: a single panel is narrower than one.
        figure.legend(handles=handles, loc="outside lower center", ncols=(len(handles) + 1) // 2)
    return figure


def _draw_line(axes: Axes, name: str, cells: Sequence[dict[str, Any]]) -> None:
    color, marker = IMPLEMENTATIONS[name].style
    cells = sorted(cells, key=lambda cell: cell["T"])
    measured = [cell for cell in cells if cell["train"] != OUT_OF_MEMORY]
    durations = [(*cell["train"]["quartiles_ms"], cell["train"]["median_ms"]) for cell in measured]
    T, batch = (np.array([cell[key] for cell in measured]) for key in ("T", "batch"))
    # The short duration is the high throughput.
    high, low, middle = 1000 * batch * T / np.array(durations).reshape(-1, 3).T
    style = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.4, "capsize": 2.5}
    axes.errorbar(T, middle, yerr=[middle - low, high - middle], label=name, **style)
    for cell in cells:
        if cell["train"] == OUT_OF_MEMORY:
            axes.plot(cell["T"], 0, color=color, marker="x", clip_on=False)


def bandwidth_figure(rows: Sequence[dict[str, Any]], title: str, environment: Mapping[str, str]) -> Figure:
    """Return a figure with a panel for each dtype; a bar is the bytes per second of one pass over those of a copy."""
    dtypes, groups = grouped(rows, "dtype"), list(grouped(rows, "operation", "shape"))
    with mpl.rc_context(RC):
        figure, (grid,) = panels((1, len(dtypes)), (6.5, 0.34 * len(groups) + 1.2), title, environment)
        for axes, ((dtype,), of_dtype) in zip(grid, dtypes.items(), strict=True):
            for offset, (direction, color) in zip((-0.19, 0.19), COLORS.items(), strict=True):
                bars = [row for row in of_dtype if row["pass"] == direction and row["share_of_copy"]]
                places = [groups.index((row["operation"], row["shape"])) + offset for row in bars]
                axes.barh(places, [100 * row["share_of_copy"] for row in bars], 0.36, color=color, label=direction)
            axes.axvline(100, color="#444444", linewidth=0.8)
            labels = [f"{name}  {' × '.join(map(str, shape[2:]))}" for name, shape in groups]
            axes.set_yticks(range(len(groups)), labels)
            axes.set_xlim(left=0)
            axes.set_xlabel("% of copy bandwidth")
            axes.grid(axis="x")
            axes.set_title(dtype)
        # Shared: the first operation on top.
        grid[0].invert_yaxis()
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def panels(
    shape: tuple[int, int], size: tuple[float, float], title: str, environment: Mapping[str, str], sharex: bool = True
) -> tuple[Figure, Sequence[Sequence[Axes]]]:
    """Return a figure of rows and columns of panels, of a width and height in inches; its title says where it ran."""
    where = environment["CPU"] if environment["device"] == "CPU" else environment["device"].split(",")[0]
    figure = Figure(figsize=(shape[1] * size[0], shape[0] * size[1] + 1.2), dpi=200, layout="constrained")
    figure.suptitle(f"{title}\n{where}; torch {environment['torch'].split(',')[0]}", fontsize=9.5)
    return figure, figure.subplots(*shape, squeeze=False, sharex=sharex, sharey="row")


def write(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file."""
    with writing(path), atomic_write(path) as file:
        figure.savefig(file, format="png")
