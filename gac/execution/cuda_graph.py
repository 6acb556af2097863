"""Work on a device captured into a CUDA graph and replayed: one launch instead of a thousand."""

import functools
import gc
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from gac.config import ModelConfig
from gac.errors import InputError, first_line
from gac.execution.resources import is_out_of_memory

logger = logging.getLogger("gac")

WARM_UP_CALLS = 3
"""Calls for each size of inputs that run uncaptured; kernels are compiled, loaded and chosen in them."""
REPLAYS_AHEAD = 8
"""Replays that the host may be ahead of the device. With more, a signal would stop the run minutes late."""


class CaptureFailed(RuntimeError):
    """What was to be captured cannot be replayed; the message is the cause in one line."""


class OutOfMemoryInCapture(CaptureFailed, torch.OutOfMemoryError):
    """Memory ran out in a capture, which needs it beside that of the calls before; those may go on without it."""


class Capture(Protocol):
    """Captures functions without arguments whose work is all on a device."""

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Return what ``function`` returns, called as it will be captured but for the capture."""
        ...

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Return what repeats the work of ``function`` and returns what that returned when it was captured."""
        ...


def check_capturable(model: ModelConfig) -> None:
    """Raise InputError if the network reads values on the host, which a CUDA graph cannot capture."""
    if not model.takes_normalized_images:
        raise InputError(
            f"train.cuda_graph cannot replay {model.coding} coding, which checks the pixels of every batch on the host:"
            " set it to auto or false"
        )


class Replayed:
    """A function of tensors whose calls, except the first few, are replays of a captured CUDA graph.

    There is one graph for each combination of the inputs' shapes, strides and dtypes. The function must not read a
    tensor's value on the host. What it keeps between calls must be in tensors that exist after its first call and that
    it changes in place: tensors made in a captured call are overwritten by the next replay, even one of another
    function with the same ``capture``. Use a result before that.

    The first calls run what will be captured: on copies of the inputs, whose alignment decides which of cuDNN's plans
    runs, and where the capture will be. So the capture meets no plan and no kernel for the first time.

    Args:
        function: What to call with the inputs.
        capture: Captures it; functions that are never replayed at the same time may share one, and so its memory.

    Raises:
        CaptureFailed: When called, if the capture failed; nothing was done then.
    """

    def __init__(self, function: Callable[..., Any], capture: Capture) -> None:
        self.function = function
        self._capture = capture
        self._calls: dict[tuple, _Calls] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        key = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        if key not in self._calls:
            self._calls[key] = _Calls([tensor.clone() for tensor in inputs])
        calls = self._calls[key]
        for mine, given in zip(calls.fixed, inputs, strict=True):
            mine.copy_(given)
        if calls.replay is None:
            function = functools.partial(self.function, *calls.fixed)
            if calls.done < WARM_UP_CALLS:
                calls.done += 1
                return self._capture.warm_up(function)
            calls.replay = self._captured(function)
        return calls.replay()

    def _captured(self, function: Callable[[], Any]) -> Callable[[], Any]:
        try:
            return self._capture(function)
        except Exception as error:
            cause = first_line(error)
            if is_out_of_memory(error):
                raise OutOfMemoryInCapture(f"{cause.split('. ')[0]} while a CUDA graph was captured") from error
            raise CaptureFailed(f"{type(error).__name__} in a capture: {cause}") from error

    def forget(self) -> None:
        """Drop all graphs; no replay of them may be under way."""
        self._calls.clear()


class _Calls:
    """The calls with inputs of one kind: ``fixed``, which is what runs on, how many are ``done``, and the graph."""

    def __init__(self, fixed: list[Tensor]) -> None:
        self.fixed = fixed
        self.done = 0
        self.replay: Callable[[], Any] | None = None


