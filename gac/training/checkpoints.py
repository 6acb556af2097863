"""The checkpoints that a run is resumed from: what is in them, when they are written, which ones are kept and read."""

import itertools
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gac.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from gac.errors import InputError
from gac.files import writing

logger = logging.getLogger("gac")


@dataclass(frozen=True)
class StateAdapter:
    """Gives a checkpoint the state of something that has no state_dict of its own."""

    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], None]


class Checkpoints:
    """The checkpoints in a folder: last.pt is the newest, last-1.pt the one before it, last-2.pt before that.

    Whenever the process is killed, at least one of them is complete: the older ones are renamed only once the new one
    is on the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest = folder / "last.pt"

    def existing(self) -> list[Path]:
        """Return the checkpoints that exist, newest first."""
        ages = {}
        for path in self.folder.glob("last*.pt"):
            if match := re.fullmatch(r"last(?:-([1-9]\d*))?\.pt", path.name):
                ages[path] = int(match[1] or 0)
        return sorted(ages, key=ages.__getitem__)

    def read(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest intact checkpoint and its content, or None if there is no checkpoint.

        Damaged ones that are newer are reported, one line each, and renamed, so that they never displace a good one.
        Raises InputError if all of them are damaged; they then keep their names.
        """
        damaged: list[Path] = []
        for path in self.existing():
            try:
                payload = read_checkpoint(path)
            except DamagedCheckpoint:
                damaged.append(path)
                continue
            for each in damaged:
                aside = each.with_name(f"{each.name}.damaged")
                os.replace(each, aside)
                logger.warning("%s is damaged: using %s, which is older; renamed it to %s", each, path.name, aside.name)
            return path, payload
        if damaged:
            raise InputError(
                f"cannot resume: {' and '.join(map(str, damaged))} {'are' if len(damaged) > 1 else 'is'} damaged;"
                " start again with another --output"
            )
        return None

    def write(self, payload: dict[str, Any], keep: int) -> None:
        """Write ``payload`` to last.pt and keep ``keep`` checkpoints, including that one.

        Raises ResultsNotWritten if the disk is full or cannot be written; the checkpoints then stay as they were.
        """
        with writing(self.newest, "the checkpoints before it are as they were"):
            write_checkpoint(self.newest, payload, before_replace=lambda: self._move_down(keep))
            for path in self.existing()[keep:]:
                path.unlink()

    def _move_down(self, keep: int) -> None:
        # Only up to the first free name, which a crash in the loop below leaves behind.
        free = next(age for age in itertools.count() if age == keep - 1 or not self._path(age).exists())
        for age in range(free, 0, -1):
            os.replace(self._path(age - 1), self._path(age))

    def _path(self, age: int) -> Path:
        return self.folder / f"last-{age}.pt" if age else self.newest


class CheckpointInterval:
    """When a checkpoint is due within an epoch: every ``minutes`` or every ``steps``; 0 means never.

    Minutes are counted from the last :meth:`restart`, and from the construction before that.
    """

    def __init__(self, minutes: float, steps: int) -> None:
        self.seconds = 60 * minutes
        self.steps = steps
        self.restart()

    def restart(self) -> None:
        """Restart the clock after a checkpoint has been written."""
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether to write a checkpoint after ``step``, the number of steps done in the run."""
        if self.steps > 0 and step % self.steps == 0:
            return True
        return self.seconds > 0 and time.monotonic() - self._since >= self.seconds
