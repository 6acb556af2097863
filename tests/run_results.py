"""What training runs came to, and whether two came to the same."""

from pathlib import Path
from typing import Any

import torch

from gac.checkpoint import read_checkpoint
from gac.training.run_folder import read_metrics

TIMES = {"images_per_second", "seconds"}


def result_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Return the last checkpoint of a run and its metrics, both without times and the checkpoint without its config."""
    payload = read_checkpoint(folder / "last.pt")
    payload.pop("config")
    payload["metrics"] = without_times(payload["metrics"])
    payload["training"]["position"].pop("seconds")
    payload["training"]["history"] = [without_times(line) for line in payload["training"]["history"]]
    return payload, [without_times(line) for line in read_metrics(folder / "metrics.jsonl")]


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in TIMES}


def assert_same(actual: Any, expected: Any) -> None:
    """Compare nested containers of tensors and plain values, bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        for each, other in zip(actual, expected, strict=True):
            assert_same(each, other)
    else:
        assert actual == expected
