"""From the content of a checkpoint, ours or the authors', to the network it describes."""

import logging
import os
import re
from dataclasses import asdict
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gac.checkpoint import authors
from gac.checkpoint.format import is_ours, is_plain, name_of, read_checkpoint
from gac.coding import Coding
from gac.config import Config
from gac.errors import InputError, first_few, quoted
from gac.models import create_model
from gac.models.ms_resnet import MSResNet
from gac.models.registry import resolve_coding
from gac.neuron import PRESETS, Surrogate

logger = logging.getLogger("gac")

DEFAULT_T = 6
_SQUEEZE = "coding.gate.temporal.squeeze.weight"
_SPATIAL = "coding.gate.spatial_channel.conv1.weight"
# Where trainers (PyTorch Lightning, timm and many scripts) put the state dict among other things, in this order.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "ema")
# What wrappers put before every name: DataParallel and DistributedDataParallel, torch.compile, BatchFirst, Lightning.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class FixedT(InputError):
    """Another number of time steps was asked for than ``T``, which is part of the network."""

    def __init__(self, asked: int, kind: str, T: int) -> None:
        super().__init__(f"T={asked} was asked for, but its {kind} is made for T={T}")
        self.T = T


def load_checkpoint(
    path: str | os.PathLike | BinaryIO,
    map_location: str | torch.device = "cpu",
    T: int | None = None,
    *,
    coding: Coding | None = None,
    neuron: str | None = None,
    tau: float | None = None,
    v_threshold: float | None = None,
    surrogate: Surrogate | None = None,
    detach_reset: bool | None = None,
    num_classes: int | None = None,
    strict: bool = True,
) -> MSResNet:
    """Return the network of a checkpoint in evaluation mode; the file may be ours or the authors'.

    Args:
        path: A file of train.py, or a state dict in our or the authors' names, as it is or as wrappers (DataParallel,
            torch.compile, AveragedModel) and trainers (PyTorch Lightning, timm) save it; or a file that is open.
        map_location: Device of the network.
        T: Number of time steps for networks with direct or rate coding (gated attention, latency and phase coding are
            made for the T of training); by default the one it was trained with, or 6 where the file does not say.
        coding: For a bare state dict in our names without gated attention, whose weights do not show whether it is
            direct, rate, latency or phase.
        neuron: For a bare state dict in our names, which does not show its neurons: LIF preset. In the authors' names
            it is by default the one that they use with the network.
        tau: For a bare state dict: the neurons' constant, by default the preset's, as in
            :func:`~gac.models.registry.create_model`; and so for the next three.
        v_threshold: See tau.
        surrogate: See tau.
        detach_reset: See tau.
        num_classes: Number of classes, where it is not the file's; needs ``strict=False``.
        strict: Raise InputError unless the file's tensors are exactly the network's. If False those that are missing
            or have other shapes keep their initial values, those that are unknown are left out, and a warning names
            them.

    Raises:
        InputError: For a file that cannot be read, for missing, unknown or wrongly shaped tensors, for values that are
            not finite, and for arguments that contradict the file.
    """
    payload = read_checkpoint(path)
    try:
        network = build_network(
            payload,
            T,
            coding=coding,
            neuron=neuron,
            tau=tau,
            v_threshold=v_threshold,
            surrogate=surrogate,
            detach_reset=detach_reset,
            num_classes=num_classes,
            strict=strict,
        )
        return network.to(map_location).eval()
    except InputError as error:
        raise InputError(f"checkpoint {name_of(path)}: {error}") from error


def build_network(
    payload: dict,
    T: int | None = None,
    *,
    coding: Coding | None = None,
    neuron: str | None = None,
    tau: float | None = None,
    v_threshold: float | None = None,
    surrogate: Surrogate | None = None,
    detach_reset: bool | None = None,
    num_classes: int | None = None,
    strict: bool = True,
) -> MSResNet:
    """Return the network that a checkpoint's content describes, with its weights, on the CPU.

    Raises InputError as :func:`load_checkpoint` does, without the file's name.
    """
    constants = {"tau": tau, "v_threshold": v_threshold, "surrogate": surrogate, "detach_reset": detach_reset}
    asked = {"coding": coding, "neuron": neuron, **constants, "T": T}
    asked = {name: value for name, value in asked.items() if value is not None}
    if is_ours(payload):
        state, arguments = trained_parts(payload)
        if arguments["coding"] in ("latency", "phase") and asked.get("T", arguments["T"]) != arguments["T"]:
            raise FixedT(T, f"{arguments['coding']} coding", arguments["T"])
        for name in asked.keys() - {"T"}:
            if asked[name] != arguments[name]:
                raise InputError(f"{name}={asked[name]} was asked for, but it was trained with {arguments[name]}")
        arguments |= asked
    else:
        state, arguments = _bare_parts(payload, asked, strict)
    # The backend that the network was trained with does not matter here.
    arguments["backend"] = "auto"
    if _SQUEEZE in state and arguments["T"] != (fixed := _shape(state, _SQUEEZE, 2)[1]):
        raise FixedT(arguments["T"], "gated attention", fixed)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    # Without memory: what the file says may be absurd, and the shapes of its tensors are not.
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in create_model(**arguments).state_dict().items()}
    fitting = _fitting(shapes, state, strict)
    network = create_model(**arguments)
    network.load_state_dict(fitting, strict=False)
    return network


