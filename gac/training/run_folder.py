"""The folder that holds everything a run writes, and whether a run may use it."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from gac.checkpoint import DamagedCheckpoint, read_checkpoint
from gac.config import Config
from gac.errors import InputError
from gac.files import atomic_write, remove_leftovers
from gac.training.checkpoints import Checkpoints

# Where and how fast a run computes and how it is saved, not what it computes: free to change when it resumes. Like the
# number of processes, which is free too, accumulate_steps does change what BatchNorm sees as a batch: a run may have to
# go on where there is less memory.
FREE_WHEN_RESUMING = frozenset(
    {
        "device",
        "model.backend",
        "data.root",
        "data.download",
        "data.workers",
        "train.accumulate_steps",
        "train.cuda_graph",
        "train.checkpoint_activations",
        "train.eval_batch_size",
        "train.checkpoint_minutes",
        "train.checkpoint_steps",
        "train.keep_checkpoints",
    }
)


class RunFolder:
    """The files of a run: config.yaml, metrics.jsonl, last.pt and older ones, best.pt, TensorBoard's event files.

    Attributes:
        lock: Keeps other runs out, from :meth:`enter` until it is closed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = Checkpoints(path)
        self.best = path / "best.pt"
        self.lock = FolderLock(path)

    def enter(self) -> None:
        """Keep other runs out of the folder if it is there; :meth:`create` does so if it is not.

        Raises InputError if another run is in it or it cannot be written.
        """
        if self.path.is_dir():
            with self._reporting():
                self.lock.acquire()

    def checkpoint_to_resume(self, resume: str | None) -> tuple[Path, dict[str, Any]] | None:
        """Return the checkpoint that ``resume`` means, with its content, or None to start afresh.

        "auto" means the newest in the folder that is whole, if there is any, and a path that file and no other.
        Raises InputError for a file that cannot be read or resumed from, and if a run is in the folder that would
        not be continued but overwritten.
        """
        if resume == "auto" and (found := self.checkpoints.read()) is not None:
            return found
        if resume == "auto" and self._crashed_in_the_first_epoch():
            return None
        checkpoint = None if resume in (None, "auto") else Path(resume)
        continues_here = checkpoint is not None and checkpoint.resolve().parent == self.path.resolve()
        if self.checkpoints.existing() and not continues_here:
            raise InputError(
                f"{self.path} holds a run already: continue it with --resume auto or choose another --output"
            )
        results = [path.name for path in (self.best, self.metrics) if path.exists() and path.stat().st_size > 0]
        if results and not continues_here:
            raise InputError(
                f"{self.path} holds the {' and '.join(results)} of a run that cannot be continued, as its last.pt is"
                " not there, and that would be overwritten: choose another --output or move them away"
            )
        if checkpoint is None:
            return None
        try:
            return checkpoint, read_checkpoint(checkpoint)
        except DamagedCheckpoint as error:
            hint = "; --resume auto continues the newest that is whole" if continues_here else ""
            raise InputError(f"{error}{hint}") from error

    def _crashed_in_the_first_epoch(self) -> bool:
        # An epoch writes its line, then best.pt, then last.pt. Starting afresh writes the same again.
        epochs = len(self.metrics.read_bytes().splitlines()) if self.metrics.exists() else 0
        return epochs == 1 or (epochs == 0 and not self.best.exists())

    def create(self, config: Config) -> None:
        """Make the folder, tidy up after a process that was killed in it and write config.yaml.

        Raises InputError if the folder cannot be made or written, or another run has made it since :meth:`enter`.
        """
        with self._reporting():
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.lock.held:
                self.lock.acquire()
                # That run may have ended too.
                self.checkpoint_to_resume(None)
            for path in (self.config, self.metrics, self.checkpoints.newest, self.best):
                remove_leftovers(path)
            with atomic_write(self.config) as file:
                file.write(yaml.safe_dump(config.to_dict(), sort_keys=False).encode())

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn an OSError of the block into InputError."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {self.path}: {error.strerror}; choose another --output"
            ) from error


