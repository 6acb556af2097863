"""Compiled kernels on the disk, so that only the first run on a machine waits for the compiler.

They are in $GAC_KERNEL_CACHE, or else in gac/kernels below $XDG_CACHE_HOME (~/.cache); an empty GAC_KERNEL_CACHE turns
the cache off. Deleting the folder is always safe.
"""

import functools
import hashlib
import logging
import os
from pathlib import Path

from gac.files import atomic_write

_log = logging.getLogger("gac")
_DIGEST_SIZE = hashlib.sha256().digest_size


def key_of(*parts: object) -> str:
    """Return a name for what these parts decide, such as source, options and compiler version."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def load(key: str) -> bytes | None:
    """Return what was stored under a key, or None if it is not there or damaged."""
    folder = _folder()
    try:
        stored = b"" if folder is None else (folder / key).read_bytes()
    except OSError:
        return None
    digest, content = stored[:_DIGEST_SIZE], stored[_DIGEST_SIZE:]
    return content if hashlib.sha256(content).digest() == digest else None


def store(key: str, content: bytes) -> None:
    """Store a binary; where the folder cannot be written, that is logged once and nothing is stored."""
    folder = _folder()
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / key) as file:
            file.write(hashlib.sha256(content).digest() + content)
    except OSError as error:
        _log_unwritable(folder, error.strerror or str(error))


def _folder() -> Path | None:
    chosen = os.environ.get("GAC_KERNEL_CACHE")
    if chosen == "":
        return None
    folder = Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gac", "kernels"))
    try:
        return folder.expanduser()
    except RuntimeError:
        _log_unwritable(folder, "the home directory is not known")
        return None


@functools.cache
def _log_unwritable(folder: Path, reason: str) -> None:
    _log.warning(
        "compiled kernels cannot be kept in %s (%s), so every run compiles them again; GAC_KERNEL_CACHE names another"
        " folder",
        folder,
        reason,
    )
