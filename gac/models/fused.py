"""The fused execution of an MS-ResNet: its modules and parameters, several layers of them in one pass over memory.

Every LIF layer but the first follows something that the same kernel can compute: a BatchNorm (inside a block), a
residual sum with its BatchNorms (between blocks) or the gate. So the network is walked not block by block but from
convolution to convolution, and a block's end computes the spikes of the next block's beginning.

The modules themselves (:mod:`gac.models.ms_resnet`) are the specification, and what runs wherever this cannot.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from gac.coding.gated import GatedAttentionCoding, GatedAttentionUnit
from gac.models.batch_norm import BatchNorm2d, running_inverse_stds
from gac.models.blocks import ConvNorm, MSBlock
from gac.models.recompute import recomputed
from gac.neuron import HALF_PRECISION, LIFNode
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.channels import MAX_T
from gac.ops.event_conv import event_conv2d
from gac.ops.gate_lif import gate_lif
from gac.ops.norm_lif import norm_lif
from gac.ops.overlap import conv2d, is_overlapped
from gac.ops.residual_lif import residual_lif
from gac.ops.residual_lif_pool import residual_lif_pool

_log = logging.getLogger("gac")

_HOOKS = "has hooks or a forward of its own, which need its call"
_GLOBAL_HOOKS = "runs under hooks on all modules"
_IN_TORCH = "runs in torch"

Obstacle = tuple[nn.Module, str]
"""A module that keeps a network from the fused execution, and why."""


def obstacle(net: nn.Module, x: Tensor) -> Obstacle | None:
    """Return why the fused execution would not compute what calling the modules of ``net``, an MSResNet, on ``x`` does.

    None where it would. It would not where the modules are not the ones it knows, for more than 16 time steps, in step
    mode "s", and where someone has a hook on a module that it would not call. Only LIF layers may have hooks: those
    are called.
    """
    if net.step_mode != "m":
        return net, "runs step by step"
    if net.T > MAX_T:
        return net, f"has more than {MAX_T} time steps"
    if _global_hooks():
        return net, _GLOBAL_HOOKS
    for stage in net.stages:
        if found := _obstacle(stage, nn.Sequential):
            return found
        for block in stage:
            if found := _obstacle_in_block(block):
                return found
    return _obstacle_in_neurons([*_neurons(net)], x)


def explain(net: nn.Module, found: Obstacle | None, x: Tensor) -> str:
    """Return why layers run one by one, in words; "" where they do not, where the choice of a backend says it, and for
    a network of ReLUs."""
    if found is None or found[1] == _IN_TORCH or type(net.lif) is nn.ReLU:
        return ""
    # Whatever else is in the way: without it they would run one by one as well.
    if type(net.lif) is LIFNode and net.lif.backend in ("auto", "torch") and not net.lif.runs_kernels(x):
        return ""
    module, reason = found
    name = next((name for name, each in net.named_modules() if each is module and name), "the network")
    return f"layers run one by one, more slowly, because {name} {reason}"


def report(net: nn.Module, found: Obstacle, x: Tensor) -> None:
    """Log an obstacle once, as a warning on a CUDA device; but hooks, as whoever has them asks for the calls."""
    if found[1] not in (_HOOKS, _GLOBAL_HOOKS) and (explanation := explain(net, found, x)):
        _log_once(x.device.type, explanation)


@functools.cache
def _log_once(device_type: str, explanation: str) -> None:
    _log.log(logging.WARNING if device_type == "cuda" else logging.INFO, "%s: %s", device_type, explanation)


def _obstacle_in_neurons(neurons: list[LIFNode], x: Tensor) -> Obstacle | None:
    for neuron in neurons:
        if type(neuron) is not LIFNode:
            return neuron, f"is of class {type(neuron).__name__}, not gac's LIFNode"
        if not _starts_reset(neuron):
            return neuron, "starts from another membrane potential than a spike leaves"
    if not torch.compiler.is_compiling():
        # One neuron of each kind is asked: for one input the answer depends on nothing else.
        neurons = [*{_kind(neuron): neuron for neuron in neurons}.values()]
    for neuron in neurons:
        # In half precision the neuron itself takes backend "c", and nothing else does.
        if (neuron.backend == "c" and x.dtype in HALF_PRECISION) or not neuron.runs_kernels(x):
            return neuron, _IN_TORCH
    return None


def _starts_reset(neuron: LIFNode) -> bool:
    """Return whether a neuron starts from the potential that a spike leaves, as it does in the kernels."""
    # SpikingJelly keeps both apart: each can be set by itself later on.
    members = neuron.__dict__
    start = members["_memories_rv"]["v"]
    return type(start) is float and start == (members["v_reset"] or 0.0)


def _kind(neuron: LIFNode) -> tuple:
    function = neuron.__dict__["_modules"].get("surrogate_function") or neuron.surrogate_function
    alpha, spiking = getattr(function, "alpha", None), getattr(function, "spiking", None)
    plain = type(alpha) is float and type(spiking) is bool
    return neuron.backend, type(function), (alpha, spiking) if plain else id(function)


def forward(net: nn.Module, x: Tensor) -> Tensor:
    """Return the logits [T, B, K] of ``net``, an MSResNet, for images [B, C, H, W] or a sequence [T, B, C, H, W]."""
    blocks = [block for stage in net.stages for block in stage]
    running = _running_inverse_stds(blocks)
    membrane, spikes = _encode(net, x, blocks[0].lif1)
    for (block, following), inverse_stds in zip(pairwise(blocks), running, strict=False):
        membrane, spikes = _block(block, inverse_stds, membrane, spikes, _membrane_and_spikes, following.lif1)
    last = blocks[-1], running[-1], membrane, spikes
    if _runs_by_itself(net.lif):
        rates = net.lif(_block(*last, _membrane)).mean((-2, -1))
    else:
        rates = _block(*last, _firing_rates, net.lif)
    return net.head(net.dropout(rates))


_InverseStds = list[Tensor | None]


def _running_inverse_stds(blocks: list[MSBlock]) -> list[_InverseStds]:
    """Return those of each block's BatchNorms: of the first convolution, the second, and the shortcut if it has one."""
    norms = [[_norm(layer) for layer in _convolutions(block)] for block in blocks]
    found = iter(running_inverse_stds([norm for of_block in norms for norm in of_block]))
    return [[next(found) for _ in of_block] for of_block in norms]


