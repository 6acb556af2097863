"""The second stream of gac.ops.overlap on the CPU: stricter than a stream, as all of its work is done at the join."""

from collections.abc import Callable


class Deferred:
    """An executor that does nothing before the join: what is needed earlier, or overwritten until then, is seen.

    Attributes:
        joins: How much work each join did.
    """

    def __init__(self) -> None:
        self.joins: list[int] = []
        self._waiting: list[Callable[[], None]] = []

    def submit(self, work: Callable[[], None]) -> None:
        self._waiting.append(work)

    def join(self) -> None:
        for work in self._waiting:
            work()
        self.joins.append(len(self._waiting))
        self._waiting.clear()
