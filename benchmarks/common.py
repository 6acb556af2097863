"""What all benchmarks share: command line, report, timing, and the comparison of an operation with its reference."""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from spikingjelly.activation_based import functional
from torch import Tensor

from gac import create_model
from gac.errors import InputError
from gac.execution.device import select_device
from gac.files import atomic_write
from gac.ops.backend import toolchain_status
from gac.version import __version__

ROOT = Path(__file__).parents[1]
Result = TypeVar("Result")


class MeasurementError(Exception):
    """A measurement that must not be reported; the message is one line that says why."""


@dataclass(frozen=True)
class Precision:
    """A precision of activations, and the rounding of results in it as a relative root mean square."""

    title: str
    dtype: torch.dtype
    rounding: float

    @property
    def dtype_name(self) -> str:
        """The dtype without "torch."."""
        return str(self.dtype).removeprefix("torch.")

    def missing(self, device: torch.device) -> str | None:
        """Return why a device cannot train in it, None if it can."""
        if self.dtype == torch.float16 and device.type != "cuda":
            return "needs a CUDA device"
        if self.dtype == torch.bfloat16 and device.type == "cuda":
            with torch.cuda.device(device):
                if not torch.cuda.is_bf16_supported(including_emulation=False):
                    return "the GPU has no bfloat16 arithmetic"
        return None


