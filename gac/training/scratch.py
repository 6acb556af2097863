"""A folder for a run whose results nobody keeps."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gac.errors import InputError


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """Make a folder next to ``output``, on the same disk, and remove it with all that was written to it.

    Raises InputError if it cannot be made.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise InputError(f"cannot write next to {output}: {error.strerror}; choose another --output") from error
    with folder as path:
        yield Path(path)
