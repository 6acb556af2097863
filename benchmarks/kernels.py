"""Measure the fused operations: python -m benchmarks.kernels (--help lists all options).

Each operation runs on noise of the sizes that it meets in the network. GB/s are the bytes that it has to move
(formulas in gac/ops/catalogue.py) over the median time of a call, and their share of what torch's copy of a large
tensor reaches. On a GPU a call's time is a CUDA graph's of many calls, through more tensors than its cache holds; on a
CPU the C kernels, which have float32 only, are timed call by call. The peer is SpikingJelly's neuron with torch's
layers on the same tensors, in turns.

An operation is one entry of ``gac.ops.catalogue.OPERATIONS``, which states its bytes, and one of ``MEASURED``.
"""

import math
import sys
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, monitor
from torch import Tensor, nn

from benchmarks import common, plot
from benchmarks.candidates import IMPLEMENTATIONS, REFERENCE
from benchmarks.common import DTYPES, OUT_OF_MEMORY, NetworkSize, or_out_of_memory
from benchmarks.equality import IN_C, ON_ONE_GPU, OPERATION_TESTS, compare, run_tests
from gac.command_line import at_least
from gac.errors import InputError
from gac.models.batch_norm import BatchNorm2d
from gac.models.ms_resnet import MSResNet
from gac.neuron import PRESETS, LIFNode
from gac.ops.catalogue import EPS, OPERATIONS, Layer

GATE_BATCH, GATE_LIMIT = 2, 1e-2
PARTS = ("lif", "batch_statistics")
"""Operations that a training step has only as parts of the others."""
# A replay is long against what its launch and its events cost.
REPLAY_SECONDS, MOST_CALLS = 2e-3, 256
# Successive calls get other tensors until this many times the second-level cache has gone by.
CACHES, MOST_COPIES = 3, 32
# Far beyond the caches of either.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
TABLE = common.Table(
    *(("operation", 16), ("T, B, C, H, W", 21), ("layers", 6), ("dtype", 8), ("pass", 8), ("MB", 8), ("ours us", 13)),
    *(("[quartiles]", 20), ("GB/s", 7), ("of copy", 7), ("peer us", 13), ("peer / ours", 11)),
)


def _fire(layer: Layer, x: Tensor) -> Tensor:
    # SpikingJelly's fastest execution: its kernels need a state in float32.
    v = torch.zeros_like(x[0], dtype=torch.float32, requires_grad=False)
    neuron = layer.neuron
    constants = (neuron.tau, False, neuron.v_threshold, 0.0, neuron.surrogate, neuron.detach_reset)
    return functional.lif_multi_step(x, v, *constants)[0]


