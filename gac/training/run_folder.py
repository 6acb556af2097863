"""The folder that holds everything a run writes, and whether a run may use it."""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from textwrap import shorten
from typing import Any, TextIO

import filelock
import yaml
from torch.utils.tensorboard import SummaryWriter

from gac.checkpoint import DamagedCheckpoint, read_checkpoint, read_config
from gac.config import Config
from gac.data.interface import DataInfo
from gac.errors import InputError
from gac.files import atomic_write, remove_leftovers, writing
from gac.training.checkpoints import Checkpoints

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger("gac")

# Where and how fast a run computes and how it is saved, not what it computes: free to change when it resumes. Like the
# number of processes, which is free too, accumulate_steps does change what BatchNorm sees as a batch: a run may have to
# continue with less memory.
FREE_WHEN_RESUMING = frozenset(
    {
        "device",
        "model.backend",
        "data.root",
        "data.download",
        "data.workers",
        "train.accumulate_steps",
        "train.cuda_graph",
        "train.overlap_weight_gradients",
        "train.checkpoint_activations",
        "train.eval_batch_size",
        "train.checkpoint_minutes",
        "train.checkpoint_steps",
        "train.keep_checkpoints",
    }
)

# The errors of file systems without locks, such as some NFS and Lustre mounts.
WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


Metric = float | str
"""A value in metrics.jsonl; only "backend" is text, and only "cuda_graph" a truth value."""


class FolderInUse(InputError):
    """Another process runs in the folder."""


class RunFolder:
    """The files of a run: config.yaml, metrics.jsonl, last.pt and older ones, best.pt, TensorBoard's event files.

    Attributes:
        lock: Keeps other runs out, from :meth:`enter` or :meth:`create` until it is closed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = Checkpoints(path)
        self.best = path / "best.pt"
        self.lock = FolderLock(path)
        self._events: SummaryWriter | None = None

    def open(self, config: Config, resume: str | None) -> tuple[Path, dict[str, Any]] | None:
        """Lock the folder if it exists and return the checkpoint that a run with ``config`` resumes from.

        Raises InputError as :meth:`enter`, :meth:`checkpoint_to_resume` and :func:`check_same_run` do.
        """
        self.enter()
        resumed = self.checkpoint_to_resume(resume)
        if resumed is not None:
            check_same_run(resumed[1], config, resumed[0])
        return resumed

    def enter(self) -> None:
        """Lock the folder if it exists; if not, :meth:`create` does.

        Raises InputError if another run uses it or it cannot be written.
        """
        if self.path.is_dir():
            with self._reporting():
                self.lock.acquire()

    def checkpoint_to_resume(self, resume: str | None) -> tuple[Path, dict[str, Any]] | None:
        """Return the checkpoint that ``resume`` names, with its content, or None to start afresh.

        "auto" means the newest intact one in the folder, if there is any, and a path only that file. Raises InputError
        for a file that cannot be read or resumed from, and if the folder holds a run that would be overwritten.
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
        # An epoch writes its line, then best.pt, then last.pt. A fresh start writes the same again.
        epochs = len(self.metrics.read_bytes().splitlines()) if self.metrics.exists() else 0
        return epochs == 1 or (epochs == 0 and not self.best.exists())

    def create(self, config: Config) -> None:
        """Make and lock the folder, remove what a killed process left in it and write config.yaml.

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

    def best_epoch(self) -> int | None:
        """Return the number of the epoch, from 1, whose network best.pt holds, or None if there is no such network."""
        try:
            epoch = read_checkpoint(self.best).get("epoch")
        except InputError:
            return None
        return epoch if isinstance(epoch, int) else None

    def begin_metrics(self, epochs: Sequence[Mapping[str, Metric]]) -> None:
        """Start metrics.jsonl with the epochs that are done. Raises ResultsNotWritten."""
        with writing(self.metrics):
            write_metrics(self.metrics, epochs)

    def open_events(self, epoch: int) -> None:
        """Start an event file of TensorBoard after ``epoch`` completed epochs. Raises ResultsNotWritten."""
        with writing(self.path):
            self._events = SummaryWriter(self.path, purge_step=epoch + 1)

    def write_epoch(self, metrics: Mapping[str, Metric], measured: Mapping[str, float]) -> None:
        """Add the results of an epoch to metrics.jsonl, and with what was ``measured`` inside to TensorBoard's file.

        Raises ResultsNotWritten.
        """
        with writing(self.metrics):
            append_metrics(self.metrics, metrics)
        with writing(self.path):
            for name, value in {**metrics, **measured}.items():
                if name != "epoch" and not isinstance(value, str | bool):
                    self._events.add_scalar(name, value, metrics["epoch"])
            self._events.flush()

    def close_events(self) -> None:
        """Close TensorBoard's file, if it is open. Raises ResultsNotWritten."""
        if self._events is not None:
            # Closing raises the error of the writer's thread again.
            with writing(self.path):
                self._events.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn an OSError in the block into InputError."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {self.path}: {error.strerror}; choose another --output"
            ) from error


