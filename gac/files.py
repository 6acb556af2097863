"""Files that are either whole or not there, and what to say when they cannot be written."""

import glob
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gac.errors import InputError


@contextmanager
def atomic_write(path: str | os.PathLike, before_replace: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` once everything is on disk.

    A failure on the way, or a crash, leaves what was at ``path`` as it was; a crash leaves a temporary file too,
    which :func:`remove_leftovers` removes. ``before_replace`` is called in between, with the content on disk and
    ``path`` still as it was, and may move that elsewhere.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            # mkstemp makes files for the owner alone; results are shared like any other new file.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            yield file
            file.flush()
            os.fsync(file.fileno())
        before_replace()
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove the temporary files of writers of ``path`` that were killed; nobody may be writing it."""
    path = Path(path)
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class ResultsNotWritten(Exception):
    """Results could not be written; the message is one line with the path and the reason."""


@contextmanager
def writing(path: Path, what_is_left: str = "") -> Iterator[None]:
    """Turn an OSError of the block, which writes ``path``, into ResultsNotWritten.

    The error itself often does not say which file it is about. ``what_is_left`` is added to the message.
    """
    ending = f"; {what_is_left}" if what_is_left else ""
    try:
        yield
    except OSError as error:
        raise ResultsNotWritten(f"cannot write {path}: {error.strerror or error}{ending}") from error
    except RuntimeError as error:
        # torch.save raises this in place of the OSError that it met.
        if not isinstance(error.__context__, OSError):
            raise
        raise ResultsNotWritten(f"cannot write {path}: {error.__context__.strerror}{ending}") from error


def check_writable(path: Path, option: str) -> Path:
    """Return ``path``, which an option names, if it can be written: said before the hour of work, not after.

    Raises InputError if not.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: expected a file in a folder that exists")
    try:
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise InputError(f"{option} {path}: its folder cannot be written: {error.strerror}") from error
    return path
