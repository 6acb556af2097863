"""Everything that a GPU is needed for, in one command: python -m benchmarks.gpu or make gpu (--help lists all options).

Parts run one after the other, the most important first, each as the command that a user would type. A part that fails
or takes too long is named, and the others go on; when the time is up, so is the rest. What a part printed is in
NAME.log, what a benchmark measured in NAME.json, and how all parts ended in summary.json, with a verdict on each goal.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import tables
from benchmarks.common import ROOT, MeasurementError, Report, Table, grouped, program
from benchmarks.kernels import bandwidth_of_all_layers
from benchmarks.tables import fastest
from gac.command_line import Parser, at_least
from gac.files import atomic_write, user_path

SANITIZER = "compute-sanitizer"
SPEED_UPS = (("spikingjelly", "train", 3.5), ("step-loop", "train", 9.0), ("spikingjelly", "evaluation", 4.5))
TABLE = Table(("part", 20), ("seconds", 8), ("outcome", 40))
GOALS = Table(("goal", 60), ("wanted", 7), ("measured", 9), ("verdict", 7))
# What a part needs to start and to say something.
LEAST_SECONDS = 20
TINY = ["--width", "8", "--depth", "1", "1", "1", "--image-size", "8", "--time-steps", "2", "--batch", "2"]


class Part(NamedTuple):
    """A command with the seconds that it may take; ``why_not`` says why it cannot run here."""

    name: str
    command: Sequence[str]
    seconds: int
    quick: bool = False
    why_not: str | None = None


def parts(options: Namespace, folder: Path, scratch: Path, device: torch.device) -> Iterator[Part]:
    """Yield the parts, the most important first; on a CPU, where only their logic can be tried, at tiny sizes."""
    on_gpu = device.type == "cuda"
    no_gpu = None if on_gpu else "no GPU"
    precision, dtype, ours = ("fp16", "float16", "ours-cupy") if on_gpu else ("fp32", "float32", "ours-torch")

    def benchmark(name: str, module: str, *arguments: str, seconds: int, quick: bool = False) -> Part:
        where = ["--device", str(device), "--json", str(folder / f"{name}.json")]
        small = [] if on_gpu else TINY
        return Part(name, ["-m", f"benchmarks.{module}", *arguments, *small, *where], seconds, quick)

    def train(name: str, *arguments: str, seconds: int, quick: bool = False) -> Part:
        few = [] if on_gpu else ["--train.epochs", "1"]
        where = ["--output", str(scratch / name), "--device", str(device)]
        return Part(name, ["train.py", *arguments, *few, *where], seconds, quick)

    yield Part("doctor", ["-m", "gac.doctor"], 120, quick=True)
    chosen = ["-m", "gpu and not several_gpus", "-n", str(min(16, os.cpu_count() or 1))]
    yield Part("tests", ["-m", "pytest", "-q", *chosen, "-p", "no:cacheprovider"], 400, quick=True, why_not=no_gpu)
    network = ["--precision", precision, "--time-steps", "6", "--batch"]
    turns = ["--rounds", "2", "--steps", "10"] if on_gpu else ["--rounds", "1", "--steps", "1"]
    yield benchmark("throughput", "throughput", *network, "256", *turns, seconds=180, quick=True)
    yield benchmark("kernels", "kernels", "--dtype", dtype, "--rounds", "3" if on_gpu else "1", seconds=120, quick=True)
    yield benchmark("profile", "profile", *network, "256", "--implementations", ours, seconds=60, quick=True)
    half = ["--train.amp", "fp16"] if on_gpu else []
    yield train("digits", "--config", "configs/digits.yaml", *half, seconds=120, quick=True)
    if options.data is not None:
        data = ["--data.name", "npz", "--data.root", str(user_path(options.data, "--data"))]
        yield train("cifar", "--config", "configs/cifar10.yaml", *data, "--train.epochs", "1", seconds=300)
    for tool in ("memcheck", "racecheck"):
        why_not = no_gpu or (None if shutil.which(SANITIZER) else f"{SANITIZER} is not installed")
        command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "gac.doctor"]
        yield Part(tool, command, 150, why_not=why_not)
    yield benchmark("batch64", "throughput", *network, "64", *turns, seconds=150)
    yield benchmark("time_steps", "throughput", *network, "256", *turns, "--time-steps", *"1248", seconds=300)
    sustained = ["--implementations", ours, "--settle", "60" if on_gpu else "0", *turns, "--rounds", "1"]
    yield benchmark("sustained", "throughput", *network, "256", *sustained, seconds=150)


def run(part: Part, folder: Path, seconds: float) -> str:
    """Run a part for at most so many seconds and return how it ended: "ok" or what went wrong."""
    if part.why_not is not None:
        return f"skipped: {part.why_not}"
    if seconds < LEAST_SECONDS:
        return "not started: no time left"
    command = part.command if part.command[0] == SANITIZER else [sys.executable, *part.command]
    with open(folder / f"{part.name}.log", "wb") as log:
        # A group of its own: a part's own processes end with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "ok" if status == 0 else f"failed with status {status}, see {part.name}.log"


def goals(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every goal for a GPU that the files in a folder tell about: what was wanted, what was measured."""
    if (folder / "throughput.json").exists():
        cells = tables.read(folder / "throughput.json")["cells"]
        implementations = ("ours-cupy", "ours-cupy-graph", "ours-cupy-overlap")
        for peer, what, wanted in SPEED_UPS:
            ours, theirs = (fastest(cells, what, *names) for names in (implementations, (peer,)))
            if ours and theirs:
                yield _goal(f"{what}: times as fast as {peer}", wanted, theirs / ours, at_least=True)
        peaks = {cell["implementation"]: cell["peak_bytes"] for cell in cells}
        ours, theirs = peaks.get("ours-cupy"), peaks.get("spikingjelly")
        if ours and theirs:
            yield _goal("memory of a training step over spikingjelly's", 0.5, ours / theirs, at_least=False)
    if (folder / "kernels.json").exists():
        content = tables.read(folder / "kernels.json")
        for (operation, dtype, direction), rows in grouped(content["rows"], "operation", "dtype", "pass").items():
            bandwidth = bandwidth_of_all_layers(rows)
            if bandwidth is not None:
                share = bandwidth / content["copy_bytes_per_second"]
                yield _goal(f"{operation} {direction}, {dtype}: share of a copy's rate", 0.8, share, at_least=True)


