"""What a measurement depends on: machine, software, source."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from spikingjelly.activation_based import functional

from gac.ops import backend
from gac.version import __version__

ROOT = Path(__file__).parents[1]


def describe_environment(module: str, arguments: Sequence[str], device: torch.device) -> dict[str, str]:
    """Return the header of a measurement as pairs of a title and a text.

    Args:
        module: Name of the module that was run, such as "benchmarks.throughput".
        arguments: Its command-line arguments.
        device: Where it measures.
    """
    lif = functional.neuron_implementation("lif", device)["implementation"]
    lines = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _describe_device(device),
        "CPU": f"{_cpu_model()}, threads: {torch.get_num_threads()}",
        "torch": _describe_torch(device),
        "CuPy": backend.toolchain_status().reason.removeprefix("CuPy "),
        "SpikingJelly": f"{version('spikingjelly')}, float32 LIF: {lif}",
        "gac": __version__,
        "Python": platform.python_version(),
    }
    commit = _commit()
    if commit is not None:
        lines["commit"] = commit
    lines["command"] = f"python -m {module} {shlex.join(arguments)}".rstrip()
    return lines


def format_environment(lines: dict[str, str]) -> str:
    """Return the header as text, a line each."""
    return "\n".join(f"{title:<14}{text}" for title, text in lines.items())


def _describe_device(device: torch.device) -> str:
    if device.type == "cpu":
        return "CPU"
    properties = torch.cuda.get_device_properties(device)
    # Clock and power limits decide what a card reaches.
    fields = "driver_version,power.limit,clocks.max.sm"
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        driver, power, clock = (part.strip() for part in answer.split(","))
        limits = f"driver {driver}, power limit {power}, SM clock up to {clock}"
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        limits = f"driver unknown ({error})"
    memory = properties.total_memory / 2**30
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.1f} GiB, {limits}"


def _describe_torch(device: torch.device) -> str:
    if device.type == "cpu":
        return torch.__version__
    convolutions = torch.backends.cudnn.conv.fp32_precision
    return f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}, float32 convolutions: {convolutions}"


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout that this file is in, None outside one."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
