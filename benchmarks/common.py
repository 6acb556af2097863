"""What all benchmarks share: command line, report and timing."""

import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from gac import create_model
from gac.command_line import Parser, at_least, finish, new_file
from gac.execution.device import ask, select_device
from gac.execution.environment import describe_environment
from gac.execution.resources import is_out_of_memory
from gac.files import atomic_write, writing
from gac.models.ms_resnet import CIFAR, IMAGENET, Family
from gac.models.registry import family_of, list_models

ROOT = Path(__file__).parents[1]
OUT_OF_MEMORY = "out of memory"
"""What stands for a measurement that did not fit, in tables and in JSON files."""
Result = TypeVar("Result")
Timing = dict[str, Any] | str
"""Median, quartiles and samples in milliseconds, as :func:`timing` makes it, or OUT_OF_MEMORY."""


class MeasurementError(Exception):
    """A measurement that must not be reported; the message is one line that says why."""


# The type of the activations in each precision.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in PRECISIONS.values()}
# The networks that benchmarks/peers.py has too.
NETWORKS = [name for name in list_models() if name.startswith("gac_") and family_of(name) in (CIFAR, IMAGENET)]
# Side of the images in pixels and number of classes of the published networks of each family.
PUBLISHED_SIZES = {"cifar": (32, 100), "imagenet": (224, 1000)}


def make_parser(module: str, purpose: str, written: str, drawn: str | None = None) -> Parser:
    """Return a parser with --device, --json and, if there is a figure, --plot."""
    parser = Parser(module, purpose)
    parser.add("--device", "cpu, cuda, cuda:N, or auto: a GPU where there is one", default="auto")
    parser.add("--json", f"write {written} there", type=new_file(".json"), metavar="FILE")
    if drawn is not None:
        parser.add("--plot", f"draw {drawn} there", type=new_file(".png"), metavar="FILE")
    return parser


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
    def family(self) -> Family:
        """The authors' code that it follows."""
        return family_of(self.network)

    def __str__(self) -> str:
        pixels = f"{self.image_size} x {self.image_size} pixels"
        return f"{self.network}, width {self.width}, depth {list(self.depth)}, {pixels}, {self.num_classes} classes"

    @staticmethod
    def add_options(parser: Parser, T: int | list[int], batch: int | list[int]) -> None:
        """Add the options that :meth:`from_options` reads, --time-steps and --batch with their defaults."""
        add, positive = parser.add, at_least(1)
        add("--network", "what is measured", choices=NETWORKS, default="gac_msresnet18_cifar")
        add("--width", "channels of the stem", type=positive, default=64, metavar="C")
        add("--depth", "blocks in each stage; None: the published network's", nargs="+", type=positive, metavar="N")
        add("--image-size", "side of the images; None: 32 for CIFAR, else 224", type=at_least(8), metavar="PIXELS")
        add("--num-classes", "number of classes; None: 100 for CIFAR, else 1000", type=positive, metavar="K")
        add("--time-steps", "number of time steps", type=positive, default=T, metavar="T")
        add("--batch", "images per batch", type=positive, default=batch, metavar="B")

    @classmethod
    def from_options(cls, options: Namespace) -> "NetworkSize":
        """Return the size asked for. Raises InputError if the depth does not fit the network's number of stages."""
        with torch.device("meta"):
            stages = create_model(options.network, num_classes=1, T=1, depth=options.depth).stages
        pixels, classes = PUBLISHED_SIZES[family_of(options.network).neuron]
        sizes = options.image_size or pixels, options.num_classes or classes
        return cls(options.network, options.width, tuple(map(len, stages)), *sizes)


class Table:
    """A table printed row by row: columns have a title and a least width, the first is left-aligned."""

    def __init__(self, *columns: tuple[str, int]) -> None:
        self._titles = [title for title, _ in columns]
        self._widths = [max(len(title), width) for title, width in columns]

    def header(self) -> None:
        """Print the titles and a rule below them."""
        self.row(*self._titles)
        self.row(*("-" * width for width in self._widths))

    def row(self, first: str, *others: object) -> None:
        """Print one row; a cell that is too wide shifts those after it."""
        aligned = (f"{cell:>{width}}" for cell, width in zip(others, self._widths[1:], strict=True))
        print("  ".join((first.ljust(self._widths[0]), *aligned)).rstrip(), flush=True)


