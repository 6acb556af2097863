"""Paths as users write them, atomic writes, and a one-line error for results that cannot be written."""

import errno
import glob
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gac.errors import InputError, abridged

# Only where folders can be opened, which Windows does not allow, does the system have the flag.
_OPEN_FOLDER: int | None = getattr(os, "O_DIRECTORY", None)
_STREAMS = (Path("/dev"), Path("/dev/fd"))


def user_path(text: str, option: str) -> Path:
    """Return the path that the value of ``option`` names, with a leading ``~`` or ``~user`` replaced.

    Raises InputError for a home directory that is not known and for a name that no file can have.
    """
    try:
        text.encode()
        path = Path(text).expanduser()
        path.stat()
    except UnicodeEncodeError:
        reason = "its name is not UTF-8; rename it"
    except RuntimeError:
        reason = f"the home directory of {text.partition('/')[0]} is not known; write the path in full"
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            # Whether it must exist and what may be done with it is for those to say who open it.
            return path
        reason = "the system allows no name as long as this; choose a shorter one"
    except ValueError:
        reason = "a name has no null bytes"
    else:
        return path
    raise InputError(f"{option} {abridged(text)}: {reason}")


@contextmanager
def atomic_write(path: str | os.PathLike, before_replace: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` once its content is on disk.

    If writing fails or the process crashes, ``path`` stays as it was; a crash also leaves a temporary file, which
    :func:`remove_leftovers` deletes. ``before_replace`` is called when the content is on disk and ``path`` is still
    the old file, which it may move elsewhere.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            # Only the owner can read what mkstemp makes; results get the permissions of any other new file.
            os.chmod(temporary, 0o666 & ~_umask())
            yield file
            file.flush()
            os.fsync(file.fileno())
        before_replace()
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if _OPEN_FOLDER is None:
        return
    folder = os.open(path.parent, os.O_RDONLY | _OPEN_FOLDER)
    try:
        os.fsync(folder)
    except OSError as error:
        # Some network file systems know no such thing; the file is there all the same.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(folder)


@contextmanager
def atomic_folder(path: str | os.PathLike, may_replace: Callable[[Path], bool] = lambda path: False) -> Iterator[Path]:
    """Make a folder that is called ``path`` once everything is in it.

    What is there must be an empty folder, or one that may be replaced, which is deleted; else FileExistsError is
    raised. ``path`` stays as it was if the block fails.
    """
    path = Path(os.path.realpath(path))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as scratch:
        made, old = Path(scratch, "new"), Path(scratch, "old")
        made.mkdir()
        yield made
        if path.is_dir() and (may_replace(path) or not any(path.iterdir())):
            os.rename(path, old)
        elif path.exists():
            raise FileExistsError(errno.EEXIST, "it exists and is no empty folder")
        os.rename(made, path)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Delete the temporary files of killed writers of ``path``; call it only while nobody writes ``path``."""
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
    """Raise ResultsNotWritten in place of an OSError in the block, which writes ``path``.

    The OSError itself often does not name the file. ``what_is_left`` is added to the message.
    """
    ending = f"; {what_is_left}" if what_is_left else ""
    # An error that is being handled while the block cleans up has nothing to do with what the block writes.
    before = sys.exception()
    try:
        yield
    except OSError as error:
        raise ResultsNotWritten(f"cannot write {path}: {error.strerror or error}{ending}") from error
    except RuntimeError as error:
        # torch.save raises this in place of the OSError that caused it.
        if not isinstance(error.__context__, OSError) or error.__context__ is before:
            raise
        raise ResultsNotWritten(f"cannot write {path}: {error.__context__.strerror}{ending}") from error


def check_writable(path: Path, option: str) -> Path:
    """Return ``path``, the value of a command-line option; raise InputError if it cannot be written.

    Checked before hours of work rather than after them. Of a link the file that it leads to is returned: an atomic
    write puts a file in the place of whatever has the name, be it /dev/null.
    """
    is_device = path.exists() and not path.is_file() and not path.is_dir()
    # /dev/stdout may be a file: what is printed would be lost with the one that is replaced.
    if is_device or path.absolute().parent in _STREAMS:
        raise InputError(f"{option} {path}: expected a file, not a device or a pipe")
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: expected a file in a folder that exists")
    _check_parent(path, option)
    return path


def check_new_folder(path: Path, option: str) -> Path:
    """Return ``path``, the value of a command-line option; raise InputError if no folder can be made there.

    A folder that is empty counts as none.
    """
    if path.is_dir() and any(path.iterdir()):
        raise InputError(
            f"{option} {path}: the folder is not empty, and nothing in it is overwritten: name another one"
        )
    if not path.is_dir() and (path.exists() or not path.absolute().parent.is_dir()):
        raise InputError(f"{option} {path}: expected a new folder, in one that exists")
    _check_parent(path, option)
    return path


def _check_parent(path: Path, option: str) -> None:
    try:
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise InputError(f"{option} {path}: its folder cannot be written: {error.strerror}") from error
