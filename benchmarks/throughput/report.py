"""Measurements as rows of a table and as JSON."""

from typing import Any

from benchmarks.output import Table
from benchmarks.throughput.largest_batch import LargestBatch
from benchmarks.throughput.measure import Cell
from benchmarks.timing import Timing

TABLE = Table(
    [
        ("implementation", 17),
        ("T", 2),
        ("batch", 5),
        ("precision", 9),
        ("layout", 6),
        ("train ms", 13),
        ("[quartiles]", 16),
        ("x floor", 7),
        ("images/s", 9),
        ("time steps/s", 12),
        ("ms/time step", 12),
        ("peak GiB", 8),
        ("eval images/s", 13),
        ("[quartiles]", 16),
    ]
)
LARGEST_BATCH_TABLE = Table(
    [("implementation", 14), ("T", 2), ("precision", 9), ("layout", 6), ("largest batch", 13), ("peak GiB", 8)]
)


def images_per_second(timing: Timing, batch: int) -> float:
    """Return the throughput at the median duration of a step."""
    return 1000 * batch / timing.median_ms


def table_row(cell: Cell, floor: Cell | None) -> list[str]:
    """Return the cells of a row of TABLE; ``floor`` is the convolutions alone at the same setting."""
    row = [cell.implementation, str(cell.T), str(cell.batch), cell.precision, cell.layout]
    if cell.train is None:
        row += ["out of memory", "-", "-", "-", "-", "-", "-"]
    else:
        ms, images = cell.train.median_ms, images_per_second(cell.train, cell.batch)
        low, high = cell.train.quartiles_ms
        peak = "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**30:.2f}"
        times_floor = "-" if floor is None or floor.train is None else f"{ms / floor.train.median_ms:.2f}"
        row += [f"{ms:.2f}", f"[{low:.2f}, {high:.2f}]", times_floor, _rate(images), _rate(images * cell.T)]
        row += [f"{ms / cell.T:.2f}", peak]
    if cell.evaluation is None:
        return [*row, "out of memory", "-"]
    low, high = (1000 * cell.batch / ms for ms in reversed(cell.evaluation.quartiles_ms))
    return [*row, _rate(images_per_second(cell.evaluation, cell.batch)), f"[{_rate(low)}, {_rate(high)}]"]


def largest_batch_row(found: LargestBatch) -> list[str]:
    """Return the cells of a row of LARGEST_BATCH_TABLE."""
    peak = "-" if found.peak_bytes is None else f"{found.peak_bytes / 2**30:.2f}"
    return [found.implementation, str(found.T), found.precision, found.layout, str(found.batch), peak]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def json_cell(cell: Cell) -> dict[str, Any]:
    """Return everything measured: ms, images/s, time steps/s (images/s x T), bytes."""
    return {
        "implementation": cell.implementation,
        "T": cell.T,
        "batch": cell.batch,
        "precision": cell.precision,
        "layout": cell.layout,
        "train": _json_timing(cell.train, cell),
        "evaluation": _json_timing(cell.evaluation, cell),
        "peak_bytes": cell.peak_bytes,
    }


def _json_timing(timing: Timing | None, cell: Cell) -> dict[str, Any] | str:
    if timing is None:
        return "out of memory"
    images = images_per_second(timing, cell.batch)
    return {
        "median_ms": timing.median_ms,
        "quartiles_ms": timing.quartiles_ms,
        "images_per_second": images,
        "time_steps_per_second": images * cell.T,
        "ms_per_time_step": timing.median_ms / cell.T,
        "samples_ms": timing.samples_ms,
    }
