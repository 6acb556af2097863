"""The sources of the kernels, CUDA and C."""

import re
from collections.abc import Sequence
from pathlib import Path

KERNEL_FOLDER = Path(__file__).parent / "kernels"


def source_text(file: str, folders: Sequence[Path] = (KERNEL_FOLDER,)) -> str:
    """Return a kernel file's text with its headers put in place; the first folder that has a file wins."""
    included: set[str] = set()

    def expand(name: str) -> str:
        path = next(folder / name for folder in folders if (folder / name).is_file())
        lines = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            header = re.fullmatch(r'#include "(.+)"', line)
            if header is None:
                lines.append("" if line == "#pragma once" else line)
            elif header[1] not in included:
                included.add(header[1])
                lines += [f'#line 1 "{header[1]}"', expand(header[1]), f'#line {number + 1} "{name}"']
        return "\n".join(lines)

    return f'#line 1 "{file}"\n{expand(file)}\n'
