"""What all figures share."""

from collections.abc import Mapping

RC = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
}


def subtitle(environment: Mapping[str, str]) -> str:
    """Return where a measurement was made, in a few words."""
    where = environment["CPU"] if environment["device"] == "CPU" else environment["device"].split(",")[0]
    return f"{where}; torch {environment['torch'].split(',')[0]}"