def _convolutions(block: MSBlock) -> list[ConvNorm]:
    modules = block.__dict__["_modules"]
    return [modules[name] for name in ("conv1", "conv2", "shortcut") if type(modules[name]) is not nn.Identity]


def _norm(layer: ConvNorm) -> nn.Module:
    return layer.__dict__["_modules"]["norm"]


def _encode(net: nn.Module, x: Tensor, following: LIFNode) -> tuple[Tensor, Tensor]:
    """Return the first block's input and the spikes of its first LIF layer."""
    coding = net.coding
    # The C kernels are float32, under autocast too.
    in_c = following.chosen_backend(x) == "c"
    if x.dim() == 4 and type(coding) is GatedAttentionCoding and _gate_fuses(coding, following):
        frame = net.stem(x, repeats=net.T)
        temporal, spatial = coding.gate.temporal(frame), coding.gate.spatial_channel(frame)
        if in_c:
            frame, spatial = frame.float(), spatial.float()
        return gate_lif(frame, temporal, spatial, following.kernel_parameters())
    membrane = net.encode(x).float() if in_c else net.encode(x)
    return membrane, following(membrane)


def _gate_fuses(coding: GatedAttentionCoding, following: LIFNode) -> bool:
    separate = _runs_by_itself(coding.lif) or _runs_by_itself(following)
    own = type(coding.gate) is GatedAttentionUnit
    return own and not (separate or _hooked(coding) or _hooked(coding.gate)) and _same_neuron(coding.lif, following)