class Graphs:
    """What a run replays, as long as nothing speaks against it.

    When a capture fails, one warning names the cause, the memory of all graphs is given back, and all functions are
    called from then on. Where graphs are demanded, a capture that runs out of memory raises torch.OutOfMemoryError.

    Args:
        make: Returns a new capture, which shares no memory with others.
        demanded: Whether somebody asked for graphs, rather than for what is possible.

    Attributes:
        in_use: Whether calls are replayed, after those that warm up.
    """

    def __init__(self, make: Callable[[], Capture], demanded: bool = False) -> None:
        self.make = make
        self.demanded = demanded
        self.in_use = True
        # A single one, so that all functions replay in the same memory.
        self._capture = make()
        self._warned = False
        self._replayed: WeakSet[Replayed] = WeakSet()

    def warn_of_hooks(self) -> None:
        """Warn, once, that steps are not replayed while they have hooks."""
        if self.in_use and not self._warned:
            logger.warning("CUDA graphs are not used while a training step has hooks, which no replay would call")
            self._warned = True

    def give_up(self, cause: str) -> None:
        """Replay nothing any more, and warn of the ``cause``; no replay may be under way."""
        self.in_use = False
        for each in self._replayed:
            each.forget()
        logger.warning("CUDA graphs are not used, every step is launched by the host: %s", cause)

    def replaying(self, function: Callable[..., Any], undo: Callable[[], object] = lambda: None) -> Callable[..., Any]:
        """Return what replays ``function``, as :class:`Replayed` does, or calls it where that is impossible.

        ``undo`` is called after a capture that failed: it puts right what the function, though it did nothing on the
        device, changed on the host.
        """
        replayed = Replayed(function, self._capture)
        self._replayed.add(replayed)

        def call(*inputs: Tensor) -> Any:
            if self.in_use:
                try:
                    return replayed(*inputs)
                except CaptureFailed as error:
                    cause = str(error)
                    if self.demanded and isinstance(error, OutOfMemoryInCapture):
                        reason = f"{cause}, which train.cuda_graph auto or false does without"
                        raise torch.OutOfMemoryError(reason) from error
                # Outside of the handler, whose error keeps the captured function's tensors.
                undo()
                self.give_up(cause)
            return function(*inputs)

        return call


def select_graphs(wanted: bool, device: torch.device, demanded: bool = True) -> Graphs | None:
    """Return what replays the work of a run on ``device`` if that is ``wanted``; None on other devices than CUDA's."""
    return Graphs(functools.partial(CaptureOnDevice, device), demanded) if wanted and device.type == "cuda" else None


class CaptureOnDevice:
    """Captures functions into CUDA graphs that share one memory pool, to be replayed on one stream.

    Captured functions may use each other's memory, in whatever order they are captured and replayed, because every
    replay writes what it reads from the pool. Nothing that lives longer may be in the pool: a training step's weights,
    statistics, momentum, moving average, loss scale, learning rate and totals exist before its capture. Its gradients
    are in the pool, as ``zero_grad`` drops those of the previous step, but nothing reads them after the step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: tuple[int, int] | None = None
        self._queued: deque[torch.cuda.Event] = deque()

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Return what ``function`` returns, called on the stream that captures.

        Autograd's nodes that add up gradients keep the stream that they were made on, cuBLAS its workspace for each
        stream: made on another one, the first would invalidate a capture and the second would lie in the graph's
        memory.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        # Neither stream's memory is used again before the other has waited, so no tensor has to be recorded.
        current.wait_stream(self._stream)
        return result

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that replays ``function`` and returns what it returned when it was captured.

        Raises what ``function`` does, and torch's errors where CUDA refuses; replays that are queued have ended then.
        """
        graph, result = torch.cuda.CUDAGraph(), None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        first = None
        try:
            with (
                torch.cuda.device(self._device),
                # torch does not leave its own where the capture cannot be ended.
                torch.cuda.stream(self._stream),
                _no_garbage_collection(),
                # thread_local: a DataLoader's thread may pin memory meanwhile.
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = function()
                except Exception as error:
                    first = error
                    raise
        except Exception:
            # Else the allocator of earlier versions of torch believes that a capture which cannot be ended goes on.
            # Later ones need not have the function, whose absence must not hide what failed.
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
            torch.cuda.synchronize(self._device)
            # The state of the random numbers believes it too, and refuses to give any; a copy of it does not.
            generator = torch.cuda.default_generators[self._stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            if first is None:
                raise
            # Ending a capture that is invalid raises an error of its own, which says less.
            raise first from None
        finally:
            # It refers to this frame, which refers to the graph's tensors.
            first = None

        def replay() -> Any:
            if len(self._queued) == REPLAYS_AHEAD:
                self._queued.popleft().synchronize()
            graph.replay()
            self._queued.append(torch.cuda.current_stream(self._device).record_event())
            return result

        return replay


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage, and then none in the block: a graph that it destroys would make a capture invalid."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