def markdown(titles: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


class Report:
    """The results of a run: a header that says what was measured where, and a JSON file."""

    def __init__(self, parser: Parser, arguments: Sequence[str], device: torch.device, path: Path | None) -> None:
        self.environment = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **describe_environment(device)}
        if (ROOT / ".git").exists():
            describe = ("describe", "--always", "--abbrev=12", "--dirty")
            self.environment["commit"] = ask("git", "--no-optional-locks", "-C", str(ROOT), *describe)
        self.environment["command"] = f"{parser.prog} {shlex.join(arguments)}".rstrip()
        self.device = device
        self._method, self._path = " ".join(parser.description.split()), path

    def begin(self, **entries: Any) -> None:
        """Print the header; ``entries`` go into the JSON file."""
        self.data = {"environment": self.environment, "method": self._method, **entries}
        for title, text in self.environment.items():
            self.line(title, text)

    def line(self, title: str, text: object) -> None:
        """Print a line of the header."""
        print(f"{title:<14}{text}", flush=True)

    def add(self, key: str, results: Iterable[Any]) -> None:
        """Extend a list in the JSON file and write it: what is measured stays, whatever happens next."""
        self.data.setdefault(key, []).extend(results)
        if self._path is not None:
            with writing(self._path), atomic_write(self._path) as file:
                file.write(f"{json.dumps(self.data, indent=2, allow_nan=False)}\n".encode())


def program(parser: Parser, measure: Callable[[Namespace, Report], None]) -> Callable[..., int]:
    """Return a command line as a function that takes sys.argv by default and returns the exit status.

    That is 0, 1 for a MeasurementError or results that cannot be written, 2 for bad input, 130 for an interrupt.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        arguments = sys.argv[1:] if arguments is None else arguments

        def run() -> None:
            options = parser.parse_args(arguments)
            torch.backends.cudnn.benchmark = True
            measure(options, Report(parser, arguments, select_device(options.device), options.json))

        try:
            return finish(run, MeasurementError)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return main


def timing(samples_ms: Sequence[float]) -> Timing:
    """Return median, quartiles and the samples themselves, in the order in which they were measured."""
    lower, median, upper = np.percentile(samples_ms, (25, 50, 75)).tolist()
    return {"median_ms": median, "quartiles_ms": (lower, upper), "samples_ms": tuple(samples_ms)}


def time_in_turns(
    calls: Mapping[str, Callable[[], object] | None],
    device: torch.device,
    rounds: int,
    repeats: int,
    after_turn: Callable[[str], object] = lambda name: None,
    each: int = 1,
    settle: float = 0.0,
) -> dict[str, Timing]:
    """Time calls in turns A B C, A B C, ..., so that a drift of clocks or temperature meets all of them.

    A turn is one untimed call and ``repeats`` timed ones that follow without a pause, on a GPU timed by events and
    after ``settle`` seconds of untimed ones, in which its clock falls to what it sustains; a sample is one of them,
    divided by ``each``. It starts with an empty memory cache: blocks that the previous call left behind would else be
    returned to the driver during the timing. After it ``after_turn`` frees what the call of this name left. Out of
    memory gives OUT_OF_MEMORY, and so does None, which stands for what had no memory to begin.
    """
    samples: dict[str, list[float] | None] = {name: None if call is None else [] for name, call in calls.items()}
    for name in list(calls) * rounds:
        if samples[name] is None:
            continue
        torch.cuda.empty_cache()
        turn = or_out_of_memory(partial(take_turn, calls[name], device, repeats, settle))
        after_turn(name)
        samples[name] = None if turn is None else samples[name] + [ms / each for ms in turn]
    return {name: OUT_OF_MEMORY if taken is None else timing(taken) for name, taken in samples.items()}


def grouped(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple, list[dict[str, Any]]]:
    """Return rows by their values of these keys, in the order in which they come first."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def or_out_of_memory(call: Callable[[], Result]) -> Result | None:
    """Return what a call returns, or None if memory ran out in it."""
    try:
        return call()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def take_turn(call: Callable[[], object], device: torch.device, repeats: int, settle: float = 0.0) -> list[float]:
    """Return the milliseconds of each timed call of a turn of :func:`time_in_turns`."""
    call()
    if device.type == "cuda":
        end = time.perf_counter() + settle
        while time.perf_counter() < end:
            torch.cuda.synchronize(device)
            call()
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
