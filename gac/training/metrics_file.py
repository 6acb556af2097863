"""metrics.jsonl: one JSON object a line, one line an epoch."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from gac.errors import InputError
from gac.files import atomic_write


def append_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Append a line and see that it is on the disk."""
    with path.open("a") as file:
        file.write(json.dumps(dict(metrics)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics file.

    A last line without its newline, which a crash can leave, does not count. Raises InputError for any other
    line that is no JSON object with an epoch.
    """
    *lines, _ = path.read_text().split("\n")
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(json.loads(line))
            metrics[-1]["epoch"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} line {number} is not a JSON object with an epoch; repair or remove the file"
            ) from error
    return metrics


def drop_metrics_after(path: Path, epoch: int) -> None:
    """Keep only the lines of the first ``epoch`` epochs, so that a resumed run has each epoch once."""
    if path.exists():
        kept = [metrics for metrics in read_metrics(path) if metrics["epoch"] <= epoch]
        with atomic_write(path) as file:
            file.write("".join(json.dumps(metrics) + "\n" for metrics in kept).encode())
