"""The figure of the comparison of codings."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.plot import COLORS, RC, panels


def coding_figure(
    rows: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]], title: str, environment: Mapping[str, str]
) -> Figure:
    """Return a figure of each coding's runs with mean and standard deviation, and of gac's paired gain over it.

    Bars of the gain are 95 % intervals.
    """
    names = [each["coding"] for each in summary]
    with mpl.rc_context(RC):
        figure, ((left, right),) = panels((1, 2), (4.2, 0.34 * len(names) + 0.5), title, environment, sharex=False)
        for place, each in enumerate(summary):
            runs = [row["top1"] for row in rows if row["coding"] == each["coding"]]
            # One above the other, as runs with equal results would hide each other.
            heights = [place - 0.35 * i / len(runs) for i in range(len(runs))]
            left.scatter(runs, heights, color=COLORS["forward"], s=12, label="one run" if place == 0 else None)
            top1, gain = each["top1"], each["gain"]
            style = {"color": COLORS["backward"], "capsize": 2.5, "linewidth": 1.4, "marker": "D", "markersize": 4}
            label = "mean ± standard deviation" if place == 0 else None
            left.errorbar(top1["mean"], place + 0.25, xerr=top1["std"], label=label, **style)
            if gain["interval"] is not None:
                right.errorbar(gain["mean"], place, xerr=gain["interval"][1] - gain["mean"], **style)
        right.axvline(0, color="#444444", linewidth=0.8)
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.set_xlabel("test top-1 after the last epoch, %")
        right.set_xlabel("gac minus this coding, points (95 % interval)")
        for axes in (left, right):
            axes.grid(axis="x")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