class FolderLock:
    """Keeps other processes (not this one) out of a folder: a lock on the file run.lock in it, which names its holder.

    The system releases the lock when the process ends, however it ends, so a killed run never blocks the next one. It
    is a POSIX record lock, because the processes that decode images would inherit that of flock, and they outlive a
    killed run by seconds. Closing the file anywhere in the process releases it, so nothing else may open it. Windows
    has no such locks, and no processes that inherit them: there it is filelock's lock on the file run.held, as nobody
    could read the holder in a file that is locked itself.

    The file, which means nothing without its lock, stays unless the folder has nothing else, as no run has begun in it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self._file: TextIO | None = None
        self._without_fcntl = filelock.FileLock(folder / "run.held") if fcntl is None else None

    @property
    def held(self) -> bool:
        """Whether this process has the lock, or has found that the file system has no locks."""
        return self._file is not None

    def acquire(self) -> None:
        """Take the lock, or go on with a warning if the file system has no locks.

        Raises FolderInUse, with its holder, if another process has it, and OSError if the file cannot be written.
        """
        # This mode does not truncate the file, which may be another process's, and creates it if it does not exist.
        file = self.path.open("a+")
        try:
            self._lock(file)
            if not self._is_there(file):
                # Its holder removed it between the two lines above; another process may have locked a new one.
                self._release(file)
                return self.acquire()
            file.truncate(0)
            now = datetime.now().astimezone()
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S %z}\n")
            file.flush()
            # Other machines that share the folder see it only now.
            os.fsync(file.fileno())
        except BaseException:
            self._release(file)
            raise
        self._file = file

    def _lock(self, file: TextIO) -> None:
        try:
            if self._without_fcntl is not None:
                self._without_fcntl.acquire(timeout=0)
            else:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                folder, reason = self.path.parent, error.strerror
                logger.warning("%s cannot be locked (%s): see to it that no other run writes there", folder, reason)
                return
            if not isinstance(error, BlockingIOError | PermissionError | filelock.Timeout):
                raise
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise FolderInUse(
                f"{self.path.parent} is in use by {holder}: wait until that has ended, or choose another --output"
            ) from error

    def close(self) -> None:
        """Release the lock, if it is held."""
        if self._file is not None:
            # Windows removes no file that is open.
            if self._without_fcntl is None and self._is_there(self._file) and len(os.listdir(self.path.parent)) == 1:
                self.path.unlink()
            self._release(self._file)
            self._file = None

    def _is_there(self, file: TextIO) -> bool:
        """Return whether the file that was opened is the one that has its name now."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _release(self, file: TextIO) -> None:
        file.close()
        if self._without_fcntl is not None:
            self._without_fcntl.release()


