"""A full disk or a folder that became unwritable, as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
