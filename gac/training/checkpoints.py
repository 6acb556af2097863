"""The checkpoints that a run can be resumed from: when they are written, which are kept, which one is read."""

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from gac.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from gac.errors import InputError
from gac.files import writing

logger = logging.getLogger("gac")


class Checkpoints:
    """The checkpoints in a folder: last.pt is the newest, last-1.pt the one before it, last-2.pt before that.

    Whenever the process is killed, at least one of them is complete: the older ones move down a name only once the
    new one is on the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest = folder / "last.pt"

    def existing(self) -> list[Path]:
        """Return the checkpoints that are there, the newest first."""
        ages = {}
        for path in self.folder.glob("last*.pt"):
            if match := re.fullmatch(r"last(?:-([1-9]\d*))?\.pt", path.name):
                ages[path] = int(match[1] or 0)
        return sorted(ages, key=ages.__getitem__)

    def read(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint that is whole with its content, or None if there is none at all.

        Each damaged one on the way is reported in one line and renamed, so that it never pushes a good one out.
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
        """Write ``payload`` to last.pt and keep ``keep`` checkpoints, that one included.

        Raises ResultsNotWritten, with the checkpoints as they were, if the disk is full or cannot be written.
        """
        with writing(self.newest, "the checkpoints before it are as they were"):
            write_checkpoint(self.newest, payload, before_replace=lambda: self._move_down(keep))
            for path in self.existing()[keep:]:
                path.unlink()

    def _move_down(self, keep: int) -> None:
        # No further than the first free name, which a crash in here leaves.
        names = [self.newest, *(self.folder / f"last-{age}.pt" for age in range(1, keep))]
        occupied = next((age for age, path in enumerate(names) if not path.exists()), keep - 1)
        for age in range(occupied, 0, -1):
            os.replace(names[age - 1], names[age])


class CheckpointInterval:
    """When a checkpoint is due within an epoch: after ``minutes`` or ``steps`` since the last one; 0 means never.

    The minutes are counted from the last :meth:`restart`, at first from the beginning.
    """

    def __init__(self, minutes: float, steps: int) -> None:
        self.seconds = 60 * minutes
        self.steps = steps
        self.restart()

    def restart(self) -> None:
        """Begin to count the minutes anew, as a checkpoint has been written."""
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is to be written after ``step``, the number of steps done in the run."""
        if self.steps > 0 and step % self.steps == 0:
            return True
        return self.seconds > 0 and time.monotonic() - self._since >= self.seconds
