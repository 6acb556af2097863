"""What a user sees while an epoch runs."""

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger("gac")


class EpochProgress:
    """Progress of one epoch: a bar with the time left on a terminal, a line every 30 s elsewhere.

    ``read`` returns the mean loss and the top-1 accuracy in percent so far. On a CUDA device it waits for all
    work queued, so it is called once a second at most, not at every step.
    """

    BAR_SECONDS = 1.0
    LINE_SECONDS = 30.0

    def __init__(self, title: str, batches: int, done: int, read: Callable[[], tuple[float, float]]) -> None:
        self.title = title
        self.batches = batches
        self.done = done
        self._read = read
        self._on_terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._images = 0
        self._last_images = 0
        self._last_time = time.perf_counter()

    def __enter__(self) -> "EpochProgress":
        if self._on_terminal:
            self._bar = tqdm(
                desc=self.title,
                total=self.batches,
                initial=self.done,
                unit="batch",
                leave=False,
                dynamic_ncols=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, images: int) -> None:
        """Count one more batch of ``images`` images."""
        self.done += 1
        self._images += images
        if self._bar is not None:
            self._bar.update()
        now = time.perf_counter()
        elapsed = now - self._last_time
        if elapsed < (self.BAR_SECONDS if self._bar is not None else self.LINE_SECONDS):
            return
        loss, top1 = self._read()
        rate = (self._images - self._last_images) / elapsed
        self._last_images, self._last_time = self._images, now
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, top-1 {top1:.2f} %, {rate:.0f} images/s", refresh=False)
        else:
            logger.info(
                "%s: batch %d of %d, loss %.4f, top-1 %.2f %%, %.0f images/s",
                self.title,
                self.done,
                self.batches,
                loss,
                top1,
                rate,
            )