PRECISIONS = {
    "fp32": Precision("float32", torch.float32, 1e-4),
    "fp16": Precision("float16 autocast", torch.float16, 2e-3),
    "bf16": Precision("bfloat16 autocast", torch.bfloat16, 1.6e-2),
}
BY_DTYPE = {precision.dtype: precision for precision in PRECISIONS.values()} | {
    torch.float64: Precision("float64", torch.float64, 1e-10)
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputError, and whose help shows the defaults."""

    def __init__(self, module: str, purpose: str, method: str) -> None:
        super().__init__(
            prog=f"python -m {module}",
            description=f"{purpose} {method}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.module, self.method = module, method

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists all options")

    def add_common_options(self, written: str, drawn: str | None = None) -> None:
        """Add --device, --json and, if there is a figure, --plot."""
        self.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU where there is one")
        self.add_argument("--json", type=new_file(".json"), metavar="FILE", help=f"write {written} there")
        if drawn is not None:
            self.add_argument("--plot", type=new_file(".png"), metavar="FILE", help=f"draw {drawn} there")


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an argument type: a whole number that is ``minimum`` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {minimum}, got {text!r}")
        return value

    return parse


def new_file(suffix: str) -> Callable[[str], Path]:
    """Return an argument type: a file that can be written and whose name ends in ``suffix``."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix or path.is_dir() or not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"expected a file *{suffix} in a folder that exists, got {text!r}")
        return path

    return parse


# Family, image size and number of classes of each network.
NETWORKS = {
    "gac_msresnet18_cifar": ("cifar", 32, 100),
    "gac_msresnet18": ("imagenet", 224, 1000),
    "gac_msresnet34": ("imagenet", 224, 1000),
}


@dataclass(frozen=True)
class NetworkSize:
    """One of the registry's networks at some size; images are square, ``image_size`` pixels a side.

    ``width`` is the number of channels of the stem, ``depth`` the number of blocks in each stage.
    """

    network: str
    width: int
    depth: tuple[int, ...]
    image_size: int
    num_classes: int

    @property
    def family(self) -> str:
        """The authors' code that it follows: "cifar" or "imagenet"."""
        return NETWORKS[self.network][0]

    def __str__(self) -> str:
        pixels = f"{self.image_size} x {self.image_size} pixels"
        return f"{self.network}, width {self.width}, depth {list(self.depth)}, {pixels}, {self.num_classes} classes"

    @staticmethod
    def add_options(parser: Parser) -> None:
        """Add the options that :meth:`from_options` reads."""
        add, positive = parser.add_argument, at_least(1)
        add("--network", choices=NETWORKS, default="gac_msresnet18_cifar", help="what is measured")
        add("--width", type=positive, default=64, metavar="C", help="channels of the stem")
        add(
            "--depth", nargs="+", type=positive, metavar="N", help="blocks in each stage; None: the published network's"
        )
        sizes, classes = "None: 32 for CIFAR, else 224", "None: 100 for CIFAR, else 1000"
        add("--image-size", type=at_least(8), metavar="PIXELS", help=f"side of the images; {sizes}")
        add("--num-classes", type=positive, metavar="K", help=f"number of classes; {classes}")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "NetworkSize":
        """Return the size asked for. Raises InputError if the depth does not fit the network's number of stages."""
        with torch.device("meta"):
            published = tuple(len(stage) for stage in create_model(options.network, num_classes=1, T=1).stages)
        depth = published if options.depth is None else tuple(options.depth)
        if len(depth) != len(published):
            raise InputError(f"--depth: {options.network} has {len(published)} stages, got {len(depth)} numbers")
        _, image_size, num_classes = NETWORKS[options.network]
        return cls(
            options.network, options.width, depth, options.image_size or image_size, options.num_classes or num_classes
        )


class Table:
    """A table whose rows can be printed one by one: columns have a title and a least width, the first is left-aligned.

    A cell that is too wide shifts those after it.
    """

    def __init__(self, *columns: tuple[str, int]) -> None:
        self._titles = [title for title, _ in columns]
        self._widths = [max(len(title), width) for title, width in columns]

    def header(self) -> None:
        """Print the titles and a rule below them."""
        self.row(*self._titles)
        self.row(*("-" * width for width in self._widths))

    def row(self, *cells: str) -> None:
        """Print one row."""
        first, *others = zip(cells, self._widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        print("  ".join(aligned).rstrip(), flush=True)


class Report:
    """The results of a run: a header that says what was measured where, and a JSON file."""

    def __init__(self, parser: Parser, arguments: Sequence[str], device: torch.device, path: Path | None) -> None:
        self.environment = describe_environment(parser.module, arguments, device)
        self._method, self._path = parser.method, path

    def begin(self, **entries: Any) -> None:
        """Print the header; ``entries`` go into the JSON file."""
        self.data = {"environment": self.environment, "method": self._method, **entries}
        for title, text in self.environment.items():
            self.line(title, text)

    def line(self, title: str, text: object) -> None:
        """Print a line of the header."""
        print(f"{title:<14}{text}", flush=True)

    def update(self, **entries: Any) -> None:
        """Set entries of the JSON file."""
        self.data.update(entries)

    def add(self, key: str, results: Iterable[Any]) -> None:
        """Extend a list in the JSON file and write it: what is measured stays, whatever happens next."""
        self.data.setdefault(key, []).extend(results)
        if self._path is not None:
            with atomic_write(self._path) as file:
                file.write(f"{json.dumps(self.data, indent=2, allow_nan=False)}\n".encode())


def run(
    parser: Parser, measure: Callable[[argparse.Namespace, torch.device, Report], None], arguments: Sequence[str] | None
) -> int:
    """Run a command and return its exit status: 0, 1 for a MeasurementError, 2 for bad input, 130 for an interrupt."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = parser.parse_args(arguments)
        device = select_device(options.device)
        torch.backends.cudnn.benchmark = True
        measure(options, device, Report(parser, arguments, device, options.json))
    except (MeasurementError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, MeasurementError) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def describe_environment(module: str, arguments: Sequence[str], device: torch.device) -> dict[str, str]:
    """Return what a measurement depends on, machine, software and source, as pairs of a title and a text."""
    lif = functional.neuron_implementation("lif", device)["implementation"]
    torch_version = torch.__version__
    if device.type == "cuda":
        convolutions = torch.backends.cudnn.conv.fp32_precision
        torch_version += f", cuDNN {torch.backends.cudnn.version()}, float32 convolutions: {convolutions}"
    lines = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "CPU" if device.type == "cpu" else _describe_gpu(device),
        "CPU": f"{_cpu_model()}, threads: {torch.get_num_threads()}",
        "torch": torch_version,
        "CuPy": toolchain_status().reason.removeprefix("CuPy "),
        "SpikingJelly": f"{version('spikingjelly')}, float32 LIF: {lif}",
        "gac": __version__,
        "Python": platform.python_version(),
    }
    if (ROOT / ".git").exists():
        describe = ("describe", "--always", "--abbrev=12", "--dirty")
        lines["commit"] = _ask("git", "--no-optional-locks", "-C", str(ROOT), *describe)
    return lines | {"command": f"python -m {module} {shlex.join(arguments)}".rstrip()}


def _describe_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    # Clock and power limits decide what a card reaches.
    query = "--query-gpu=driver_version,power.limit,clocks.max.sm"
    answer = _ask("nvidia-smi", f"--id=GPU-{properties.uuid}", query, "--format=csv,noheader").split(", ")
    limits = f"driver {answer[0]}"
    if len(answer) == 3:
        limits += f", power limit {answer[1]}, SM clock up to {answer[2]}"
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.1f} GiB, {limits}"


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Timing:
    """Durations of single calls in milliseconds, in the order in which they were measured."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median."""
        return float(np.median(self.samples_ms))

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        lower, upper = np.percentile(self.samples_ms, (25, 75))
        return float(lower), float(upper)

    def as_json(self) -> dict[str, Any]:
        """Return median, quartiles and samples."""
        return {"median_ms": self.median_ms, "quartiles_ms": self.quartiles_ms, "samples_ms": self.samples_ms}


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    repeats: int,
    after_turn: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing | None]:
    """Time calls in turns A B C, A B C, ..., so that a drift of clocks or temperature meets all of them.

    A turn is one untimed call and ``repeats`` timed ones that follow without a pause, on a GPU timed by events. It
    starts with an empty memory cache: blocks that the previous call left behind would else be returned to the driver
    during the timing. After it ``after_turn`` frees what the call of this name left. Out of memory gives None.
    """
    samples: dict[str, list[float] | None] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if samples[name] is None:
                continue
            release_cached_memory(device)
            turn = or_out_of_memory(lambda call=call: _take_turn(call, device, repeats))
            after_turn(name)
            samples[name] = None if turn is None else samples[name] + turn
    return {name: None if taken is None else Timing(tuple(taken)) for name, taken in samples.items()}


def release_cached_memory(device: torch.device) -> None:
    """Give memory that torch holds without need back to a GPU's driver."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def or_out_of_memory(call: Callable[[], Result]) -> Result | None:
    """Return what a call returns, or None if memory ran out in it."""
    try:
        return call()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        # torch has no type of its own for a CPU that cannot allocate.
        if "DefaultCPUAllocator: can't allocate memory" not in str(error):
            raise
        return None


def _take_turn(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    call()
    if device.type == "cuda":
        # Calls are queued without waiting, as in training: where the host is too slow to keep the GPU busy, it shows.
        with torch.cuda.device(device):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
            events[0].record()
            for event in events[1:]:
                call()
                event.record()
            events[-1].synchronize()
            return [before.elapsed_time(after) for before, after in pairwise(events)]
    moments = [time.perf_counter()]
    for _ in range(repeats):
        call()
        moments.append(time.perf_counter())
    return [1000 * (after - before) for before, after in pairwise(moments)]


Operation = Callable[..., Mapping[str, Tensor]]
"""Takes tensors and returns outputs by name; "spikes" are compared by the share that differs, others by rounding."""

# Membranes so close to the threshold that the precision of what comes before it decides about the spike.
CHANGED_SPIKES_LIMIT = 1e-6
# Entries that may be off by more than rounding: a changed spike changes its neuron's gradient at up to 16 time steps,
# and so does rounding across a jump of the surrogate gradient (Rect has two).
EXEMPT = 16 * CHANGED_SPIKES_LIMIT


@dataclass(frozen=True)
class Difference:
    """How far something is from its reference in one quantity, and how far it may be."""

    quantity: str
    difference: float
    limit: float

    @property
    def within(self) -> bool:
        """Whether the limit holds; it never does for NaN."""
        return self.difference <= self.limit


def compare(operation: Operation, reference: Operation, inputs: Mapping[str, Tensor]) -> list[Difference]:
    """Compare an operation with its reference, which gets the same inputs in float64; inputs may require gradients.

    A neuron that has a changed spike is left out of the other comparisons, in which its later times and its gradient
    differ as well: no gradient comes into it, or it would be in the sums over a channel. The limits are those of the
    first input's dtype.
    """
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    wanted, got = dict(reference(*exact.values())), dict(operation(*inputs.values()))
    differences, kept = [], None
    if "spikes" in wanted:
        differs = got["spikes"].double() != wanted["spikes"]
        kept = ~differs.any(0)
        # A single unlucky neuron of a small tensor proves nothing; one changed spike may change all that follow.
        limit = max(CHANGED_SPIKES_LIMIT, 1 / kept.numel())
        differences.append(Difference("share of changed spikes", differs.double().mean().item(), limit))

    def masked(x: Tensor) -> Tensor:
        return x if kept is None or x.shape[-kept.ndim :] != kept.shape else x * kept

    grads = {name: masked(torch.randn_like(output)) for name, output in got.items() if output.requires_grad}
    for outputs, leaves in ((wanted, exact), (got, inputs)):
        leaves = {name: x for name, x in leaves.items() if grads and x.requires_grad}
        if leaves:
            incoming = [grad.to(outputs[name].dtype) for name, grad in grads.items()]
            found = torch.autograd.grad([outputs[name] for name in grads], list(leaves.values()), incoming)
            outputs |= {f"gradient of {name}": grad for name, grad in zip(leaves, found, strict=True)}
    rounding = BY_DTYPE[next(iter(inputs.values())).dtype].rounding
    for name in wanted:
        if name != "spikes":
            error = relative_rms(masked(got[name].detach().double()), masked(wanted[name].detach()))
            differences.append(Difference(name, error, rounding))
    return differences


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    """Return the root mean square of the difference relative to that of ``wanted``; 0 where both are zero.

    The largest differences do not count, as many as EXEMPT has of all entries.
    """
    error, size = (got - wanted).square(), wanted.square().sum()
    exempt = error.flatten().topk(int(EXEMPT * error.numel())).values.sum()
    error = (error.sum() - exempt).clamp(min=0)
    return 0.0 if error == size == 0 else (error / size).sqrt().item()


def worst(differences: Iterable[float]) -> float:
    """Return the largest, NaN if there is one, which ``max`` would lose."""
    return torch.tensor(list(differences)).max().item()
