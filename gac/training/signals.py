"""Ctrl-C and SIGTERM end a run between two batches, so that it can be resumed."""

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

logger = logging.getLogger("gac")

Batch = TypeVar("Batch")


class Interrupted(Exception):
    """A signal asked the run to stop; ``exit_status`` is 130 for SIGINT and 143 for SIGTERM."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_status = 128 + signal_number


_EXHAUSTED = object()


def _unchanged(*values: float) -> list[float]:
    return list(values)


class Interruption:
    """Within its context, SIGINT and SIGTERM are only noted; after either of them SIGINT kills the process.

    A second SIGINT is Ctrl-C from somebody who does not want to wait. A second SIGTERM changes nothing: it arrives when
    a scheduler signals all processes of a job and a script among them passes the signal on.

    Python handles signals in the main thread only. In any other one (a notebook's, Ray's) a warning says so, and
    signals do what they did before.

    Args:
        largest: Returns the largest of each of its arguments over the processes of the run, all of which call it.
        second_kills: Whether a second SIGINT kills; torchrun may send several, and kills by itself.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, largest: Callable[..., list[float]] = _unchanged, second_kills: bool = True) -> None:
        self.received: int | None = None
        self._largest = largest
        self._second_kills = second_kills
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "training runs in a thread, so Ctrl-C and SIGTERM do not save it: after them --resume auto continues"
                " from the last checkpoint that train.checkpoint_minutes or train.checkpoint_steps wrote"
            )
            return self
        self._previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._second_kills:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and raise Interrupted in all processes once any of them has received a signal.

        All processes call this at the same time and raise before the same batch, even if some have fewer batches.
        """
        remaining = iter(batches)
        batch = None
        while True:
            # Before a batch, not after it: whoever asks for a batch has finished the previous one.
            received, more = self._largest(self.received or 0, batch is not _EXHAUSTED)
            if received:
                raise Interrupted(int(received))
            if not more:
                return
            if batch is not _EXHAUSTED:
                batch = next(remaining, _EXHAUSTED)
            if batch is not _EXHAUSTED:
                yield batch
