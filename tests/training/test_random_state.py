"""The random state passes through a checkpoint and brings the same numbers back."""

import random
from pathlib import Path

import numpy as np
import torch

from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.training import random_state


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).sum().item()]


def test_restoring_repeats_the_numbers(tmp_path: Path) -> None:
    random_state.seed_everything(3)
    draw()
    write_checkpoint(tmp_path / "state.pt", {"random": random_state.capture()})
    expected = draw()
    assert draw() != expected
    random_state.restore(read_checkpoint(tmp_path / "state.pt")["random"])
    assert draw() == expected


def test_the_seed_decides_the_numbers() -> None:
    random_state.seed_everything(3)
    first = draw()
    random_state.seed_everything(4)
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    random_state.seed_everything(3)
    assert draw() == first
