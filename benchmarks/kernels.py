"""python -m benchmarks.kernels: time and bandwidth of each fused operation, beside SpikingJelly and torch's layers.

An operation is one entry of ``OPERATIONS``. Its bytes are those of everything that has to be read or written by passes
whose intermediate results stay in registers; vectors of one value for each channel or image do not count.
"""

import math
import sys
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from benchmarks import common, plot
from benchmarks.candidates import IMPLEMENTATIONS, REFERENCE, neurons, record_inputs
from benchmarks.common import (
    BY_DTYPE,
    PRECISIONS,
    Difference,
    MeasurementError,
    NetworkSize,
    Timing,
    at_least,
    or_out_of_memory,
)
from gac.errors import InputError
from gac.models.batch_norm import BatchNorm2d
from gac.models.blocks import MSBlock
from gac.models.ms_resnet import MSResNet
from gac.neuron import PRESETS
from gac.ops import batch_norm, gate_lif, lif, lif_pool, norm_lif, residual_lif
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.neuron import LIFParameters

METHOD = (
    "Each operation runs on noise of the sizes that it meets in the network. GB/s are the bytes that it has to move"
    " (formulas in benchmarks/kernels.py) over the median time of a call, and their share of what torch's copy of a"
    " large tensor reaches. On a GPU a call's time is a CUDA graph's of many calls, through more tensors than its cache"
    " holds. The peer is SpikingJelly's neuron with torch's layers on the same tensors, in turns."
)
DTYPES = {precision.dtype_name: precision.dtype for precision in PRECISIONS.values()}
GATE_BATCH = 2
STREAM = ("membrane stream", "spikes")
EPS = 1e-5
# A replay is long against what its launch and its events cost.
REPLAY_SECONDS = 2e-3
MOST_CALLS = 256
# Successive calls get other tensors until this many times the second-level cache has gone by.
CACHES = 3
MOST_COPIES = 32
# Far beyond the caches of either.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
TABLE = common.Table(
    *(("operation", 16), ("T, B, C, H, W", 21), ("layers", 6), ("dtype", 8), ("pass", 8), ("MB", 8), ("ours us", 13)),
    *(("[quartiles]", 20), ("GB/s", 7), ("of copy", 7), ("peer us", 13), ("peer / ours", 11)),
)
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """Where an operation runs: activations [T, B, C, H, W] of some type and the constants of "cifar" or "imagenet".

    With ``kernels`` ours are the CUDA kernels; else their references in torch, which the operations are on a CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    family: str
    device: torch.device
    kernels: bool

    @property
    def neuron(self) -> LIFParameters:
        """The neuron, as the operations take it."""
        return PRESETS[self.family]

    def spikes(self, x: Tensor) -> Tensor:
        """Return the spikes that the neuron's specification gives."""
        return lif.reference(x, 0.0, self.neuron)[0]

    def spikingjelly(self, x: Tensor) -> Tensor:
        """Return the spikes of SpikingJelly's fastest execution: its state in float32, which its kernels need."""
        neuron = self.neuron
        v = torch.zeros_like(x[0], dtype=torch.float32, requires_grad=False)
        constants = (neuron.tau, False, neuron.v_threshold, 0.0, neuron.surrogate, neuron.detach_reset)
        return functional.lif_multi_step(x, v, *constants)[0]

    def frame(self, count: int | None = None) -> Tensor:
        """Return noise [B, C, H, W] in channels_last."""
        noise = torch.randn(count or self.shape[1], *self.shape[2:], device=self.device)
        return noise.to(self.dtype, memory_format=torch.channels_last).requires_grad_()

    def sequence(self) -> Tensor:
        """Return noise [T, B, C, H, W] whose frames are channels_last."""
        return self.frame(self.shape[0] * self.shape[1]).detach().unflatten(0, self.shape[:2]).requires_grad_()

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of a BatchNorm, [C]."""
        weight, bias = 0.2 * torch.randn(2, self.shape[2], device=self.device)
        return (1 + weight).requires_grad_(), bias.detach().requires_grad_()

    def normalization(self, y: Tensor, weight: Tensor, bias: Tensor) -> BatchNormTransform:
        """Return the BatchNorm of ``y`` as the operations take it; that of the references is differentiable."""
        if self.kernels:
            mean, scale = batch_norm.statistics(batch_norm.batch_moments(y.detach()), EPS)
        else:
            mean, variance, _ = batch_norm.reference_moments(y)
            scale = (variance + EPS).rsqrt()
        return BatchNormTransform(weight, bias, mean, scale, from_batch=True)

    def stored(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the dtype as the operations store it; the gradient passes as it is."""
        return x + (x.to(self.dtype).to(x.dtype) - x).detach()