def check_same_run(payload: dict[str, Any], now: Config, checkpoint: Path) -> None:
    """Raise InputError unless ``payload``, read from ``checkpoint``, is the state of a run that ``now`` configures."""
    if "training" not in payload:
        raise InputError(f"{checkpoint} holds a network without the state to resume from; use the run's last.pt")
    if not isinstance(payload["training"], dict):
        raise InputError(f"cannot resume {checkpoint}: its entry training is damaged: it is no dict")
    try:
        # Earlier versions left open what the preset decides.
        before, after = (config.with_neuron().flat() for config in (read_config(payload), now))
    except InputError as error:
        raise InputError(f"cannot resume {checkpoint}: {error}") from error
    differing = [
        f"{name} {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name]
        and name not in FREE_WHEN_RESUMING
        and not (name == "train.epochs" and before[name] < after[name])
        # Its content decides, by which the state knows it, and not where it is now.
        and not (name == "train.teacher" and None not in (before[name], after[name]))
    ]
    if differing:
        raise InputError(
            f"cannot resume {checkpoint} with another configuration ({', '.join(differing)}): restore these values or"
            " start a new run with another --output"
        )
    if "totals" not in payload["training"]:
        written_by = payload.get("versions")
        version = written_by.get("gac") if isinstance(written_by, dict) else None
        version = version if isinstance(version, str) else "of another version"
        raise InputError(f"cannot resume {checkpoint}: it was written by gac {version}, which can continue it")
    if before["train.epochs"] < after["train.epochs"]:
        logger.warning(
            "%s was to have %d epochs and goes on to %d: from here on the learning rate is that of a run of %d epochs,"
            " which is not what such a run without the stop would give",
            checkpoint,
            *(each["train.epochs"] for each in (before, after, after)),
        )


def check_same_data(payload: Mapping[str, Any], now: DataInfo, checkpoint: Path) -> None:
    """Raise InputError if the data set is not the one that the run in ``checkpoint`` was trained on.

    data.root may change, but not what it holds. ``payload`` is the checkpoint's content.
    """
    sizes = {"training images": now.train_size, "test images": now.test_size, "classes": now.num_classes}
    try:
        then = DataInfo.from_dict(payload["data"]) if "data" in payload else None
    except InputError as error:
        raise InputError(f"cannot resume {checkpoint}: {error}") from error
    if then is not None:
        before = {"training images": then.train_size, "test images": then.test_size, "classes": then.num_classes}
    else:
        # Checkpoints of earlier versions hold only the sizes, or not even those.
        before = payload["training"].get("data", sizes)
        if (
            not isinstance(before, dict)
            or before.keys() != sizes.keys()
            or not all(isinstance(size, int) for size in before.values())
        ):
            raise InputError(f"cannot resume {checkpoint}: its entry training.data is damaged")
    differing = [f"{before[name]} {name}, now {sizes[name]}" for name in sizes if before[name] != sizes[name]]
    if then is not None and not differing:
        for name, old in then.to_dict().items():
            if old != (new := now.to_dict()[name]):
                what, each = name.replace("_", " "), (shorten(str(value), 80) for value in (old, new))
                differing.append("other train labels" if name == "train_labels" else f"{what} {', now '.join(each)}")
    if differing:
        raise InputError(
            f"cannot resume {checkpoint} with other data (it had {', '.join(differing)}): restore the data set or"
            " start a new run with another --output"
        )


def append_metrics(path: Path, metrics: Mapping[str, Metric]) -> None:
    """Append a line, and return once it is on the disk."""
    with path.open("a") as file:
        file.write(_line(metrics))
        file.flush()
        os.fsync(file.fileno())


def write_metrics(path: Path, epochs: Sequence[Mapping[str, Metric]]) -> None:
    """Write a file of these lines, as a run does when it begins or resumes."""
    with atomic_write(path) as file:
        file.write("".join(map(_line, epochs)).encode())


def read_metrics(path: Path) -> list[dict[str, Metric]]:
    """Return the lines of a metrics file, without an unfinished last one, which a crash can leave."""
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def _line(metrics: Mapping[str, Metric]) -> str:
    return json.dumps(dict(metrics)) + "\n"
