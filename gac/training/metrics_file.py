"""metrics.jsonl: one JSON object a line, one line an epoch."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gac.files import atomic_write


def append_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Append a line and see that it is on the disk."""
    with path.open("a") as file:
        file.write(_line(metrics))
        file.flush()
        os.fsync(file.fileno())


def write_metrics(path: Path, epochs: Sequence[Mapping[str, float]]) -> None:
    """Write these lines and no others, as a run that begins or resumes has them."""
    with atomic_write(path) as file:
        file.write("".join(map(_line, epochs)).encode())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics file; one without its newline, which a crash can leave, does not count."""
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def _line(metrics: Mapping[str, float]) -> str:
    return json.dumps(dict(metrics)) + "\n"