def read_config(payload: dict) -> Config:
    """Return the configuration in a checkpoint of our format. Raises InputError if it is missing or damaged."""
    if not isinstance(payload.get("config"), dict):
        raise InputError("its entry config is missing or damaged")
    try:
        return Config.from_dict(payload["config"])
    except InputError as error:
        raise InputError(f"its configuration: {error}") from error


def load_weights(network: MSResNet, state: object) -> None:
    """Load a state dict into its network. Raises InputError for one that does not fit, or is damaged."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    network.load_state_dict(_fitting(shapes, _checked_state(state), strict=True))


def initialise(network: MSResNet, payload: dict) -> list[str]:
    """Give a new network the weights of a checkpoint's content, and return what begins anew, in words.

    That is the head if the number of classes is another one, and the temporal attention if T is; everything else has to
    fit. Raises InputError if it does not.
    """
    state = _checked_state(payload.get("model")) if is_ours(payload) else _bare_state(payload)[0]
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    anew = []
    for prefix, what in (("head.", "the head"), ("coding.gate.temporal.", "the temporal attention")):
        names = [name for name in shapes if name.startswith(prefix)]
        if any(name in state and state[name].shape != shapes[name] for name in names):
            anew.append(what)
            state |= {name: network.state_dict()[name] for name in names}
    network.load_state_dict(_fitting(shapes, state, strict=True))
    return anew


def _bare_state(payload: dict, strict: bool = True) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors of a state dict in our names, and whether it is in our names itself."""
    state = _unwrapped(payload)
    if "stem.conv.weight" in state:
        return state, True
    # Before tensors with several names are compared, which not every type can be.
    _check_values({key: value for key, value in state.items() if authors.translate(key) is not None})
    return authors.convert(state, strict), False


def trained_parts(payload: dict) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict and the arguments of create_model that a checkpoint's content in our format holds.

    Raises InputError if one of them is missing or damaged, or they contradict each other.
    """
    for key, kind in (("model", dict), ("num_classes", int), ("in_channels", int)):
        if not isinstance(payload.get(key), kind):
            raise InputError(f"its entry {key} is missing or damaged")
    # Not all files have these.
    for key, kind in (("epoch", int), ("weights", str), ("backend", str), ("backend_reason", str)):
        if not isinstance(payload.get(key), kind | None):
            raise InputError(f"its entry {key} is damaged")
    model = read_config(payload).with_neuron().model
    arguments = (
        asdict(model)
        | {"coding": resolve_coding(model.name, model.coding)}
        | {key: payload[key] for key in ("num_classes", "in_channels")}
    )
    state = _checked_state(payload["model"])
    # A network of millions of blocks would be built for minutes before its shapes could be compared.
    inferred = _infer_arguments(state)
    for name in ("num_classes", "in_channels", "width", "depth"):
        if arguments[name] not in (None, inferred[name]):
            raise InputError(f"it says {name} {arguments[name]}, and its weights are of {name} {inferred[name]}")
    return state, arguments


def _bare_parts(payload: dict, asked: dict[str, Any], strict: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the same for a state dict, which shows only sizes; what was ``asked`` for says the rest."""
    state, in_our_names = _bare_state(payload, strict)
    arguments = _infer_arguments(state)
    gated = "gate" in arguments
    known = {"T": arguments.get("T", DEFAULT_T), "coding": "gac" if gated else "direct", "neuron": None}
    if in_our_names and not gated and "coding" not in asked:
        raise InputError(
            "its weights do not show whether it is direct, rate, latency or phase coding: say it with coding="
            " (eval.py: --model.coding)"
        )
    constants = {"tau", "v_threshold", "surrogate", "detach_reset"}
    if in_our_names and "neuron" not in asked and not constants <= asked.keys():
        raise InputError(
            "its weights do not show its neurons: say which preset they have with neuron= (eval.py: --model.neuron),"
            f" {' or '.join(PRESETS)}, or give tau, v_threshold, surrogate and detach_reset"
        )
    if (gated or not in_our_names) and asked.get("coding", known["coding"]) != known["coding"]:
        raise InputError(f"coding={asked['coding']} was asked for, but its weights are those of {known['coding']}")
    if "T" not in arguments and "T" not in asked:
        logger.warning("a state dict does not say everything: assuming T=%d", DEFAULT_T)
    return state, arguments | known | asked


