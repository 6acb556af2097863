"""Weights from the network: several addresses in turn, broken downloads continued, every byte as expected.

They are kept in $GAC_WEIGHTS_CACHE, or else in gac/weights below $XDG_CACHE_HOME (~/.cache). Deleting the folder is
always safe.
"""

import hashlib
import http.client
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import filelock
from tqdm import tqdm

from gac.errors import InputError
from gac.files import user_path
from gac.version import __version__

logger = logging.getLogger("gac")

_TIMEOUT = 30  # seconds in which nothing comes
_CHUNK = 1 << 18


class _Failed(Exception):
    """An address does not give the file; the message is the reason."""


def cache_folder() -> Path:
    """Return the folder in which downloaded weights are kept. Raises InputError if it is not known."""
    if chosen := os.environ.get("GAC_WEIGHTS_CACHE"):
        return user_path(chosen, "GAC_WEIGHTS_CACHE")
    try:
        caches = os.environ.get("XDG_CACHE_HOME")
        return (user_path(caches, "XDG_CACHE_HOME") if caches else Path.home() / ".cache") / "gac" / "weights"
    except RuntimeError as error:
        raise InputError("the home directory is not known: name a folder for weights with GAC_WEIGHTS_CACHE") from error


def download(urls: Sequence[str], path: Path, sha256: str, size: int) -> None:
    """Put a file of ``size`` bytes there, whole or not at all, from the first address that gives it.

    What has come of a download that breaks off is kept beside it, and continued: at once where the connection broke,
    and else by the next call.

    Raises:
        InputError: If no address gives a file with this digest, or its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process that wants the same file waits, and finds it.
        with filelock.FileLock(f"{path}.lock"):
            if not matches(path, sha256):
                os.replace(_download(urls, path, sha256, size), path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be kept ({error.strerror or error}): GAC_WEIGHTS_CACHE names another folder"
        ) from error


def matches(path: Path, sha256: str) -> bool:
    """Return whether a file is there and has this digest. Raises OSError if it cannot be read."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _download(urls: Sequence[str], path: Path, sha256: str, size: int) -> Path:
    """Return the partial file, which is whole. Raises InputError if no address gives it."""
    partial = path.with_name(f"{path.name}.partial")
    reasons = []
    for url in urls:
        logger.info("downloading %s (%.1f MB) from %s", path.name, size / 1e6, url)
        try:
            _complete(url, partial, sha256, size)
        except _Failed as failed:
            reasons.append(f"{url}: {failed}")
        else:
            return partial
    begun = f" ({_size(partial)} of {size} bytes have come and are kept)" if _size(partial) else ""
    raise InputError(
        f"{path.name} cannot be downloaded{begun}: {'; '.join(reasons)}; try again with a connection, or put the file"
        f" there by hand as {path}"
    )


def _complete(url: str, partial: Path, sha256: str, size: int) -> None:
    """Make a partial file whole. Raises _Failed."""
    if _size(partial) > size:
        partial.unlink()
    continued = _size(partial) > 0
    while (before := _size(partial)) < size:
        try:
            _receive(url, partial, size)
        except _Failed as failed:
            # Where something came, the next attempt gets further.
            if _size(partial) <= before:
                raise
            logger.info("%s after %d of %d bytes: continuing", failed, _size(partial), size)
    if matches(partial, sha256):
        return
    partial.unlink()
    if not continued:
        raise _Failed("its content is not the expected one (sha256)")
    # The first part may have come from elsewhere, or from another version of the file.
    _complete(url, partial, sha256, size)


def _receive(url: str, partial: Path, size: int) -> None:
    """Append what an address sends to a partial file, whose bytes are not asked for again. Raises _Failed."""
    begin = _size(partial)
    headers = {"User-Agent": f"gac/{__version__}"} | ({"Range": f"bytes={begin}-"} if begin else {})
    with _network():
        response = urlopen(Request(url, headers=headers), timeout=_TIMEOUT)
    with response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
            # It does not know ranges, and sends everything.
            begin = 0
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and begin + int(length) != size:
            raise _Failed(f"offers {begin + int(length)} bytes instead of {size}")
        with (
            partial.open("r+b" if begin else "wb") as file,
            # None: only on a terminal.
            tqdm(total=size, initial=begin, unit="B", unit_scale=True, desc=partial.stem, disable=None) as bar,
        ):
            file.seek(begin)
            while True:
                with _network():
                    chunk = response.read(_CHUNK)
                if not chunk:
                    break
                if file.tell() + len(chunk) > size:
                    raise _Failed(f"sends more than {size} bytes")
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            if file.tell() < size:
                raise _Failed("the connection ended")


@contextmanager
def _network() -> Iterator[None]:
    """Tell an error of the connection from one of the disk: raise _Failed."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Failed(str(error) or type(error).__name__) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
