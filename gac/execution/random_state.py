"""The state of the global random generators that a run draws from."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from gac.data.seeding import Stream, derive_seed
from gac.execution.distributed import Ranks


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def capture(device: torch.device) -> dict[str, Any]:
    """Return the state of those generators as plain containers and tensors, for a checkpoint.

    Of the CUDA generators only that of ``device`` is included, if it is a CUDA device: asking the others would open a
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
    """Restore what :func:`capture` returned, possibly for another device.

    The CUDA generator is restored only if both devices are CUDA devices.
    """
    random.setstate(state["python"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0], device)


@contextmanager
def apart(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators of the CPU and of ``device`` for the block, and restore their state after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def own_of_rank(ranks: Ranks, device: torch.device, seed: int, *place: int) -> AbstractContextManager:
    """Return a context in which each rank draws other random numbers, from the seed of this ``place`` in the run.

    A single process draws from the global generators. Those of several ranks must stay equal, as all ranks draw alike
    how their images are mixed.
    """
    if ranks.size == 1:
        return nullcontext()
    return apart(derive_seed(seed, Stream.RANK_NOISE, *place), device)
