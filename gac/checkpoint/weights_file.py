"""Networks as safetensors files: the tensors, and as metadata how they were made and a digest of all that."""

import hashlib
import json
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gac.errors import InputError, quoted

FORMAT = "gac-weights-1"
SUFFIX = ".safetensors"
# Entries of a checkpoint that are no part of a card.
_NO_CARD = ("format", "model", "training")


class DamagedWeights(Exception):
    """The bytes are not those that were written, or those of no safetensors file."""


def is_safetensors(beginning: bytes) -> bool:
    """Return whether a file whose first nine bytes these are can only be a safetensors file."""
    # Eight bytes are the header's length; it is a JSON object.
    return beginning[8:9] == b"{"


def decode_weights(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of a safetensors file and its card, which is None where another program wrote the file.

    Raises:
        DamagedWeights: For what is no such file, and for what is not what its digest was taken of.
        InputError: For a file of another version of this package.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
        tensors = load(content)
        if "sha256" not in metadata and not metadata.get("format", "").startswith('"gac-'):
            return tensors, None
        # safetensors writes them in any order.
        card = {key: json.loads(value) for key, value in sorted(metadata.items())}
        found, said = card.pop("format", None), card.pop("sha256", None)
        digest = digest_of(tensors, card)
    # KeyError: a type of numbers that PyTorch does not have; RecursionError: JSON that is nested too deeply.
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedWeights(f"damaged or no safetensors file: {error}") from error
    if found != FORMAT:
        raise InputError(f"format {quoted(found)} is not known to this version, which reads {FORMAT!r}")
    if said != digest:
        raise DamagedWeights("its content differs from its own sha256" if said else "its metadata have no sha256")
    return tensors, card


def card_of(payload: dict[str, Any]) -> dict[str, Any]:
    """Return how the network of a checkpoint's content in our format was made: its plain entries.

    Raises InputError for entries that are not plain.
    """
    try:
        return json.loads(json.dumps({key: value for key, value in payload.items() if key not in _NO_CARD}))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"its entries are not plain values: {error}") from error


def write_weights(file: BinaryIO, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write tensors and how they were made as a safetensors file, whose metadata are the card's entries as JSON.

    ``card`` holds plain values: "config", "data", "num_classes", "in_channels", as checkpoints do, and what else is
    known. Added is "sha256", the digest of names, shapes, numbers and card.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    card = json.loads(json.dumps(card))
    entries = {"format": FORMAT, **card, "sha256": digest_of(tensors, card)}
    file.write(save(tensors, {key: json.dumps(value) for key, value in entries.items()}))


def digest_of(tensors: dict[str, Tensor], card: dict[str, Any]) -> str:
    """Return the SHA-256 of names, types, shapes and numbers of tensors and of a card."""
    digest = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
