"""One process at a time in a run folder."""

import errno
import fcntl
import logging
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import TextIO

from gac.errors import InputError

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