# What a block's end adds up: output and BatchNorm of its last convolution, and its shortcut, perhaps with a BatchNorm.
_Sum = tuple[Tensor, BatchNormTransform, Tensor, BatchNormTransform | None]


def _block(
    block: MSBlock,
    inverse_stds: _InverseStds,
    membrane: Tensor,
    spikes: Tensor,
    end: Callable[..., Any],
    *following: LIFNode,
) -> Any:
    """Return what ``end`` makes of what the block adds up and, if one is given, of the LIF layer that follows."""
    if not (block.checkpoint_activations and torch.is_grad_enabled()):
        return end(_run_to_sum(block, inverse_stds, membrane, spikes), *following)
    return recomputed(
        lambda membrane, spikes: end(_run_to_sum(block, inverse_stds, membrane, spikes), *following),
        [block, *following],
        membrane,
        spikes,
    )


def _run_to_sum(block: MSBlock, inverse_stds: _InverseStds, membrane: Tensor, spikes: Tensor) -> _Sum:
    conv1, lif2, conv2, projection = block.conv1, block.lif2, block.conv2, block.shortcut
    y = _convolve(spikes, conv1.conv)
    if _runs_by_itself(lif2):
        spikes = lif2(functional.seq_to_ann_forward(y, conv1.norm))
    else:
        spikes = norm_lif(y, conv1.norm.normalization(y, inverse_stds[0]), lif2.kernel_parameters())
    y = _convolve(spikes, conv2.conv)

    shortcut, shortcut_normalization = membrane, None
    if not isinstance(projection, nn.Identity):
        shortcut = _convolve_shortcut(membrane, projection.conv)
        shortcut_normalization = projection.norm.normalization(shortcut, inverse_stds[2])
    return y, conv2.norm.normalization(y, inverse_stds[1]), shortcut, shortcut_normalization


def _membrane(of: _Sum) -> Tensor:
    return residual_lif(*of, None)[0]


def _membrane_and_spikes(of: _Sum, following: LIFNode) -> tuple[Tensor, Tensor]:
    if _runs_by_itself(following):
        membrane = _membrane(of)
        return membrane, following(membrane)
    return residual_lif(*of, following.kernel_parameters())


def _firing_rates(of: _Sum, last: LIFNode) -> Tensor:
    return residual_lif_pool(*of, last.kernel_parameters())


def _convolve(spikes: Tensor, conv: nn.Module) -> Tensor:
    """Return a convolution of spikes [T, B, C, H, W]: on the CPU by events, if nothing else would run."""
    plain = _bypassable(conv, nn.Conv2d) and conv.bias is None and conv.groups == 1 and conv.dilation == (1, 1)
    uniform = plain and conv.padding_mode == "zeros" and len({*conv.stride}) == 1 and len({*conv.padding}) == 1
    if not uniform:
        return functional.seq_to_ann_forward(spikes, conv).to(spikes.dtype)
    convolve = conv2d if is_overlapped(conv.weight) else event_conv2d
    y = convolve(spikes.flatten(0, 1), conv.weight, conv.stride[0], conv.padding[0])
    return y.unflatten(0, spikes.shape[:2]).to(spikes.dtype)


def _convolve_shortcut(membrane: Tensor, conv: nn.Module) -> Tensor:
    plain = _bypassable(conv, nn.Conv2d) and conv.bias is None and conv.groups == 1
    plain = plain and (conv.kernel_size, conv.padding) == ((1, 1), (0, 0))
    if membrane.device.type == "cpu" and plain:
        # Only of the pixels that a stride leaves: oneDNN's weight gradient of a strided 1 x 1 convolution writes out of
        # bounds in channels_last (docs/performance.md).
        read = membrane.flatten(0, 1)[..., :: conv.stride[0], :: conv.stride[1]]
        return conv2d(read, conv.weight).unflatten(0, membrane.shape[:2]).to(membrane.dtype)
    if plain and is_overlapped(conv.weight):
        y = conv2d(membrane.flatten(0, 1), conv.weight, conv.stride)
        return y.unflatten(0, membrane.shape[:2]).to(membrane.dtype)
    return functional.seq_to_ann_forward(membrane, conv).to(membrane.dtype)


