"""The figure: each operation's share of the copy bandwidth at each size."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figure import RC, subtitle
from benchmarks.kernels.measure import Row
from benchmarks.network_size import NetworkSize
from gac.files import atomic_write

COLORS = {"forward": "#56B4E9", "backward": "#0072B2"}


def draw(
    rows: Sequence[Row], copy_bandwidth: float, size: NetworkSize, environment: Mapping[str, str], path: Path
) -> None:
    """Write the figure as a PNG file."""
    figure = make_figure(rows, copy_bandwidth, size, environment)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def make_figure(
    rows: Sequence[Row], copy_bandwidth: float, size: NetworkSize, environment: Mapping[str, str]
) -> Figure:
    """Return a figure with a panel for each dtype; a bar is the bytes per second of one pass over those of a copy."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    most = max(len(_groups(rows, dtype)) for dtype in dtypes)
    # In inches.
    left, right, top, bottom, gap, panel_width = 2.6, 0.3, 0.75, 0.75, 0.25, 3.6
    panel_height = 0.34 * most + 0.2
    width = left + len(dtypes) * panel_width + (len(dtypes) - 1) * gap + right
    height = bottom + panel_height + top
    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), dpi=200)
        grid = figure.subplots(
            1,
            len(dtypes),
            squeeze=False,
            sharey=True,
            sharex=True,
            gridspec_kw={
                "left": left / width,
                "right": 1 - right / width,
                "bottom": bottom / height,
                "top": 1 - top / height,
                "wspace": gap / panel_width,
            },
        )[0]
        for axes, dtype in zip(grid, dtypes, strict=True):
            _draw_panel(axes, [row for row in rows if row.dtype == dtype], copy_bandwidth)
            axes.set_title(dtype)
        # Shared: the first operation on top.
        grid[0].invert_yaxis()
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(handles), frameon=False)
        T, batch = rows[0].site.shape[:2]
        figure.text(0.1 / width, 1 - 0.12 / height, f"{size.network}, T = {T}, batch {batch}", fontsize=10.5, va="top")
        figure.text(0.1 / width, 1 - 0.36 / height, subtitle(environment), color="#444444", va="top")
    return figure


def _groups(rows: Sequence[Row], dtype: str) -> list[tuple[str, tuple[int, ...]]]:
    return list(dict.fromkeys((row.operation, row.site.shape) for row in rows if row.dtype == dtype))


def _draw_panel(axes: Axes, rows: Sequence[Row], copy_bandwidth: float) -> None:
    groups = _groups(rows, rows[0].dtype)
    for offset, (direction, color) in zip((-0.19, 0.19), COLORS.items(), strict=True):
        bars = [row for row in rows if row.direction == direction and row.bandwidth is not None]
        axes.barh(
            [groups.index((row.operation, row.site.shape)) + offset for row in bars],
            [100 * row.bandwidth / copy_bandwidth for row in bars],
            height=0.36,
            color=color,
            label=direction,
        )
    axes.axvline(100, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(groups)), [f"{name}  {' × '.join(map(str, shape[2:]))}" for name, shape in groups])
    axes.set_xlim(left=0)
    axes.set_xlabel("% of copy bandwidth")
    axes.grid(axis="x")
