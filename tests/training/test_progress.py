"""Progress on a real terminal and without one."""

import io
import logging
import os
import sys
import termios
import time
from contextlib import suppress

import pytest

from gac.training.progress import EpochProgress


def test_a_terminal_gets_a_bar_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    os.set_blocking(controller, False)  # a bar that is missing is an error, not an endless wait
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with EpochProgress("epoch 1/2", batches=4, done=2) as progress:
            progress.update(8)
            progress.show(1.25, 62.5)
            progress._bar.refresh()
        stderr.flush()
        shown, deadline = "", time.monotonic() + 5
        while "images/s" not in shown and time.monotonic() < deadline:
            # The system passes on what was written a little later.
            with suppress(BlockingIOError):
                shown += os.read(controller, 65536).decode(errors="replace")
    os.close(controller)
    assert "epoch 1/2:  75%" in shown
    assert "3/4" in shown
    assert "loss 1.2500, top-1 62.50 %" in shown
    assert "images/s" in shown


def test_elsewhere_there_are_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, "gac"), EpochProgress("epoch 2/2", batches=4, done=2) as progress:
        progress.update(8)
        progress.show(0.6, 70.0)
        assert caplog.messages == [], "30 seconds have not passed"
        monkeypatch.setattr(EpochProgress, "LINE_SECONDS", 0.0)
        progress.update(8)
        progress.show(0.5, 75.0)
    (line,) = caplog.messages
    assert line.startswith("epoch 2/2: batch 4 of 4, loss 0.5000, top-1 75.00 %, ")
    assert sys.stderr.getvalue() == ""


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(EpochProgress, "LINE_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "gac"), EpochProgress("epoch 1/2", 4, 0, visible=False) as progress:
        progress.update(8)
        progress.show(0.5, 75.0)
    assert caplog.messages == []
