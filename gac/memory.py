"""How much memory there is, for refusing what cannot fit before the system is brought down by trying."""

import os
from pathlib import Path

from gac.errors import InputError

_GIB = 2**30


def available_memory() -> int | None:
    """Return how many bytes this process can still get, or None on systems that do not say.

    On Linux what the kernel thinks can be had without swapping, or what is left of the control group's limit if that is
    less; elsewhere all of the machine's memory, where POSIX tells.
    """
    found = []
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    limit, used = (_lines(Path("/sys/fs/cgroup", f"memory.{name}")) for name in ("max", "current"))
    if limit and used and limit[0].isdecimal():
        found.append(max(0, int(limit[0]) - int(used[0])))
    if not found and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def check_fits(what: str, needed: int, remedy: str) -> None:
    """Raise InputError if so many bytes cannot be had; ``what`` needs them and ``remedy`` says what to do."""
    available = available_memory()
    if available is not None and needed > available:
        raise InputError(
            f"{what} needs {needed / _GIB:,.1f} GiB of memory, and {available / _GIB:,.1f} GiB are free: {remedy}"
        )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
