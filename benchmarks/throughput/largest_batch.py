"""The largest batch whose training step fits into a GPU's memory."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.contender import Contender
from benchmarks.implementations import Implementation
from benchmarks.network_size import NetworkSize
from benchmarks.timing import or_out_of_memory, release_cached_memory

# A batch counts as the largest if one that is 1/16 larger does not fit.
REFINEMENT = 16


@dataclass(frozen=True)
class LargestBatch:
    """The most images that an implementation trains on at once, and the bytes that tensors took at most in that step.

    ``batch`` is 0, and ``peak_bytes`` None, if not even one image fits.
    """

    implementation: str
    T: int
    precision: str
    layout: str
    batch: int
    peak_bytes: int | None


def find_largest_batch(
    implementation: Implementation,
    size: NetworkSize,
    T: int,
    precision: str,
    layout: str,
    weights: Mapping[str, Tensor],
    device: torch.device,
) -> LargestBatch:
    """Train two steps at growing batch sizes until memory runs out; ``device`` is a GPU."""
    peaks: dict[int, int] = {}

    def train(batch: int) -> int:
        contender = Contender(implementation, size, T, batch, precision, layout, weights, device)
        torch.cuda.reset_peak_memory_stats(device)
        # The optimiser's state exists, and has to fit, from the second step on.
        contender.train_step()
        contender.train_step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)

    def fits(batch: int) -> bool:
        peak = or_out_of_memory(lambda: train(batch))
        # Autograd graphs hold cycles, which keep their tensors until they are collected.
        gc.collect()
        release_cached_memory(device)
        if peak is not None:
            peaks[batch] = peak
        return peak is not None

    batch = largest(fits)
    return LargestBatch(implementation.name, T, precision, layout, batch, peaks.get(batch))


def largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, to 1/16 of it, or 0; all numbers below one that fits are taken to fit.

    The powers of two first, then the interval between the last that fits and the first that does not is halved.
    """
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // REFINEMENT):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