def _same_neuron(a: LIFNode, b: LIFNode) -> bool:
    return a.lif_parameters().flatten() == b.lif_parameters().flatten()


def _runs_by_itself(neuron: LIFNode) -> bool:
    return neuron.store_v_seq or _any_hooked(neuron)


def _any_hooked(module: nn.Module) -> bool:
    if _hooked(module):
        return True
    children = module.__dict__["_modules"].values()
    return any(child is not None and _any_hooked(child) for child in children)


def _neurons(net: nn.Module) -> Iterator[LIFNode]:
    if isinstance(net.coding, GatedAttentionCoding):
        yield net.coding.lif
    for stage in net.stages:
        for block in stage:
            modules = block.__dict__["_modules"]
            yield modules["lif1"]
            yield modules["lif2"]
    yield net.lif


def _obstacle_in_block(block: nn.Module) -> Obstacle | None:
    """Return why a block and its layers need be called: others than this package's run as they were written."""
    if found := _obstacle(block, MSBlock):
        return found
    shortcut, layers = block.__dict__["_modules"]["shortcut"], _convolutions(block)
    if type(shortcut) is nn.Identity and _hooked(shortcut):
        return shortcut, _HOOKS
    for layer in layers:
        if type(layer) is nn.Sequential and any(isinstance(each, nn.MaxPool2d | nn.AvgPool2d) for each in layer):
            return block, "makes its maps smaller by pooling, which the fused execution does not have"
        if found := _obstacle(layer, ConvNorm) or _obstacle_in_norm(_norm(layer)):
            return found
    norms = [_norm(layer) for layer in layers[1:]]
    if len({(norm.training, norm.synchronized) for norm in norms}) != 1:
        # The kernel of the residual sum takes both of its BatchNorms in one mode.
        return block, "has one of its last two BatchNorms in training and one in evaluation mode, or one synchronized"
    return None


def _obstacle(module: nn.Module, kind: type[nn.Module]) -> Obstacle | None:
    """Return why something but ``kind.forward`` would run if ``module`` were called."""
    if type(module) is not kind:
        return module, f"is of class {type(module).__name__}, not {kind.__module__.partition('.')[0]}'s {kind.__name__}"
    return (module, _HOOKS) if _hooked(module) else None


def _bypassable(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether nothing but ``kind.forward`` would run if ``module`` were called."""
    return _obstacle(module, kind) is None


def _obstacle_in_norm(norm: nn.Module) -> Obstacle | None:
    """Return why the kernels cannot apply a BatchNorm, such as a converted SyncBatchNorm or a half-precision one."""
    if found := _obstacle(norm, BatchNorm2d):
        return found
    if norm.momentum is None or not norm.track_running_stats:
        return norm, "has no momentum or does not track running statistics"
    parameters, buffers = norm._parameters, norm._buffers
    batches = buffers.get("num_batches_tracked")
    if not (
        _is_float32(parameters.get("weight"))
        and _is_float32(parameters.get("bias"))
        and _is_float32(buffers.get("running_mean"))
        and _is_float32(buffers.get("running_var"))
        and (batches is None or batches.dtype is torch.int64)
    ):
        return norm, "has no float32 weight, bias and running statistics"
    return None


def _is_float32(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype is torch.float32


def _hooked(module: nn.Module) -> bool:
    """Return whether a call of a module does more than its class says: it has hooks, or a forward of its own."""
    # Not by attribute, here and where modules are walked: nn.Module's take several times as long to find.
    members = module.__dict__
    return bool(
        "forward" in members
        or members["_forward_hooks"]
        or members["_forward_pre_hooks"]
        or members["_backward_hooks"]
        or members["_backward_pre_hooks"]
    )


def _global_hooks() -> bool:
    registry: dict[str, Callable] = nn.modules.module.__dict__
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(registry[f"_global_{kind}"] for kind in kinds)
