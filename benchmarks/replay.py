"""One call that does the work of many, to time operations that are shorter than their launch."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch


def capturable_stream(device: torch.device) -> AbstractContextManager:
    """Return a context in which :func:`replay` works: CUDA records graphs on other streams than the default one.

    What a graph differentiates must have been computed in the same context.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def replay(calls: Sequence[Callable[[], object]], device: torch.device, keep: int = 0) -> Callable[[], object]:
    """Return a call that makes all ``calls`` in a row: on a GPU the replay of one CUDA graph of them.

    In a replay the GPU never waits for the host. What a call returns is dropped, its memory used again, once ``keep``
    more calls have returned.
    """

    def in_a_row() -> None:
        kept: deque[object] = deque(maxlen=keep)
        for call in calls:
            kept.append(call())

    if device.type != "cuda":
        return in_a_row
    # Compiles and tunes what runs for the first time, which is impossible while a graph is recorded.
    in_a_row()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        in_a_row()
    return graph.replay
