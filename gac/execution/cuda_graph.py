"""Work for a device that is captured into a CUDA graph and replayed: one launch instead of a thousand."""

import gc
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gac.config import ModelConfig
from gac.errors import InputError

WARM_UP_CALLS = 3
"""Calls with inputs of the same sizes that run as they are, and in which kernels are compiled and chosen."""
REPLAYS_AHEAD = 8
"""Replays that the host may be ahead of the device; more gain nothing, and a signal would stop the run minutes late."""

Capture = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Makes a function without arguments into one that repeats its work on the device and returns its result."""


def select_capture(cuda_graph: bool, device: torch.device) -> Capture | None:
    """Return what captures the work of a run on ``device``: None where ``train.cuda_graph`` is off, and on the CPU."""
    return CaptureOnDevice(device) if cuda_graph and device.type == "cuda" else None


def check_capturable(model: ModelConfig) -> None:
    """Raise InputError if the network reads values on the host, which a CUDA graph cannot capture."""
    if not model.takes_normalized_images:
        raise InputError(
            f"train.cuda_graph cannot replay {model.coding} coding, which checks the pixels of every batch on the host:"
            " leave it off"
        )


class Replayed:
    """A function of tensors whose calls, but for the first few, are replays of a captured CUDA graph.

    There is a graph for each combination of the inputs' shapes, strides and dtypes. The function must not read a
    tensor's value on the host. What it keeps from call to call must be in tensors that exist after its first call and
    that it changes in place: what a captured call makes lies in memory that the next replay writes anew, be it a replay
    of another function with the same ``capture``. A result is to be used before that.

    Args:
        function: What to call with the inputs.
        capture: Captures it; functions that are never replayed at the same time may share one, and its memory.
    """

    def __init__(self, function: Callable[..., Any], capture: Capture) -> None:
        self.function = function
        self._capture = capture
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
    """Captures functions into CUDA graphs that share one memory pool, to be replayed on one stream.

    A captured function may use the memory of another one, whichever of them is captured first and in whatever order
    they are replayed, because every replay writes what it reads from the pool. Nothing that lives longer may lie in it:
    a training step's weights, statistics, momentum, moving average, loss scale, learning rate and totals exist before
    its capture. Its gradients do lie in the pool, as ``zero_grad`` drops those of the step before, but have no reader
    after it.
    """

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