def _unwrapped(payload: dict) -> dict[str, Tensor]:
    """Return the state dict in what a trainer saved, without what wrappers add to its names."""
    state: Any = payload
    while found := [key for key in _CONTAINERS if isinstance(state, dict) and isinstance(state.get(key), dict)]:
        if len(found) > 1:
            logger.warning("the file holds %s: using %s", " and ".join(found), found[0])
        state = state[found[0]]
    state = _checked_state(state)
    while True:
        # torch.optim.swa_utils.AveragedModel counts its updates; a wrapper around it names the count, too.
        state = {key: value for key, value in state.items() if key != "n_averaged"}
        prefix = next((p for p in _PREFIXES if state and all(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    # torch.compile of a part renames only that part.
    return {key.replace("._orig_mod.", "."): value for key, value in state.items()}


def _checked_state(state: object) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not state:
        raise InputError("holds nothing" if state == {} else "holds no state dict")
    others = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise InputError(
            f"expected a file of train.py or a state dict of tensors, got other entries:"
            f" {first_few([key if isinstance(key, str) else quoted(key) for key in others])}"
        )
    for name, value in state.items():
        if not is_plain(value):
            raise InputError(f"{name} is no plain tensor ({value.layout}, {value.dtype})")
        # A stride of 0 makes any size of a few bytes.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"{name} has shape {list(value.shape)}, more than the file holds")
    return dict(state)


def _shape(state: dict[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in state:
        raise InputError(f"not a checkpoint of these networks, missing keys: {key}")
    shape = tuple(state[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise InputError(f"wrong shapes: {key} {list(shape)}, expected {dimensions} dimensions, none of them 0")
    return shape


def _infer_arguments(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of create_model that the names and shapes of our state dict imply."""
    width, in_channels, kernel, _ = _shape(state, "stem.conv.weight", 4)
    num_classes, _ = _shape(state, "head.weight", 2)
    blocks = {match.groups() for key in state if (match := re.match(r"stages\.(\d+)\.(\d+)\.", key))}
    stages = sorted({int(stage) for stage, _ in blocks})
    depth = [sum(int(s) == stage for s, _ in blocks) for stage in stages]
    # Max-ResNet's sizes are those of MS-ResNet, with pooling behind a block's first convolution.
    pooled = any(re.match(r"stages\.\d+\.0\.conv1\.0\.", key) for key in state)
    names = {
        (3, 3): "maxresnet18_cifar" if pooled else "msresnet18_cifar",
        (7, 4): "msresnet34" if depth == [3, 4, 6, 3] else "msresnet18",
        (3, 4): "msresnet104",
    }
    if (kernel, len(depth)) not in names:
        raise InputError(
            f"not a checkpoint of these networks: the stem has a {kernel}x{kernel} kernel and there are {len(depth)}"
            " stages, expected 3x3 and 3 (CIFAR), 7x7 and 4 (ImageNet) or 3x3 and 4 (MS-ResNet-104)"
        )
    arguments = {
        "name": names[kernel, len(depth)],
        "num_classes": num_classes,
        "in_channels": in_channels,
        "width": width,
        "depth": depth,
    }
    if _SQUEEZE in state:
        hidden, T = _shape(state, _SQUEEZE, 2)
        # Any reduction above T leaves one hidden unit, just as T itself does.
        arguments.update(T=T, reduction=max(1, T // hidden))
    if _SPATIAL in state:
        arguments["kernel_size"] = _shape(state, _SPATIAL, 4)[-1]
    if attentions := [name for name, key in (("temporal", _SQUEEZE), ("spatial_channel", _SPATIAL)) if key in state]:
        arguments.update(name=f"gac_{arguments['name']}", gate=attentions[0] if len(attentions) == 1 else "both")
    return arguments


def _fitting(shapes: dict[str, torch.Size], state: dict[str, Tensor], strict: bool) -> dict[str, Tensor]:
    """Return the tensors that fit a network whose tensors have these shapes; raises InputError if not all do.

    Without ``strict`` a warning names the others.
    """
    wrong = {key for key, value in state.items() if key in shapes and value.shape != shapes[key]}
    problems = {
        "missing keys": [key for key in shapes if key not in state],
        "unknown keys": [key for key in state if key not in shapes],
        "wrong shapes": [f"{key} {list(state[key].shape)} instead of {list(shapes[key])}" for key in sorted(wrong)],
    }
    found = "; ".join(f"{kind}: {first_few(keys)}" for kind, keys in problems.items() if keys)
    if found and strict:
        raise InputError(found)
    if found:
        logger.warning("not loaded, %s", found)
    fitting = {key: value for key, value in state.items() if key in shapes and key not in wrong}
    _check_values(fitting)
    return fitting


def _check_values(state: dict[str, Tensor]) -> None:
    """Raise InputError for weights of no real type and for numbers that no training leaves behind."""
    for name, value in state.items():
        is_count = name.endswith("num_batches_tracked")
        if value.dtype not in _FLOATS and not (is_count and value.dtype in _INTEGERS):
            raise InputError(f"{name} is {value.dtype}, expected a floating-point type of 16, 32 or 64 bits")
        if not value.isfinite().all():
            raise InputError(f"{name} holds values that are not finite")
        if (is_count or name.endswith("running_var")) and value.min() < 0:
            raise InputError(f"{name} holds values below 0, which no {'count' if is_count else 'variance'} has")
