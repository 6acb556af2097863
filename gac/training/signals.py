"""Ctrl-C and SIGTERM end a run between two batches, so that it can be resumed."""

import signal
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

Batch = TypeVar("Batch")


class Interrupted(Exception):
    """A signal asked the run to stop; ``exit_status`` is 130 for SIGINT and 143 for SIGTERM."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_status = 128 + signal_number


class Interruption:
    """While its context is open, the first SIGINT or SIGTERM is remembered and a second one kills the process.

    For the main thread, the only one in which Python handles signals.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        self._previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; once a signal has come, raise Interrupted instead of going on."""
        for batch in batches:
            # Before the batch, not after it: whoever asks for a batch has finished with the one before.
            if self.received is not None:
                raise Interrupted(self.received)
            yield batch
        if self.received is not None:
            raise Interrupted(self.received)