def _goal(title: str, wanted: float, measured: float, at_least: bool) -> dict[str, Any]:
    met = measured >= wanted if at_least else measured <= wanted
    return {"goal": title, "wanted": f"{'>=' if at_least else '<='} {wanted:g}", "measured": measured, "met": met}


def _measure_and_report(options: Namespace, report: Report) -> None:
    if options.output is not None:
        folder = user_path(options.output, "--output").absolute()
    elif report.device.type == "cuda":
        name = torch.cuda.get_device_name(report.device).lower().removeprefix("nvidia ").replace(" ", "-")
        folder = Path("benchmarks", "results", name)
    else:
        # Not beside what was measured at real sizes.
        folder = Path("runs", "gpu-trial")
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    report.begin()
    report.line("results", f"{folder}\n")
    outcomes: list[dict[str, Any]] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        found = parts(options, folder, Path(scratch), report.device)
        chosen = [part for part in found if part.quick or not options.quick]
        for part in chosen:
            # What an earlier run left must not stand for what this one could not measure.
            for suffix in ("json", "log"):
                (ROOT / folder / f"{part.name}.{suffix}").unlink(missing_ok=True)
        TABLE.header()
        for part in chosen:
            started = time.monotonic()
            outcome = run(part, ROOT / folder, min(part.seconds, options.budget - (started - begun)))
            seconds = time.monotonic() - started
            TABLE.row(part.name, f"{seconds:.0f}", outcome)
            command = shlex.join(part.command).replace(sys.executable, "python").replace(scratch, "SCRATCH")
            outcomes.append({"part": part.name, "command": command, "outcome": outcome, "seconds": seconds})
            verdicts = list(goals(ROOT / folder)) if report.device.type == "cuda" else []
            with atomic_write(ROOT / folder / "summary.json") as file:
                content = {"environment": report.environment, "parts": outcomes, "goals": verdicts}
                file.write(f"{json.dumps(content, indent=2)}\n".encode())
    print()
    if (ROOT / folder / "throughput.json").exists():
        print(f"{tables.throughput(tables.read(ROOT / folder / 'throughput.json'))}\n")
    if verdicts:
        GOALS.header()
    for goal in verdicts:
        verdict = "met" if goal["met"] else "MISSED"
        GOALS.row(goal["goal"], goal["wanted"], f"{goal['measured']:.3g}", verdict)
    if bad := [each["part"] for each in outcomes if not each["outcome"].startswith(("ok", "skipped"))]:
        raise MeasurementError(f"not everything ran: {', '.join(bad)}; the logs are in {folder}")


PARSER = Parser("benchmarks.gpu", __doc__)
PARSER.add("--device", "cuda, cuda:N, or cpu: every part that needs no GPU, at tiny sizes, as a trial", default="cuda")
PARSER.add("--output", "folder for the results; None: benchmarks/results/GPU, or runs/gpu-trial", metavar="FOLDER")
PARSER.add("--budget", "seconds for all parts together", type=at_least(1), default=1500, metavar="SECONDS")
PARSER.add("--quick", "only what takes five minutes together", action="store_true")
PARSER.add("--data", "CIFAR-10 as an npz file, for one epoch of the published recipe", metavar="FILE")
PARSER.set_defaults(json=None)
main = program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
