"""Rows as a table on stdout and as JSON."""

from collections.abc import Sequence
from typing import Any

from benchmarks.kernels.measure import Row
from benchmarks.output import Table
from benchmarks.timing import Timing

TABLE = Table(
    [
        ("operation", 16),
        ("T, B, C, H, W", 21),
        ("layers", 6),
        ("dtype", 8),
        ("pass", 8),
        ("MB", 8),
        ("ours us", 13),
        ("[quartiles]", 20),
        ("GB/s", 7),
        ("of copy", 7),
        ("peer us", 13),
        ("peer / ours", 11),
    ]
)


def table_row(row: Row, copy_bandwidth: float) -> list[str]:
    """Return the cells of a row of TABLE."""
    shape = ", ".join(str(size) for size in row.site.shape)
    cells = [row.operation, shape, str(row.site.layers), row.dtype, row.direction, f"{row.bytes / 1e6:.3g}"]
    if row.ours is None:
        cells += ["out of memory", "-", "-", "-"]
    else:
        low, high = (f"{1000 * ms:.1f}" for ms in row.ours.quartiles_ms)
        cells += [f"{1000 * row.ours.median_ms:.1f}", f"[{low}, {high}]"]
        cells += [f"{row.bandwidth / 1e9:.3g}", f"{100 * row.bandwidth / copy_bandwidth:.3g} %"]
    cells.append("out of memory" if row.peer is None else f"{1000 * row.peer.median_ms:.1f}")
    if row.ours is None or row.peer is None:
        return [*cells, "-"]
    return [*cells, f"{row.peer.median_ms / row.ours.median_ms:.2f}"]


def json_row(row: Row, copy_bandwidth: float) -> dict[str, Any]:
    """Return everything measured: bytes, milliseconds, bytes per second."""
    return {
        "operation": row.operation,
        "shape": row.site.shape,
        "layers": row.site.layers,
        "dtype": row.dtype,
        "pass": row.direction,
        "bytes": row.bytes,
        "ours": _json_timing(row.ours),
        "peer": _json_timing(row.peer),
        "bytes_per_second": row.bandwidth,
        "share_of_copy": None if row.bandwidth is None else row.bandwidth / copy_bandwidth,
    }


def _json_timing(timing: Timing | None) -> dict[str, Any] | str:
    if timing is None:
        return "out of memory"
    return {"median_ms": timing.median_ms, "quartiles_ms": timing.quartiles_ms, "samples_ms": timing.samples_ms}


def bandwidth_of_all_layers(rows: Sequence[Row]) -> float | None:
    """Return bytes over time, both summed over all layers of the rows; None if one of them ran out of memory."""
    if any(row.ours is None for row in rows):
        return None
    moved = sum(row.bytes * row.site.layers for row in rows)
    return 1000 * moved / sum(row.ours.median_ms * row.site.layers for row in rows)
