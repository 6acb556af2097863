"""Timing of calls that compete: in turns, so that a drift of clocks or temperature meets all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """Durations of single calls in milliseconds, in the order in which they were measured."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median."""
        return float(np.median(self.samples_ms))

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        lower, upper = np.percentile(self.samples_ms, (25, 75))
        return float(lower), float(upper)


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    after_turn: Callable[[str], object],
    device: torch.device,
    rounds: int,
    repeats: int,
) -> dict[str, Timing | None]:
    """Time calls in rounds A B C, A B C, ... and return the timing of each, or None if it ran out of memory.

    A turn is one untimed call and ``repeats`` timed ones that follow without a pause. It starts with an empty
    memory cache: blocks that the previous call left behind would else be returned to the driver during the timing.

    Args:
        calls: What to time, by name.
        after_turn: Frees what the call of this name left behind.
        device: Where the calls run; on a GPU they are timed by events on its stream.
        rounds: Number of turns that each call gets.
        repeats: Timed calls in each turn.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failed: set[str] = set()
    for _ in range(rounds):
        for name in calls:
            if name in failed:
                continue
            release_cached_memory(device)
            turn = or_out_of_memory(lambda call=calls[name]: _take_turn(call, device, repeats))
            after_turn(name)
            if turn is None:
                failed.add(name)
            else:
                samples[name] += turn
    return {name: None if name in failed else Timing(tuple(taken)) for name, taken in samples.items()}


def release_cached_memory(device: torch.device) -> None:
    """Give memory that torch holds without need back to a GPU's driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def or_out_of_memory(call: Callable[[], Result]) -> Result | None:
    """Return what a call returns, or None if memory ran out in it."""
    try:
        return call()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        # torch has no type of its own for a CPU that cannot allocate.
        if "DefaultCPUAllocator: can't allocate memory" not in str(error):
            raise
        return None


def _take_turn(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    call()
    if device.type == "cuda":
        return _time_on_gpu(call, device, repeats)
    durations = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        durations.append(1000 * (time.perf_counter() - started))
    return durations


def _time_on_gpu(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    # Calls are queued without waiting, as in training: where the host is too slow to keep the GPU busy, it shows.
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(events)]
