"""From the content of a checkpoint, ours or the authors', to the network it describes."""

import os
import re
from dataclasses import asdict

import torch
from torch import Tensor

from gac.checkpoint import authors
from gac.checkpoint.format import is_ours, read_checkpoint
from gac.config import Config
from gac.errors import InputError
from gac.models import create_model
from gac.models.ms_resnet import MSResNet

DEFAULT_T = 6


def load_checkpoint(
    path: str | os.PathLike, map_location: str | torch.device = "cpu", T: int | None = None
) -> MSResNet:
    """Return the network of a checkpoint in evaluation mode; the file may be ours or the authors'.

    Args:
        path: A file of train.py, or a state dict in the authors' or our names, also with DataParallel's prefix.
        map_location: Device of the network.
        T: Number of time steps for networks without gated attention, whose weights do not fix it; by default the
            one it was trained with, or 6 where the file does not say.

    Raises:
        InputError: For a file that cannot be read, for missing, unknown or ill-shaped tensors, and for a T that
            contradicts the weights.
    """
    payload = read_checkpoint(path)
    try:
        return build_network(payload, T).to(map_location).eval()
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from error


def build_network(payload: dict, T: int | None = None) -> MSResNet:
    """Return the network that the content of a checkpoint describes, with its weights, on the CPU."""
    if is_ours(payload):
        state, arguments = _our_parts(payload)
        if T is not None:
            arguments["T"] = T
    else:
        state = _bare_state(payload)
        arguments = _infer_arguments(state)
        arguments.setdefault("T", DEFAULT_T if T is None else T)
    # What ran the neurons elsewhere does not matter here.
    arguments["backend"] = "auto"
    if _SQUEEZE in state and T is not None and _shape(state, _SQUEEZE, 2)[1] != T:
        raise InputError(f"T={T} was asked for, but its gated attention is made for T={state[_SQUEEZE].shape[1]}")
    net = create_model(**arguments)
    _load_weights(net, state)
    return net


_SQUEEZE = "coding.gate.temporal.squeeze.weight"
_SPATIAL = "coding.gate.spatial_channel.conv1.weight"


def _our_parts(payload: dict) -> tuple[dict[str, Tensor], dict]:
    """Return the state dict and the arguments of create_model that a checkpoint of our format holds."""
    for key, kind in (("model", dict), ("config", dict), ("num_classes", int), ("in_channels", int)):
        if not isinstance(payload.get(key), kind):
            raise InputError(f"its entry {key} is missing or damaged")
    try:
        model = Config.from_dict(payload["config"]).model
    except (TypeError, AttributeError) as error:
        raise InputError("its entry config is damaged") from error
    sizes = {key: payload[key] for key in ("num_classes", "in_channels")}
    return _checked_state(payload["model"]), asdict(model) | sizes


def _bare_state(payload: dict) -> dict[str, Tensor]:
    state = _checked_state(payload.get("state_dict", payload))
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state if "stem.conv.weight" in state else authors.convert(state)


def _checked_state(state: object) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not state:
        raise InputError("holds no state dict" if state else "holds nothing")
    others = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise InputError(
            f"expected a file of train.py or a state dict of tensors, got other entries: {', '.join(others)}"
        )
    return dict(state)


def _shape(state: dict[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in state:
        raise InputError(f"not a checkpoint of these networks, missing keys: {key}")
    shape = tuple(state[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise InputError(f"wrong shapes: {key} {list(shape)}, expected {dimensions} dimensions, none of them 0")
    return shape


def _infer_arguments(state: dict[str, Tensor]) -> dict:
    """Return the arguments of create_model that the names and shapes of our state dict imply."""
    width, in_channels, kernel, _ = _shape(state, "stem.conv.weight", 4)
    num_classes, _ = _shape(state, "head.weight", 2)
    blocks = {match.groups() for key in state if (match := re.match(r"stages\.(\d+)\.(\d+)\.", key))}
    stages = sorted({int(stage) for stage, _ in blocks})
    depth = [sum(int(s) == stage for s, _ in blocks) for stage in stages]
    names = {(3, 3): "msresnet18_cifar", (7, 4): "msresnet34" if depth == [3, 4, 6, 3] else "msresnet18"}
    if (kernel, len(depth)) not in names:
        raise InputError(
            f"not a checkpoint of these networks: the stem has a {kernel}x{kernel} kernel and there are {len(depth)}"
            " stages, expected 3x3 and 3 (CIFAR) or 7x7 and 4 (ImageNet)"
        )
    arguments = {
        "name": names[kernel, len(depth)],
        "num_classes": num_classes,
        "in_channels": in_channels,
        "width": width,
        "depth": depth,
        "coding": "direct",
    }
    if _SQUEEZE in state:
        hidden, T = _shape(state, _SQUEEZE, 2)
        kernel_size = _shape(state, _SPATIAL, 4)[-1]
        # A reduction beyond T leaves one hidden unit, as T does.
        arguments.update(coding="gac", T=T, reduction=max(1, T // hidden), kernel_size=kernel_size)
        arguments["name"] = f"gac_{arguments['name']}"
    return arguments


def _load_weights(net: MSResNet, state: dict[str, Tensor]) -> None:
    expected = net.state_dict()
    problems = {
        "missing keys": [key for key in expected if key not in state],
        "unknown keys": [key for key in state if key not in expected],
        "wrong shapes": [
            f"{key} {list(value.shape)} instead of {list(expected[key].shape)}"
            for key, value in state.items()
            if key in expected and value.shape != expected[key].shape
        ],
    }
    found = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise InputError("; ".join(found))
    net.load_state_dict(state)
