"""The authors' checkpoint format: the same tensors under other names, some of them under several."""

import re

import torch
from torch import Tensor

from gac.errors import InputError, first_few

# The authors' CIFAR modules register a layer on its own and again inside the wrapper that runs it over time.
_ALIASES = [
    (r"\.seqbn\.module\.", ".bn."),
    (r"\b(conv1|conv2|fc1)_s\.layer\.module\.", r"\1."),
    (r"\bconv([12])_s\.bn\.", r"bn\1."),
]
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_NAMES = [
    # CIFAR: conv1, bn1, layer1..3; ImageNet: conv1.0, conv1.1, conv2_x..conv5_x
    (r"conv1\.(?:0\.)?weight", "stem.conv.weight"),
    (rf"(?:bn1|conv1\.1)\.bn\.{_NORM}", r"stem.norm.\1"),
    (r"encoding\.TA\.sharedMLP\.0\.weight", "coding.gate.temporal.squeeze.weight"),
    (r"encoding\.TA\.sharedMLP\.2\.weight", "coding.gate.temporal.expand.weight"),
    (r"encoding\.SCA\.sharedMLP\.0\.weight", "coding.gate.spatial_channel.conv1.weight"),
    (r"encoding\.SCA\.sharedMLP\.2\.weight", "coding.gate.spatial_channel.conv2.weight"),
    (r"fc1\.(weight|bias)", r"head.\1"),
]
_BLOCK = r"(?:layer(?P<layer>[1-9])|conv(?P<conv>[2-9])_x)\.(?P<index>\d+)\.(?P<rest>.+)"
_NAMES_IN_BLOCK = [
    (r"conv([12])\.weight", r"conv\1.conv.weight"),
    (rf"bn([12])\.bn\.{_NORM}", r"conv\1.norm.\2"),
    (r"(?:downsample\.layer\.module|shortcut\.0)\.weight", "shortcut.conv.weight"),
    (rf"(?:downsample\.bn|shortcut\.1)\.bn\.{_NORM}", r"shortcut.norm.\1"),
]


def translate(key: str) -> str | None:
    """Return our name of the tensor that the authors call ``key``, or None where there is none."""
    for pattern, replacement in _ALIASES:
        key = re.sub(pattern, replacement, key)
    block = re.fullmatch(_BLOCK, key)
    if block is None:
        return _first_match(_NAMES, key)
    rest = _first_match(_NAMES_IN_BLOCK, block["rest"])
    stage = int(block["layer"]) - 1 if block["layer"] else int(block["conv"]) - 2
    return None if rest is None else f"stages.{stage}.{block['index']}.{rest}"


def convert(state: dict[str, Tensor], strict: bool = True) -> dict[str, Tensor]:
    """Return the authors' state dict in our names.

    Every key is used; without ``strict`` those that are unknown keep their names. The weights of the temporal
    attention, [T // 2, T, 1, 1, 1] and [T, T // 2, 1, 1, 1] in the authors' files, become matrices.

    Raises:
        InputError: If keys are unknown (with ``strict``), or if two names of one tensor hold different values.
    """
    converted: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    unknown, disagreeing = [], []
    for key, value in state.items():
        name = translate(key)
        if name is None:
            unknown.append(key)
            continue
        if ".temporal." in name:
            value = value.flatten(1)
        if name not in converted:
            converted[name], source[name] = value, key
        elif not torch.equal(converted[name], value):
            disagreeing.append(f"{source[name]} and {key}")
    if unknown and strict:
        raise InputError(f"not a checkpoint of these networks, unknown keys: {first_few(unknown)}")
    if disagreeing:
        raise InputError(f"names of one tensor hold different values: {first_few(disagreeing)}")
    return converted | {key: state[key] for key in unknown}


def _first_match(names: list[tuple[str, str]], key: str) -> str | None:
    for pattern, replacement in names:
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    return None
