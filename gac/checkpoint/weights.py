"""Weights that travel in the package: safetensors files that say how they were made, and are checked when read."""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gac.checkpoint.build import build_network
from gac.checkpoint.format import FORMAT as CHECKPOINT_FORMAT
from gac.errors import InputError, did_you_mean, quoted
from gac.models.ms_resnet import MSResNet

if TYPE_CHECKING:
    from gac.data.normalization import Normalization

FORMAT = "gac-weights-1"
FOLDER = Path(__file__).parents[1] / "weights"
SUFFIX = ".safetensors"


class Pretrained(NamedTuple):
    """A trained network, in evaluation mode on the CPU, and what it needs to see images.

    ``transform`` turns bytes, uint8 [..., C, H, W], into what the network takes, float32 of the same shape. ``card``
    says how the weights were made and what they score: the entries that :func:`write_weights` lists.
    """

    network: MSResNet
    transform: "Normalization"
    card: dict[str, Any]


def list_pretrained() -> list[str]:
    """Return the names that :func:`load_pretrained` takes."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def load_pretrained(name: str) -> Pretrained:
    """Return a trained network that travels in this package, with the normalisation of its images.

    Raises:
        InputError: For an unknown name, and for a file that is not, byte for byte, the one that was released.
    """
    # Opening data sets needs scikit-learn and torchvision, whose import takes longer than this package's.
    from gac.data.interface import DataInfo
    from gac.data.normalization import Normalization

    names = list_pretrained()
    if name not in names:
        close = did_you_mean(name, {each: each for each in names})
        raise InputError(f"no trained network is called {quoted(name)}{close}; there are: {', '.join(names)}")
    payload = read_weights(FOLDER / f"{name}{SUFFIX}")
    network = build_network(payload).eval()
    info = DataInfo.from_dict(payload["data"])
    card = {key: value for key, value in payload.items() if key not in ("model", "format")}
    return Pretrained(network, Normalization(info.mean, info.std, "cpu"), card)


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Return the content of a file of :func:`write_weights` as ``build_network`` and ``evaluate_checkpoint`` take it.

    Raises:
        InputError: For a file that is missing, that is not in this format, or whose content is not what its digest was
            taken of.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        card = {key: json.loads(value) for key, value in metadata.items()}
    except OSError as error:
        raise InputError(f"weights {path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise InputError(f"weights {path}: damaged or no safetensors file of this package: {error}") from error
    if (found := card.pop("format", None)) != FORMAT:
        raise InputError(f"weights {path}: format {quoted(found)} is not known to this version, which reads {FORMAT!r}")
    if card.pop("sha256", None) != _digest(tensors, card):
        raise InputError(f"weights {path}: differ from their own sha256: install the package again")
    return {"format": CHECKPOINT_FORMAT, "model": tensors, **card}


def write_weights(file: BinaryIO, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write tensors and how they were made as a safetensors file, whose metadata are the card's entries as JSON.

    ``card`` holds plain values: "config", "data", "num_classes", "in_channels", as checkpoints do, "command", "seed",
    "data_sha256", "scores" (by precision) and "versions". Added is "sha256", the digest of names, shapes, numbers and
    card.
    """
    card = json.loads(json.dumps(card))
    entries = {"format": FORMAT, **card, "sha256": _digest(tensors, card)}
    file.write(save(tensors, {key: json.dumps(value) for key, value in entries.items()}))


def _digest(tensors: dict[str, Tensor], card: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