def _normalize(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    frames = y.flatten(0, 1)
    return F.batch_norm(frames, None, None, weight, bias, training=True, eps=EPS).unflatten(0, y.shape[:2])


def _moments(layer: Layer, y: Tensor) -> tuple[Tensor]:
    variance, mean = torch.var_mean(y.float(), (0, 1, 3, 4), correction=0)
    count = y.numel() // y.shape[2]
    return (torch.stack((mean, variance, variance * (count / (count - 1)))),)


def _gate(layer: Layer, x: Tensor, temporal: Tensor, spatial: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(temporal.to(x.dtype)[:, :, None, None, None] * spatial)
    membrane = gate * _fire(layer, x.expand(len(temporal), *x.shape))
    return membrane, _fire(layer, membrane)


def _residual(layer: Layer, y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, *affine: Tensor) -> tuple:
    membrane = _normalize(y, weight, bias) + (_normalize(shortcut, *affine) if affine else shortcut)
    return membrane, _fire(layer, membrane)


def _of_type(kind: type, network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


def _norms(shortcut_norm: bool, network: MSResNet, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    return [block.conv2.norm for block in blocks[:-1] if isinstance(block.shortcut, nn.Identity) != shortcut_norm]


# For each operation the modules of a network and its blocks whose inputs have its shape, and its peer.
MEASURED: dict[str, tuple[Callable[..., Sequence[nn.Module]], Callable[..., tuple[Tensor, ...]]]] = {
    "lif": (lambda network, blocks: _of_type(LIFNode, network), lambda layer, x: (_fire(layer, x),)),
    "batch_statistics": (lambda network, blocks: _of_type(BatchNorm2d, network.stages), _moments),
    "norm_lif": (
        lambda network, blocks: [block.lif2 for block in blocks],
        lambda layer, *inputs: (_fire(layer, _normalize(*inputs)),),
    ),
    "residual_lif": (partial(_norms, False), _residual),
    "residual_norm_lif": (partial(_norms, True), _residual),
    "residual_lif_pool": (
        lambda network, blocks: [blocks[-1].conv2.norm],
        lambda layer, *inputs: (_residual(layer, *inputs)[1].mean((-2, -1)),),
    ),
    "gate_lif": (lambda network, blocks: [blocks[0].lif1], _gate),
}


class Case:
    """An operation on tensors of one layer: ``call["ours"]`` and ``call["peer"]``, and the ``bytes`` of each pass."""

    def __init__(self, name: str, layer: Layer) -> None:
        self.inputs = OPERATIONS[name].inputs(layer)
        calls = {"ours": OPERATIONS[name].run, "peer": MEASURED[name][1]}
        self.call = {who: partial(call, layer, *self.inputs) for who, call in calls.items()}
        self.bytes = dict(zip(("forward", "backward"), OPERATIONS[name].bytes(layer), strict=True))

    def backward(self, who: str) -> Callable[[], tuple[Tensor, ...]]:
        """Return the backward pass of a call that is made now: it gives the gradients of the inputs."""
        outputs = [output for output in self.call[who]() if output.requires_grad]
        torch.manual_seed(0)
        grads = [torch.randn_like(output) for output in outputs]
        wanted = [tensor for tensor in self.inputs if tensor.requires_grad]
        return partial(torch.autograd.grad, outputs, wanted, grads, retain_graph=True)


@cache
def sites(name: str, size: NetworkSize) -> Counter[tuple[int, ...]]:
    """Return how many layers of the network have each of the shapes [C, H, W] that the operation meets."""
    network = REFERENCE.build(size, 1)
    names = {module: name for name, module in network.named_modules()}
    # Their outputs have the shape of their inputs.
    kinds, shape = (LIFNode, BatchNorm2d), lambda y: tuple(y.shape[-3:])
    with monitor.OutputMonitor(network, kinds, shape) as shapes, torch.no_grad():
        # Two images, because BatchNorm refuses a single value for each channel.
        network.train()(torch.randn(2, 3, size.image_size, size.image_size))
    modules = MEASURED[name][0](network, [block for stage in network.stages for block in stage])
    return Counter(shapes[names[module]][0] for module in modules)


def compare_with_peer(name: str, layer: Layer) -> list[dict[str, Any]]:
    """Compare ours, which the tests prove, with the peer. Raises MeasurementError if they do not compute the same.

    A few membranes are so close to the threshold that rounding decides about the spike, hence the wide limit.
    """
    case, found = Case(name, layer), {}
    for who in ("ours", "peer"):
        tensors = {f"output {i}": [output.detach()] for i, output in enumerate(case.call[who]())}
        grads = case.backward(who)() if case.bytes["backward"] else ()
        found[who] = tensors | {f"gradient {i}": [grad] for i, grad in enumerate(grads)}
    what = f"{name}, peer, {list(layer.shape)}, float32"
    return [{"what": what} | one for one in compare(what, found["peer"], found["ours"], GATE_LIMIT)]


def capturable_stream(device: torch.device) -> AbstractContextManager:
    """Return a context in which :func:`captured` works: CUDA records graphs on other streams than the default one.

    What a graph differentiates must have been computed in the same context.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def in_a_row(calls: Sequence[Callable[[], object]], keep: int = 0) -> Callable[[], object]:
    """Return a call that makes all ``calls``; what each returns is dropped once ``keep`` more have returned."""
    return lambda: deque((call() for call in calls), maxlen=keep)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return the replay of a CUDA graph of a call, in which the GPU never waits for the host; on a CPU the call."""
    if device.type != "cuda":
        return call
    # Compiles and tunes what runs for the first time, which is impossible while a graph is recorded.
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        call()
    return graph.replay


def copy_bandwidth(device: torch.device, rounds: int, repeats: int) -> float:
    """Return the bytes per second that torch's copy of a large tensor reads and writes together."""
    size = COPY_BYTES[device.type]
    # Not in a CUDA graph, which gives a copy to an engine that reaches two thirds of what kernels do.
    source, target = (torch.randn(size // 4, device=device) for _ in range(2))
    timings = common.time_in_turns({"copy": lambda: target.copy_(source)}, device, rounds, repeats, settle=0.5)
    return 1000 * 2 * size / timings["copy"]["median_ms"]


def measure(name: str, layer: Layer, layers: int, copied: float, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row, of what the JSON file holds, for the forward pass and, where there is one, for the backward pass.

    ``layers`` is how many layers of the network have this shape, ``copied`` the bytes per second of a copy.
    """
    cases, device = [Case(name, layer)], layer.device
    if device.type == "cuda":
        # As many sets of tensors that none is found in the cache.
        cache = CACHES * torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(MOST_COPIES, math.ceil(cache / cases[0].bytes["forward"]))
        cases += [Case(name, layer) for _ in range(copies - 1)]
    rows = []
    for direction, moved in cases[0].bytes.items():
        if moved == 0:
            continue
        # A CPU's calls are long enough as they are.
        wanted = math.ceil(REPLAY_SECONDS * copied / moved) if device.type == "cuda" else 1
        times = math.ceil(min(wanted, MOST_CALLS) / len(cases))
        row = {"operation": name, "shape": layer.shape, "layers": layers, "dtype": str(layer.dtype)[6:]}
        row |= {"pass": direction, "bytes": moved, **_time(cases, direction, times, device, rounds, repeats)}
        torch.cuda.empty_cache()
        rate = bandwidth_of_all_layers([row])
        rows.append(row | {"bytes_per_second": rate, "share_of_copy": None if rate is None else rate / copied})
    return rows


def _time(
    cases: Sequence[Case], direction: str, times: int, device: torch.device, rounds: int, repeats: int
) -> dict[str, common.Timing]:
    """Return the timing of one call of "ours" and of "peer" as calls in a row go through the cases ``times`` times."""

    def prepare(who: str) -> Callable[[], object]:
        calls = [case.call[who] if direction == "forward" else case.backward(who) for case in cases]
        # Results too go round, or they would be written into the cache.
        run = in_a_row(calls * times, keep=len(cases))
        # A replay of SpikingJelly's neuron at these sizes ends in an illegal memory access.
        return captured(run, device) if who == "ours" else run

    calls = {who: or_out_of_memory(partial(prepare, who)) for who in ("ours", "peer")}
    return common.time_in_turns(calls, device, rounds, repeats, each=times * len(cases))


def print_row(row: dict[str, Any]) -> None:
    """Print a row of :func:`measure` as one of TABLE."""
    ours, peer = ({} if row[who] == OUT_OF_MEMORY else row[who] for who in ("ours", "peer"))
    cells = [OUT_OF_MEMORY, "-", "-", "-"]
    if ours:
        median, low, high = (f"{1000 * ms:.1f}" for ms in (ours["median_ms"], *ours["quartiles_ms"]))
        rate, share = row["bytes_per_second"] / 1e9, 100 * row["share_of_copy"]
        cells = [median, f"[{low}, {high}]", f"{rate:.3g}", f"{share:.3g} %"]
    cells.append(f"{1000 * peer['median_ms']:.1f}" if peer else OUT_OF_MEMORY)
    cells.append(f"{peer['median_ms'] / ours['median_ms']:.2f}" if ours and peer else "-")
    shape = ", ".join(map(str, row["shape"]))
    TABLE.row(row["operation"], shape, row["layers"], row["dtype"], row["pass"], f"{row['bytes'] / 1e6:.3g}", *cells)


def bandwidth_of_all_layers(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return bytes over time, both summed over all layers of the rows; None if one of them ran out of memory."""
    if any(row["ours"] == OUT_OF_MEMORY for row in rows):
        return None
    moved = sum(row["bytes"] * row["layers"] for row in rows)
    return 1000 * moved / sum(row["ours"]["median_ms"] * row["layers"] for row in rows)


def _measure_and_report(options: Namespace, report: common.Report) -> None:
    device, on_gpu = report.device, report.device.type == "cuda"
    ours, marker = ("ours-cupy", ON_ONE_GPU) if on_gpu else ("ours-c", IN_C)
    if reason := IMPLEMENTATIONS[ours].missing(device):
        raise InputError(f"the fused operations cannot run: {reason}")
    lacking = [name for name in options.dtype if not on_gpu and name != "float32"]
    if len(lacking) == len(options.dtype):
        raise InputError(f"--dtype: on a CPU there are C kernels for float32 only, not for {', '.join(lacking)}")
    size, T = NetworkSize.from_options(options), options.time_steps
    names, dtypes = options.operations, [DTYPES[name] for name in options.dtype if name not in lacking]
    report.begin(network=asdict(size))
    report.line("network", size)
    if lacking:
        report.line("skipped", f"{', '.join(lacking)}: on a CPU there are C kernels for float32 only")
    run_tests(OPERATION_TESTS, report, marker)
    with capturable_stream(device):
        torch.manual_seed(0)
        # In half precision membranes on the threshold are common; SpikingJelly fires there, the original does not.
        small, neuron = (T, min(options.batch, GATE_BATCH)), PRESETS[size.family.neuron]
        agreement = []
        for name in names:
            for image in sites(name, size):
                agreement += compare_with_peer(name, Layer((*small, *image), torch.float32, neuron, device, True))
        report.line("equality", f"{len(agreement)} comparisons of peers within their limits")
        copied = copy_bandwidth(device, options.rounds, options.repeats)
        report.line("copy", f"{copied / 1e9:.4g} GB/s read and written\n")
        report.data |= {"copy_bytes_per_second": copied, "agreement": agreement}
        TABLE.header()
        for name, dtype in product(names, dtypes):
            for image, count in sites(name, size).items():
                layer = Layer((T, options.batch, *image), dtype, neuron, device, True)
                rows = measure(name, layer, count, copied, options.rounds, options.repeats)
                for row in rows:
                    print_row(row)
                report.add("rows", rows)
    print()
    for (name, dtype, direction), rows in common.grouped(report.data["rows"], "operation", "dtype", "pass").items():
        rate = bandwidth_of_all_layers(rows)
        share = OUT_OF_MEMORY if rate is None else f"{100 * rate / copied:.3g} % of copy"
        print(f"{name:<18}{dtype:<10}{direction:<10}all layers: {share}")
    if options.plot is not None:
        title = f"{size.network}, T = {T}, batch {options.batch}"
        plot.write(plot.bandwidth_figure(report.data["rows"], title, report.environment), options.plot)


PARSER = common.make_parser("benchmarks.kernels", __doc__, "all measurements", "the bandwidths")
add, positive = PARSER.add, at_least(1)
summaries = "; ".join(f"{name}: {each.summary}" for name, each in OPERATIONS.items())
add("--operations", f"what to measure: {summaries}", choices=MEASURED, default=list(MEASURED))
NetworkSize.add_options(PARSER, T=6, batch=256)
add("--dtype", "type of the activations", choices=DTYPES, default=["float32", "float16"])
add("--rounds", "turns that ours and the peer get", type=positive, default=5)
add("--repeats", "timed replays in a turn, after an untimed one", type=positive, default=5)
main = common.program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