def _torch_batch_norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    frames = y.flatten(0, 1)
    return F.batch_norm(frames, None, None, weight, bias, training=True, eps=EPS).unflatten(0, y.shape[:2])


def _torch_moments(layer: Layer, y: Tensor) -> Named:
    variance, mean = torch.var_mean(y.float(), (0, 1, 3, 4), correction=0)
    count = y.numel() // y.shape[2]
    return {"moments": torch.stack((mean, variance, variance * (count / (count - 1))))}


def _residual_inputs(shortcut_norm: bool, layer: Layer) -> Named:
    names = ("y", "weight", "bias", "shortcut", "shortcut weight", "shortcut bias")
    tensors = (layer.sequence(), *layer.affine(), layer.sequence(), *(layer.affine() if shortcut_norm else ()))
    return dict(zip(names, tensors, strict=False))


def _residual(
    layer: Layer, function: Callable, y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, *affine: Tensor
) -> Named:
    norm_of_shortcut = layer.normalization(shortcut, *affine) if affine else None
    arguments = (y, layer.normalization(y, weight, bias), shortcut, norm_of_shortcut)
    if y.dtype == layer.dtype:
        return dict(zip(STREAM, function(*arguments, layer.neuron), strict=True))
    membrane = layer.stored(function(*arguments, None)[0])
    return dict(zip(STREAM, (membrane, layer.spikes(membrane)), strict=True))


def _last_residual(
    layer: Layer, function: Callable, y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor
) -> Named:
    return {STREAM[0]: function(y, layer.normalization(y, weight, bias), shortcut, None, None)[0]}


def _residual_peer(layer: Layer, y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, *affine: Tensor) -> Named:
    added = _torch_batch_norm(shortcut, *affine) if affine else shortcut
    membrane = _torch_batch_norm(y, weight, bias) + added
    return {STREAM[0]: membrane, STREAM[1]: layer.spikingjelly(membrane)}


def _gate_inputs(layer: Layer) -> Named:
    temporal = torch.randn(layer.shape[:2], device=layer.device).requires_grad_()
    return {"x": layer.frame(), "temporal": temporal, "spatial": layer.frame()}


def _gate(layer: Layer, function: Callable, *inputs: Tensor) -> Named:
    if inputs[0].dtype == layer.dtype:
        return dict(zip(STREAM, function(*inputs, layer.neuron), strict=True))
    return _gated(layer.spikes, layer.stored, *inputs)


def _gated(fire: Callable, store: Callable, x: Tensor, temporal: Tensor, spatial: Tensor) -> Named:
    gate = torch.sigmoid(temporal.to(x.dtype)[:, :, None, None, None] * spatial)
    membrane = store(gate * fire(x.expand(len(temporal), *x.shape)))
    return {STREAM[0]: membrane, STREAM[1]: fire(membrane)}


def _blocks(network: MSResNet) -> list[MSBlock]:
    return [block for stage in network.stages for block in stage]


def _norms_before_next_block(shortcut_norm: bool, network: MSResNet) -> list[nn.Module]:
    inner = _blocks(network)[:-1]
    return [block.conv2.norm for block in inner if isinstance(block.shortcut, nn.Identity) != shortcut_norm]


@dataclass(frozen=True)
class FusedOperation:
    """A fused operation.

    Args:
        summary: What it does, in a few words.
        modules: The modules of the network whose input has the shape of its activations.
        functions: The operation and its reference.
        inputs: Makes its tensors, by name, for a layer; those that are differentiated require gradients.
        call: Calls a function for a layer on the tensors; float64 ones are rounded where the operation stores results.
        peer: The same from SpikingJelly's functions and torch's.
        bytes: What the forward and the backward pass have to move, in sequences [T, B, C, H, W] and in frames.
    """

    summary: str
    modules: Callable[[MSResNet], Sequence[nn.Module]]
    functions: tuple[Callable, Callable]
    inputs: Callable[[Layer], Named]
    call: Callable[..., Named]
    peer: Callable[..., Named]
    bytes: tuple[tuple[float, float], tuple[float, float]]


