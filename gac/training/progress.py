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

    ``poll`` returns the mean loss and the top-1 accuracy in percent so far, or None where it would have to wait for
    them. It is called once a second, at no other step. With ``shown`` False that is all that happens.
    """

    POLL_SECONDS = 1.0
    LINE_SECONDS = 30.0

    def __init__(
        self,
        title: str,
        batches: int,
        done: int,
        poll: Callable[[], tuple[float, float] | None],
        shown: bool = True,
    ) -> None:
        self.title = title
        self.batches = batches
        self.done = done
        self._poll = poll
        self._is_shown = shown
        self._on_terminal = shown and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._images = 0
        self._shown_images = 0
        self._shown = self._polled = time.perf_counter()

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
        if now - self._polled < self.POLL_SECONDS:
            return
        self._polled = now
        figures = self._poll()
        elapsed = now - self._shown
        if figures is None or not self._is_shown or (self._bar is None and elapsed < self.LINE_SECONDS):
            return
        rate = (self._images - self._shown_images) / elapsed
        self._shown_images, self._shown = self._images, now
        if self._bar is not None:
            loss, top1 = figures
            self._bar.set_postfix_str(f"loss {loss:.4f}, top-1 {top1:.2f} %, {rate:.0f} images/s", refresh=False)
        else:
            logger.info(
                "%s: batch %d of %d, loss %.4f, top-1 %.2f %%, %.0f images/s",
                self.title,
                self.done,
                self.batches,
                *figures,
                rate,
            )
