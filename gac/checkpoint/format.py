"""The checkpoint file: written whole or not at all, compared with its checksums when read, unable to run code.

It is PyTorch's format, which can also hold what a run is resumed from, or safetensors (:mod:`weights_file`).
"""

import hashlib
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from gac.checkpoint.weights_file import DamagedWeights, decode_weights, is_safetensors
from gac.errors import InputError, quoted
from gac.files import atomic_write

FORMAT = "gac-checkpoint-1"


class DamagedCheckpoint(InputError):
    """The bytes of a checkpoint are not those that were written."""


def write_checkpoint(path: str | os.PathLike, payload: dict, before_replace: Callable[[], None] = lambda: None) -> None:
    """Write a checkpoint of our format so that ``path`` always holds a complete one.

    ``payload`` needs "model" (state dict), "config" (resolved, as nested dicts), "num_classes" and "in_channels";
    train.py adds weights, data, epoch, step, metrics, versions, what ran the neurons ("backend": cupy, c or torch) and
    why ("backend_reason") and, to resume from, training. ``before_replace`` is passed to
    :func:`gac.files.atomic_write`.
    """
    with atomic_write(path, before_replace) as file:
        torch.save({"format": FORMAT, **payload}, file)


def read_checkpoint(path: str | os.PathLike | BinaryIO, digest: "hashlib._Hash | None" = None) -> dict:
    """Return what a checkpoint file, named by its path or open for reading bytes, holds, on the CPU.

    Of PyTorch's files only tensors and plain containers are read (``weights_only=True``): one that would run code is
    refused. A safetensors file of this package holds what a checkpoint holds, one of another program is a bare state
    dict. Every byte is compared with the checksums in the file, if it has any. ``digest`` is updated with the bytes of
    a file named by its path.

    Raises:
        DamagedCheckpoint: For a file that is cut short or has changed since it was written.
        InputError: For a file that is missing, holds other Python objects or is not a checkpoint.
    """
    if not isinstance(path, str | os.PathLike):
        return _read(path, name_of(path))
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise InputError(f"checkpoint {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"checkpoint {path}: cannot be opened: {error.strerror}") from error
    with file:
        if digest is not None:
            # Of the file that is read: a run may put another one in its place at any time.
            hashlib.file_digest(file, lambda: digest)
            file.seek(0)
        return _read(file, str(path))


def name_of(path: str | os.PathLike | BinaryIO) -> str:
    """Return what to call a checkpoint in messages."""
    return str(path if isinstance(path, str | os.PathLike) else getattr(path, "name", "in memory"))


def _read(file: BinaryIO, name: str) -> dict:
    start = file.tell()
    beginning = file.read(9)
    file.seek(start)
    if is_safetensors(beginning):
        return _read_weights(file, name)
    try:
        _check_bytes(file)
        payload = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        file.seek(start)
        if _holds_other_objects(file):
            raise InputError(
                f"checkpoint {name}: holds Python objects other than tensors, which could run code, and was not"
                " loaded; save model.state_dict() instead"
            ) from error
        raise DamagedCheckpoint(
            f"checkpoint {name}: damaged or not a PyTorch or safetensors file, or an old one with Python objects other"
            " than tensors"
        ) from error
    except Exception as error:
        # torch.load's unpickler raises nearly every kind of exception on damaged bytes.
        raise DamagedCheckpoint(f"checkpoint {name}: damaged or not a PyTorch or safetensors file") from error
    if not isinstance(payload, dict):
        raise InputError(f"checkpoint {name}: holds a {type(payload).__name__}, expected a dict")
    if payload.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"checkpoint {name}: format {quoted(payload['format'])} is not known to this version,"
            f" which reads {FORMAT!r}"
        )
    return payload


def _read_weights(file: BinaryIO, name: str) -> dict:
    try:
        tensors, card = decode_weights(file.read())
    except DamagedWeights as error:
        raise DamagedCheckpoint(f"checkpoint {name}: {error}") from error
    except InputError as error:
        raise InputError(f"checkpoint {name}: {error}") from error
    return tensors if card is None else {**card, "format": FORMAT, "model": tensors}


def _check_bytes(file: BinaryIO) -> None:
    """Raise BadZipFile if a record of a file of torch.save differs from its checksum, which torch.load ignores.

    Files written before PyTorch 1.6 are not archives and have no checksums. There is no end to what compressed records
    may unpack to and to how often records may overlap, neither of which torch.save writes; to the size of a bytearray,
    which torch.load makes; and to the time that it takes for some keys of dictionaries. They are refused (the last two
    with UnpicklingError).
    """
    start = file.tell()
    is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if compressed := [each.filename for each in records if each.compress_type != zipfile.ZIP_STORED]:
                raise zipfile.BadZipFile(f"{compressed[0]} is compressed")
            if sum(each.file_size for each in records) > file.seek(0, os.SEEK_END):
                raise zipfile.BadZipFile("its records overlap")
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} differs from its checksum")
            for each in records:
                if each.filename.endswith(".pkl"):
                    _check_pickle(archive.open(each))
    else:
        file.seek(start)
        # A number, a version and the system come before the content.
        for _ in range(4):
            _check_pickle(file)
    file.seek(start)


def _check_pickle(pickled: BinaryIO) -> None:
    """Raise UnpicklingError for what is no pickle, and for what torch.load allows and no checkpoint of networks has."""
    try:
        largest = max(_sizes(pickled))
    except (ValueError, LookupError) as error:
        raise pickle.UnpicklingError(f"it is no pickle: {error}") from error
    # A tuple of tuples of tuples, each twice the one before, takes a few bytes; as a key of a dictionary it is hashed,
    # which takes years and no signal ends.
    if largest > _MOST_OBJECTS:
        raise pickle.UnpicklingError("it contains one object in another more often than a checkpoint can")


_MOST_OBJECTS = 10**8


def _sizes(pickled: BinaryIO) -> Iterator[int]:
    """Yield how many objects each one contains that a pickle makes, those that it has twice counted twice."""
    stack: list[int | None] = []  # None is pickle's mark
    memo: dict[int, int | None] = {}
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL" and argument.endswith(" bytearray"):
            raise pickle.UnpicklingError(f"it makes a {argument}")
        if operation.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif "PUT" in operation.name:
            memo[int(argument)] = stack[-1]
        elif "GET" in operation.name:
            stack.append(memo[int(argument)])
        elif operation is pickletools.code2op["("]:
            stack.append(None)
        else:
            taken = list(operation.stack_before)
            inside = 1
            if pickletools.markobject in taken:
                while (top := stack.pop()) is not None:
                    inside += top
                taken = taken[: taken.index(pickletools.markobject)]
            inside += sum(stack.pop() for _ in taken)
            stack += [inside for _ in operation.stack_after]
            yield inside


def _holds_other_objects(file: BinaryIO) -> bool:
    """Return whether a file holds Python objects that weights_only refuses. Files of before PyTorch 1.6 do not tell."""
    try:
        return bool(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:
        # As above, for damaged bytes.
        return False


def is_ours(payload: dict) -> bool:
    """Return whether a checkpoint's content is in our format, which includes the configuration."""
    return "format" in payload


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor that was read has its numbers in memory, one after the other or by strides."""
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_nested)
