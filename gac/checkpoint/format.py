"""The checkpoint file: written whole or not at all, compared with its checksums when read, unable to run code."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from gac.errors import InputError
from gac.files import atomic_write

FORMAT = "gac-checkpoint-1"


class DamagedCheckpoint(InputError):
    """The bytes of a checkpoint are not those that were written."""


def write_checkpoint(path: str | os.PathLike, payload: dict, before_replace: Callable[[], None] = lambda: None) -> None:
    """Write a checkpoint of our format so that ``path`` always holds a complete one.

    ``payload`` needs "model" (state dict), "config" (resolved, as nested dicts), "num_classes" and "in_channels";
    train.py adds epoch, step, metrics, versions and, to resume from, training. ``before_replace`` is
    :func:`gac.files.atomic_write`'s.
    """
    with atomic_write(path, before_replace) as file:
        torch.save({"format": FORMAT, **payload}, file)


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Return what a checkpoint file holds, on the CPU.

    Only tensors and plain containers are read (``weights_only=True``): a file that would run code is refused. Every
    byte is compared with the checksums in the file.

    Raises:
        DamagedCheckpoint: For a file that is cut short or has changed since it was written.
        InputError: For a file that is missing, holds other Python objects or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"checkpoint {path}: cannot be opened: {error.strerror}") from error
    try:
        with file:
            _check_sums(file)
            payload = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise InputError(
                f"checkpoint {path}: holds Python objects other than tensors, which could run code, and was not"
                " loaded; save model.state_dict() instead"
            ) from error
        raise DamagedCheckpoint(f"checkpoint {path}: damaged or not a PyTorch file") from error
    except Exception as error:
        # torch.load's unpickler raises nearly every kind of exception on damaged bytes.
        raise DamagedCheckpoint(f"checkpoint {path}: damaged or not a PyTorch file") from error
    if not isinstance(payload, dict):
        raise InputError(f"checkpoint {path}: holds a {type(payload).__name__}, expected a dict")
    if payload.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"checkpoint {path}: format {payload['format']!r} is not known to this version, which reads {FORMAT!r}"
        )
    return payload


def _check_sums(file: BinaryIO) -> None:
    """Raise BadZipFile if a record of a file of torch.save differs from its checksum, which torch.load ignores.

    Files of before PyTorch 1.6 are no archives and have no checksums.
    """
    is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} differs from its checksum")
    file.seek(0)


def is_ours(payload: dict) -> bool:
    """Return whether a checkpoint's content is of our format, with its configuration."""
    return "format" in payload