def check_same_run(payload: dict[str, Any], now: Config, checkpoint: Path) -> None:
    """Raise InputError if the content of ``checkpoint`` is not the state of a run with the configuration ``now``."""
    if "training" not in payload:
        raise InputError(f"{checkpoint} holds a network without the state to resume from; use the run's last.pt")
    before, after = Config.from_dict(payload["config"]).flat(), now.flat()
    differing = [
        f"{name} {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name] and name not in FREE_WHEN_RESUMING
    ]
    if differing:
        raise InputError(
            f"cannot resume {checkpoint} with another configuration ({', '.join(differing)}): restore these values or"
            " start a new run with another --output"
        )
    if "totals" not in payload["training"]:
        raise InputError(
            f"cannot resume {checkpoint}: it was written by gac {payload['versions']['gac']}, which can continue it"
        )


def check_same_data(training: Mapping[str, Any], now: Mapping[str, int], checkpoint: Path) -> None:
    """Raise InputError if the data set is not the one that ``checkpoint``, whose state is ``training``, had so far.

    data.root may change, but not what is there. ``now`` has the sizes of the data set.
    """
    # Checkpoints of earlier versions do not say.
    before = training.get("data", now)
    differing = [f"{before[name]} {name}, now {now[name]}" for name in now if before[name] != now[name]]
    if differing:
        raise InputError(
            f"cannot resume {checkpoint} with other data (it had {', '.join(differing)}): restore the data set or"
            " start a new run with another --output"
        )


def append_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Append a line and see that it is on the disk."""
    with path.open("a") as file:
        file.write(_line(metrics))
        file.flush()
        os.fsync(file.fileno())


def write_metrics(path: Path, epochs: Sequence[Mapping[str, float]]) -> None:
    """Write these lines and no others, as a run that begins or resumes has them."""
    with atomic_write(path) as file:
        file.write("".join(map(_line, epochs)).encode())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics file; one without its newline, which a crash can leave, does not count."""
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def _line(metrics: Mapping[str, float]) -> str:
    return json.dumps(dict(metrics)) + "\n"


logger = logging.getLogger("gac")

# What file systems answer that have no locks, as some NFS and Lustre mounts.
WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


class FolderLock:
    """Keeps other processes (not this one) out of a folder: a lock on the file run.lock in it, which says who has it.

    The system drops the lock when the process ends, however it ends, so a killed run never keeps out the next one. It
    is a POSIX record lock, which the processes that decode images do not inherit, as they would that of flock: they
    outlive a killed run by seconds. Closing the file anywhere in the process drops it, so nothing else may open it.

    The file stays. It means nothing without its lock, and were it removed, one process could lock the file that is gone
    and another one the file that replaced it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self._file: TextIO | None = None

    @property
    def held(self) -> bool:
        """Whether this process has the lock, or has found that the file system has none."""
        return self._file is not None

    def acquire(self) -> None:
        """Take the lock, or go on with a warning where the file system has none.

        Raises InputError, with who has it, if that is another process, and OSError if the file cannot be written.
        """
        # Neither truncates the file, as it may be another process's, nor fails without it.
        file = self.path.open("a+")
        try:
            self._lock(file)
            file.truncate(0)
            now = datetime.now().astimezone()
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S %z}\n")
            file.flush()
            # Where the folder is on several machines, the others see it only now.
            os.fsync(file.fileno())
        except BaseException:
            file.close()
            raise
        self._file = file

    def _lock(self, file: TextIO) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                folder, reason = self.path.parent, error.strerror
                logger.warning("%s cannot be locked (%s): see to it that no other run writes there", folder, reason)
                return
            if not isinstance(error, BlockingIOError | PermissionError):
                raise
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"{self.path.parent} is in use by {holder}: wait until that has ended, or choose another --output"
            ) from error

    def close(self) -> None:
        """Give the lock back; without one this does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