def _residual_bytes(shortcut_norm: bool, spiking: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    # Forward: read y for its statistics, and a normalised shortcut for its own; read both, write the membrane stream
    # and the spikes.
    forward = 4 + shortcut_norm + spiking
    # Backward sums: read y, the gradient of the membrane stream, and a normalised shortcut; with spikes the membrane
    # stream and the gradient of the spikes too, which makes another total gradient to write.
    sums = 2 + shortcut_norm + 3 * spiking
    # Read the total gradient and y (and the shortcut); write the gradient of y (and of the shortcut).
    return (forward, 0), (sums + 3 + 2 * shortcut_norm, 0)


def _residual_lif(summary: str, shortcut_norm: bool) -> FusedOperation:
    modules, inputs = partial(_norms_before_next_block, shortcut_norm), partial(_residual_inputs, shortcut_norm)
    functions = (residual_lif.residual_lif, residual_lif.reference)
    moved = _residual_bytes(shortcut_norm, spiking=True)
    return FusedOperation(summary, modules, functions, inputs, _residual, _residual_peer, moved)


OPERATIONS = {
    "lif": FusedOperation(
        "LIF neuron",
        neurons,
        (lif.lif, lif.reference),
        lambda layer: {"x": layer.sequence()},
        lambda layer, function, x: {"spikes": function(x, 0.0, layer.neuron)[0]},
        lambda layer, x: {"spikes": layer.spikingjelly(x)},
        # Read x; write spikes (and the last membrane potential, see Case). Read x and the spikes' gradient; write x's.
        ((2, 0), (3, 0)),
    ),
    "batch_statistics": FusedOperation(
        "mean and variance of each channel",
        lambda network: [module for module in network.stages.modules() if isinstance(module, BatchNorm2d)],
        (batch_norm.batch_moments, batch_norm.reference_moments),
        lambda layer: {"y": layer.sequence().detach()},
        lambda layer, function, y: {"moments": function(y)},
        _torch_moments,
        # Read y. The backward pass is part of the operation that normalises.
        ((1, 0), (0, 0)),
    ),
    "norm_lif": FusedOperation(
        "BatchNorm with its statistics, LIF neuron",
        lambda network: [block.lif2 for block in _blocks(network)],
        (norm_lif.norm_lif, norm_lif.reference),
        lambda layer: dict(zip(("y", "weight", "bias"), (layer.sequence(), *layer.affine()), strict=True)),
        lambda layer, function, y, *affine: {"spikes": function(y, layer.normalization(y, *affine), layer.neuron)},
        lambda layer, *inputs: {"spikes": layer.spikingjelly(_torch_batch_norm(*inputs))},
        # Statistics: read y. Read y; write spikes. Sums: read y and the gradient of the spikes. Read both; write y's.
        ((3, 0), (5, 0)),
    ),
    "residual_lif": _residual_lif(
        "BatchNorm with its statistics, residual sum, the next block's LIF neuron", shortcut_norm=False
    ),
    "residual_norm_lif": _residual_lif("the same with a shortcut that has a BatchNorm too", shortcut_norm=True),
    "residual": FusedOperation(
        "BatchNorm with its statistics and residual sum of the last block",
        lambda network: [_blocks(network)[-1].conv2.norm],
        (residual_lif.residual_lif, residual_lif.reference),
        partial(_residual_inputs, False),
        _last_residual,
        lambda layer, y, weight, bias, shortcut: {STREAM[0]: _torch_batch_norm(y, weight, bias) + shortcut},
        _residual_bytes(shortcut_norm=False, spiking=False),
    ),
    "gate_lif": FusedOperation(
        "LIF neuron of the coding, gate, LIF neuron of the first block",
        lambda network: [_blocks(network)[0].lif1],
        (gate_lif.gate_lif, gate_lif.reference),
        _gate_inputs,
        _gate,
        lambda layer, *inputs: _gated(layer.spikingjelly, lambda membrane: membrane, *inputs),
        # Read a frame of x and of spatial; write the membrane stream and the spikes. Read both frames and the gradients
        # of the membrane stream and the spikes; write the gradients of both frames.
        ((2, 2), (2, 4)),
    ),
    "lif_pool": FusedOperation(
        "last LIF neuron, average over pixels",
        lambda network: [network.lif],
        (lif_pool.lif_pool, lif_pool.reference),
        lambda layer: {"x": layer.sequence()},
        lambda layer, function, x: {"firing rates": function(x, layer.neuron)},
        lambda layer, x: {"firing rates": layer.spikingjelly(x).mean((-2, -1))},
        # Read x. Read x; write its gradient.
        ((1, 0), (2, 0)),
    ),
}


class Case:
    """An operation on tensors of one layer: ours, the float64 reference and the peer, and the bytes of each pass."""

    def __init__(self, name: str, layer: Layer) -> None:
        operation = OPERATIONS[name]
        self.inputs = operation.inputs(layer)
        self.ours = partial(operation.call, layer, operation.functions[0 if layer.kernels else 1])
        self.reference = partial(operation.call, replace(layer, kernels=False), operation.functions[1])
        self.peer = partial(operation.peer, layer)
        frame = math.prod(layer.shape[1:])
        per_frame = frame * layer.dtype.itemsize
        forward, backward = ((layer.shape[0] * sequences + frames) * per_frame for sequences, frames in operation.bytes)
        # The last membrane potential, float32.
        self.forward_bytes, self.backward_bytes = forward + (4 * frame if name == "lif" else 0), backward


@cache
def sites(name: str, size: NetworkSize) -> Counter[tuple[int, ...]]:
    """Return how many layers of the network have each of the shapes [C, H, W] that the operation meets."""
    network = REFERENCE.build(size, 1)
    inputs = record_inputs(network, OPERATIONS[name].modules(network), size.image_size)
    return Counter(tuple(x.shape[-3:]) for x in inputs)


def check_operations(
    names: Sequence[str],
    size: NetworkSize,
    T: int,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    batch: int = GATE_BATCH,
    peers: bool = True,
) -> list[tuple[str, Difference]]:
    """Compare ours, and in float32 the peer, with the float64 reference at all sizes but the batch.

    Raises MeasurementError if something differs by more than its limit.
    """
    torch.manual_seed(0)
    checked = []
    for name, dtype in product(names, dtypes):
        for image in sites(name, size):
            shape = (T, min(batch, GATE_BATCH), *image)
            case = Case(name, Layer(shape, dtype, size.family, device, kernels=device.type == "cuda"))
            # In half precision membranes on the threshold are common; SpikingJelly fires there, the original does not.
            runs = {"ours": case.ours} | ({"peer": case.peer} if peers and dtype == torch.float32 else {})
            for who, function in runs.items():
                what = f"{name}, {who}, {list(shape)}, {BY_DTYPE[dtype].dtype_name}"
                for each in common.compare(function, case.reference, case.inputs):
                    if not each.within:
                        off = f"{each.quantity} is off by {each.difference:.1e}, limit {each.limit:.0e}"
                        raise MeasurementError(f"{what}: {off}; nothing was timed")
                    checked.append((what, each))
    return checked


@dataclass(frozen=True)
class Row:
    """One direction of an operation at one shape, that of ``layers`` layers; timings are None where memory ran out."""

    operation: str
    shape: tuple[int, ...]
    layers: int
    dtype: str
    direction: str
    bytes: int
    ours: Timing | None
    peer: Timing | None

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second of ours at the median."""
        return None if self.ours is None else 1000 * self.bytes / self.ours.median_ms

    def print(self, copied: float) -> None:
        """Print it as a row of TABLE; ``copied`` are the bytes per second of a copy."""
        row = [self.operation, ", ".join(map(str, self.shape)), str(self.layers), self.dtype, self.direction]
        row.append(f"{self.bytes / 1e6:.3g}")
        if self.ours is None:
            row += ["out of memory", "-", "-", "-"]
        else:
            low, high = (f"{1000 * ms:.1f}" for ms in self.ours.quartiles_ms)
            row += [f"{1000 * self.ours.median_ms:.1f}", f"[{low}, {high}]"]
            row += [f"{self.bandwidth / 1e9:.3g}", f"{100 * self.bandwidth / copied:.3g} %"]
        row.append("out of memory" if self.peer is None else f"{1000 * self.peer.median_ms:.1f}")
        both = self.ours is not None and self.peer is not None
        TABLE.row(*row, f"{self.peer.median_ms / self.ours.median_ms:.2f}" if both else "-")

    def as_json(self, copied: float) -> dict[str, Any]:
        """Return everything measured: bytes, milliseconds, bytes per second."""
        row = {"operation": self.operation, "shape": self.shape, "layers": self.layers, "dtype": self.dtype}
        row |= {"pass": self.direction, "bytes": self.bytes}
        timings = {"ours": self.ours, "peer": self.peer}
        row |= {who: "out of memory" if timing is None else timing.as_json() for who, timing in timings.items()}
        share = None if self.bandwidth is None else self.bandwidth / copied
        return {**row, "bytes_per_second": self.bandwidth, "share_of_copy": share}


def capturable_stream(device: torch.device) -> AbstractContextManager:
    """Return a context in which :func:`replay` works: CUDA records graphs on other streams than the default one.

    What a graph differentiates must have been computed in the same context.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def replay(calls: Sequence[Callable[[], object]], device: torch.device, keep: int = 0) -> Callable[[], object]:
    """Return a call that makes all ``calls`` in a row: on a GPU the replay of one CUDA graph of them.

    In a replay the GPU never waits for the host, so it can time operations that are shorter than their launch. What a
    call returns is dropped, its memory used again, once ``keep`` more calls have returned.
    """

    def in_a_row() -> None:
        kept: deque[object] = deque(maxlen=keep)
        for call in calls:
            kept.append(call())

    if device.type != "cuda":
        return in_a_row
    # Compiles and tunes what runs for the first time, which is impossible while a graph is recorded.
    in_a_row()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        in_a_row()
    return graph.replay


def copy_bandwidth(device: torch.device, rounds: int, repeats: int) -> float:
    """Return the bytes per second that torch's copy of a large tensor reads and writes together."""
    size = COPY_BYTES[device.type]
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    call = replay([lambda: target.copy_(source)], device)
    return 1000 * 2 * size / common.time_in_turns({"copy": call}, device, rounds, repeats)["copy"].median_ms


def measure(name: str, layer: Layer, layers: int, copied: float, rounds: int, repeats: int) -> list[Row]:
    """Return a row for the forward pass and, where there is one, for the backward pass."""
    cases, device = [Case(name, layer)], layer.device
    if device.type == "cuda":
        # As many sets of tensors that none is found in the cache.
        cache = CACHES * torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(MOST_COPIES, math.ceil(cache / cases[0].forward_bytes))
        cases += [Case(name, layer) for _ in range(copies - 1)]
    rows = []
    for direction, prepare in (("forward", _forward_call), ("backward", _backward_call)):
        moved = getattr(cases[0], f"{direction}_bytes")
        if moved > 0:
            # A CPU's calls are long enough as they are.
            wanted = math.ceil(REPLAY_SECONDS * copied / moved) if device.type == "cuda" else 1
            times = math.ceil(min(wanted, MOST_CALLS) / len(cases))
            timings = _time(cases, prepare, times, device, rounds, repeats)
            common.release_cached_memory(device)
            dtype = BY_DTYPE[layer.dtype].dtype_name
            rows.append(Row(name, layer.shape, layers, dtype, direction, moved, timings["ours"], timings["peer"]))
    return rows


def _time(
    cases: Sequence[Case],
    prepare: Callable[[Case, str], Callable[[], object]],
    times: int,
    device: torch.device,
    rounds: int,
    repeats: int,
) -> dict[str, Timing | None]:
    """Return the timing of one call of "ours" and of "peer" from replays that go through the cases ``times`` times."""
    # Results too go round, or they would be written into the cache.
    replays = {
        who: or_out_of_memory(
            lambda who=who: replay([prepare(case, who) for case in cases] * times, device, keep=len(cases))
        )
        for who in ("ours", "peer")
    }
    timings = common.time_in_turns(
        {who: call for who, call in replays.items() if call is not None}, device, rounds, repeats
    )
    calls = times * len(cases)
    return {
        who: None if timings.get(who) is None else Timing(tuple(ms / calls for ms in timings[who].samples_ms))
        for who in replays
    }


def _forward_call(case: Case, who: str) -> Callable[[], object]:
    return partial(getattr(case, who), *case.inputs.values())


def _backward_call(case: Case, who: str) -> Callable[[], object]:
    outputs = [output for output in getattr(case, who)(*case.inputs.values()).values() if output.requires_grad]
    grad_outputs = [torch.randn_like(output) for output in outputs]
    wanted = [tensor for tensor in case.inputs.values() if tensor.requires_grad]
    return lambda: torch.autograd.grad(outputs, wanted, grad_outputs, retain_graph=True)


def bandwidth_of_all_layers(rows: Sequence[Row]) -> float | None:
    """Return bytes over time, both summed over all layers of the rows; None if one of them ran out of memory."""
    if any(row.ours is None for row in rows):
        return None
    moved = sum(row.bytes * row.layers for row in rows)
    return 1000 * moved / sum(row.ours.median_ms * row.layers for row in rows)


def make_parser() -> common.Parser:
    """Return the parser of the command line."""
    parser = common.Parser("benchmarks.kernels", "Measure the fused operations.", METHOD)
    add, positive = parser.add_argument, at_least(1)
    summaries = "; ".join(f"{name}: {each.summary}" for name, each in OPERATIONS.items())
    help = f"what to measure: {summaries}"
    add("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help=help)
    NetworkSize.add_options(parser)
    add("--time-steps", type=positive, default=6, metavar="T", help="number of time steps")
    add("--batch", type=positive, default=256, metavar="B", help="images per batch")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32", "float16"], help="type of the activations")
    add("--rounds", type=positive, default=5, help="turns that ours and the peer get")
    add("--repeats", type=positive, default=5, help="timed replays in a turn, after an untimed one")
    parser.add_common_options("all measurements", "the bandwidths")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return common.run(make_parser(), _measure_and_report, arguments)


def _measure_and_report(options: Namespace, device: torch.device, report: common.Report) -> None:
    if device.type == "cuda" and (reason := IMPLEMENTATIONS["ours-cupy"].missing(device)):
        raise InputError(f"the fused operations cannot run: {reason}; --device cpu times their references")
    size = NetworkSize.from_options(options)
    names = list(dict.fromkeys(options.operations))
    dtypes = [DTYPES[name] for name in dict.fromkeys(options.dtype)]
    report.begin(network=asdict(size))
    report.line("network", size)
    if device.type == "cpu":
        report.line("ours", "on a CPU the operations' references in torch, timed call by call")
    with capturable_stream(device):
        checked = check_operations(names, size, options.time_steps, dtypes, device, options.batch)
        what, worst = max(checked, key=lambda each: each[1].difference / each[1].limit)
        found = f"{worst.quantity} {worst.difference:.0e} (limit {worst.limit:.0e}) of {what}"
        report.line("equality", f"{len(checked)} comparisons with float64; closest to its limit: {found}")
        copied = copy_bandwidth(device, options.rounds, options.repeats)
        report.line("copy", f"{copied / 1e9:.4g} GB/s read and written\n")
        agreement = [{"what": what, **asdict(difference)} for what, difference in checked]
        report.update(copy_bytes_per_second=copied, agreement=agreement)
        TABLE.header()
        rows: list[Row] = []
        for name, dtype in product(names, dtypes):
            for image, layers in sites(name, size).items():
                shape = (options.time_steps, options.batch, *image)
                layer = Layer(shape, dtype, size.family, device, kernels=device.type == "cuda")
                found = measure(name, layer, layers, copied, options.rounds, options.repeats)
                for row in found:
                    row.print(copied)
                rows += found
                report.add("rows", [row.as_json(copied) for row in found])
    print()
    for key in dict.fromkeys((row.operation, row.dtype, row.direction) for row in rows):
        of_key = [row for row in rows if (row.operation, row.dtype, row.direction) == key]
        bandwidth = bandwidth_of_all_layers(of_key)
        share = "out of memory" if bandwidth is None else f"{100 * bandwidth / copied:.3g} % of copy"
        print(f"{key[0]:<18}{key[1]:<10}{key[2]:<10}all layers: {share}")
    if options.plot is not None:
        title = f"{size.network}, T = {options.time_steps}, batch {options.batch}"
        plot.write(plot.bandwidth_figure(rows, copied, title, report.environment), options.plot)


if __name__ == "__main__":
    sys.exit(main())
