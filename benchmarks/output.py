"""Tables on stdout and results in files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gac.files import atomic_write


class Table:
    """A table whose rows can be printed one by one: columns have fixed widths, the first is left-aligned.

    Args:
        columns: Title and least width in characters of each column.
    """

    def __init__(self, columns: Sequence[tuple[str, int]]) -> None:
        self._titles = [title for title, _ in columns]
        self._widths = [max(len(title), width) for title, width in columns]

    def header(self) -> str:
        """Return the titles and a rule below them."""
        return f"{self.row(self._titles)}\n{'  '.join('-' * width for width in self._widths)}"

    def row(self, cells: Sequence[str]) -> str:
        """Return one row; a cell that is too wide shifts those after it."""
        first, *others = zip(cells, self._widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON."""
    with atomic_write(path) as file:
        file.write(f"{json.dumps(data, indent=2, allow_nan=False)}\n".encode())
