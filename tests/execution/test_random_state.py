"""The random state passes through a checkpoint and brings the same numbers back."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.execution import random_state

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).sum().item()]


def test_restoring_repeats_the_numbers(tmp_path: Path) -> None:
    random_state.seed_everything(3)
    draw()
    write_checkpoint(tmp_path / "state.pt", {"random": random_state.capture(CPU)})
    expected = draw()
    assert draw() != expected
    random_state.restore(read_checkpoint(tmp_path / "state.pt")["random"], CPU)
    assert draw() == expected


def test_the_seed_decides_the_numbers() -> None:
    random_state.seed_everything(3)
    first = draw()
    random_state.seed_everything(4)
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    random_state.seed_everything(3)
    assert draw() == first


def test_a_run_on_the_cpu_leaves_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(*arguments: object) -> None:
        pytest.fail("a CUDA generator was used")

    for name in ("get_rng_state", "get_rng_state_all", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, touch)
    state = random_state.capture(CPU)
    assert state["cuda"] == []
    # Also when the state is that of a run on CUDA.
    random_state.restore({**state, "cuda": [torch.zeros(16, dtype=torch.uint8)]}, CPU)


def test_only_the_generator_of_the_runs_cuda_device_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    device, generators = torch.device("cuda", 1), {}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda of: torch.tensor([of.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, of: generators.update({of: state}))
    state = random_state.capture(device)
    assert state["cuda"] == [torch.tensor([1])]
    random_state.restore(state, torch.device("cuda", 0))
    assert generators == {torch.device("cuda", 0): torch.tensor([1])}
    generators.clear()
    random_state.restore(random_state.capture(CPU), device)
    assert generators == {}
