"""Work for a device that is captured into a CUDA graph and replayed: one launch instead of a thousand."""

import gc
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 3
"""Calls with inputs of the same sizes that run as they are, and in which kernels are compiled and chosen."""
REPLAYS_AHEAD = 8
"""Replays that the host may be ahead of the device; more gain nothing, and a signal would stop the run minutes late."""


class Replayed:
    """A function of tensors whose calls, but for the first few, are replays of a captured CUDA graph.

    The function must not read a tensor's value on the host, and what it keeps from call to call must be in tensors
    that it changes in place. There is a graph for each combination of the inputs' shapes, strides and dtypes; all of
    them share their memory. A result is overwritten by the next call.

    Args:
        function: What to call with the inputs.
        device: The CUDA device.
        capture: Makes a function without arguments into one that repeats its work and returns its result, as
            :class:`CaptureOnDevice` does; tests put another in its place.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        capture: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None,
    ) -> None:
        self.function = function
        self._capture = CaptureOnDevice(device) if capture is None else capture
        self._calls: Counter[tuple] = Counter()
        self._graphs: dict[tuple, tuple[list[Tensor], Callable[[], Any]]] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        key = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        if key not in self._graphs:
            self._calls[key] += 1
            if self._calls[key] <= WARM_UP_CALLS:
                return self.function(*inputs)
            fixed = [tensor.clone() for tensor in inputs]
            self._graphs[key] = fixed, self._capture(lambda: self.function(*fixed))
        fixed, replay = self._graphs[key]
        for mine, given in zip(fixed, inputs, strict=True):
            mine.copy_(given)
        return replay()


class CaptureOnDevice:
    """Captures functions into CUDA graphs that share one memory pool, as they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: tuple[int, int] | None = None
        self._queued: deque[torch.cuda.Event] = deque()

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that replays ``function`` and returns what it returned when it was captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            # What the first calls cached would be held beside the graph's own memory for the rest of the run, and what
            # only the garbage collector frees would be freed during a later capture.
            gc.collect()
            torch.cuda.empty_cache()
            # thread_local: a DataLoader's thread may pin memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()
        self._pool = graph.pool()

        def replay() -> Any:
            if len(self._queued) == REPLAYS_AHEAD:
                self._queued.popleft().synchronize()
            graph.replay()
            self._queued.append(torch.cuda.current_stream(self._device).record_event())
            return result

        return replay
