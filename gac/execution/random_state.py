"""The state of every global random generator that a run draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def capture(device: torch.device) -> dict[str, Any]:
    """Return the state of those generators as plain containers and tensors, which a checkpoint may hold.

    Of the CUDA generators it is the one of ``device``, if that is a CUDA device: asking the others would open a
    context on every device.
    """
    algorithm, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Set those generators to what :func:`capture` returned, be it for another device.

    A CUDA generator is left alone unless both devices are CUDA devices.
    """
    random.setstate(state["python"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0], device)


@contextmanager
def apart(seed: int, device: torch.device) -> Iterator[None]:
    """Let the block draw from PyTorch's generators of the CPU and of ``device`` seeded anew, and leave no trace."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
