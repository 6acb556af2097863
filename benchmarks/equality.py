"""The gate before anything is timed: only what computes the same may be compared.

The kernels are proven by the test suite, run on the device that is measured: each operation, whole networks, and
networks in half precision layer by layer. Networks that others would write are compared here with ours, at a small size
of the timed family and T, in float64, where rounding decides no spike.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import monitor
from torch import Tensor, nn

from benchmarks.candidates import IMPLEMENTATIONS, REFERENCE, Implementation, Setting, load
from benchmarks.common import ROOT, MeasurementError, NetworkSize, Report
from benchmarks.trained import load as load_trained
from gac import LIFNode
from gac.errors import InputError
from gac.ops import kernel_cache

Outcome = Mapping[str, Sequence[Tensor]]
"""Tensors of each quantity, in an order that all implementations have."""
OPERATION_TESTS = ("tests/ops",)
NETWORK_TESTS = (
    *OPERATION_TESTS,
    *("tests/models/test_fused.py", "tests/models/test_teacher_forcing.py", "tests/benchmarks/test_candidates.py"),
)
ON_ONE_GPU = "gpu and not several_gpus"
IN_C = "c_kernels"
SOURCES = (".py", ".cu", ".cuh", ".c", ".cpp", ".h", ".toml")
VERDICTS = ("failure", "error", "skipped")
BATCH, LIMIT = 4, 1e-8
# Of the gate, before the sigmoid. Higher, it is 1 after rounding: the membrane is then on the threshold, where
# SpikingJelly fires and the original does not.
LARGEST_SCORE = 6.0


def run_tests(paths: Sequence[str], report: Report, marker: str = ON_ONE_GPU) -> None:
    """Run tests of the kernels on the device, in a process of their own, and report how many have passed.

    Where they have passed before, on the same device with the same sources and versions, that is enough. Raises
    MeasurementError if one fails or is skipped, or if there is none.
    """
    environment = dict(os.environ)
    if report.device.type == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = f"GPU-{torch.cuda.get_device_properties(report.device).uuid}"
    # Most of the time the compiler works, in each process. What is timed is not compiled by torch.
    chosen = ["-m", marker, "-k", "not compile and not sanitizer", "-n", str(min(16, os.cpu_count() or 1))]
    command = ["-m", "pytest", "-q", *chosen, "-p", "no:cacheprovider", *paths]
    # Everything that could change how these tests end.
    versions = [text for title, text in report.environment.items() if title not in ("date", "command", "commit")]
    files = [path for folder in ("gac", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.*"))]

    def key_of(paths: Sequence[str]) -> str:
        sources = (path.read_text("utf-8") for path in (*files, *map(ROOT.joinpath, paths)) if path.suffix in SOURCES)
        return kernel_cache.key_of(chosen, paths, versions, environment.get("CUDA_VISIBLE_DEVICES"), *sources)

    if (passed := kernel_cache.load(key_of(paths))) is not None:
        report.line("equality", f"{int(passed)} tests of the kernels passed on this device before, with these sources")
        report.data["kernel_tests"] = int(passed)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        arguments = [sys.executable, *command, f"--junitxml={results}"]
        ran = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not results.exists():
            raise MeasurementError(f"the tests of the kernels did not run: {(ran.stderr or ran.stdout).strip()[-500:]}")
        cases = list(ElementTree.parse(results).iter("testcase"))
    bad = [f"{case.get('name')} ({verdict.tag})" for case in cases for verdict in case if verdict.tag in VERDICTS]
    if bad or not cases:
        what = f"{len(bad)} of {len(cases)} tests of the kernels did not pass: {', '.join(bad[:3])}"
        raise MeasurementError(f"{what}; nothing was timed, see python {shlex.join(command)}")
    report.line("equality", f"{len(cases)} tests of the kernels passed on this device")
    report.data["kernel_tests"] = len(cases)
    kernel_cache.store(key_of(paths), str(len(cases)).encode())
    if set(OPERATION_TESTS) < set(paths):
        of_operations = sum(case.get("classname", "").startswith("tests.ops.") for case in cases)
        kernel_cache.store(key_of(OPERATION_TESTS), str(of_operations).encode())


def compare(what: str, got: Outcome, wanted: Outcome, limit: float) -> list[dict[str, Any]]:
    """Return, for each quantity, the largest root mean square of a tensor's difference relative to the tensor's own.

    Raises MeasurementError if one is larger than the limit or NaN.
    """
    found = []
    for quantity, tensors in wanted.items():
        errors = [relative_rms(mine, tensor) for mine, tensor in zip(got[quantity], tensors, strict=True)]
        # max would lose a NaN.
        worst = torch.tensor(errors).max().item()
        if not worst <= limit:
            raise MeasurementError(f"{what}: {quantity} differ by {worst:.1e}, limit {limit:.0e}; nothing was timed")
        found.append({"quantity": quantity, "difference": worst, "limit": limit})
    return found


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    """Return the root mean square of the difference relative to that of ``wanted``; 0 where both are zero."""
    error, size = (got.double() - wanted.double()).norm(), wanted.double().norm()
    return 0.0 if error == size == 0 else (error / size).item()


def begin(options: Namespace, report: Report, **more: Any) -> tuple[list[Implementation], list[Setting]]:
    """Begin the report of a benchmark of networks; return what of those asked for can run, and every setting.

    Raises InputError if the device can run none of the implementations or precisions, MeasurementError if they differ.
    """
    size, device, trained = NetworkSize.from_options(options), report.device, None
    if getattr(options, "checkpoint", None) is not None:
        trained = load_trained(options.checkpoint, max(options.batch))
        size, options.time_steps = trained.size, [trained.T]
        report.environment["checkpoint"] = str(options.checkpoint)
    asked_for = options.time_steps, options.batch, options.precision
    time_steps, batches, precisions = (each if isinstance(each, list) else [each] for each in asked_for)
    missing = {name: IMPLEMENTATIONS[name].missing(device) for name in options.implementations}
    lacking = {name: _lack(name, device) for name in precisions}
    for option, reasons in (("--implementations", missing), ("--precision", lacking)):
        if all(reasons.values()):
            raise InputError(f"{option}: nothing can run, {'; '.join(f'{k}: {v}' for k, v in reasons.items())}")
    skipped = {name: reason for name, reason in (missing | lacking).items() if reason is not None}
    report.begin(**more, network=asdict(size), skipped=skipped)
    report.line("network", size)
    for name, reason in skipped.items():
        report.line("skipped", f"{name}: {reason}")
    implementations = [IMPLEMENTATIONS[name] for name in missing if name not in skipped]
    check_networks(implementations, size, time_steps, report)
    settings = product(time_steps, batches, [name for name in precisions if name not in skipped])
    return implementations, [Setting(size, *setting, options.layout, device, trained) for setting in settings]


def _lack(precision: str, device: torch.device) -> str | None:
    """Return why a device cannot train in a precision, None if it can."""
    if precision == "fp16" and device.type != "cuda":
        return "needs a CUDA device"
    if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU has no bfloat16 arithmetic"
    return None


def check_networks(
    implementations: Sequence[Implementation], size: NetworkSize, time_steps: Sequence[int], report: Report
) -> None:
    """Check and report that networks are the reference's.

    Raises MeasurementError if one is not, or if a layer of the reference never fires.
    """
    for kernels, marker in (("cupy", ON_ONE_GPU), ("c", IN_C)):
        if any(each.kernels == kernels for each in implementations):
            run_tests(NETWORK_TESTS, report, marker)
    # Large enough for every kind of block and BatchNorm.
    depth, image_size = tuple(min(2, blocks) for blocks in size.depth), 8 if size.family.neuron == "cifar" else 32
    small = replace(size, width=8, depth=depth, image_size=image_size, num_classes=min(10, size.num_classes))
    found = []
    for T in time_steps:
        torch.manual_seed(0)
        reference = REFERENCE.build(small, T).double()
        images = torch.randn(BATCH, 3, image_size, image_size, dtype=torch.float64)
        labels = torch.randint(small.num_classes, (BATCH,), device=report.device)
        perturb(reference, images)
        _check_firing(reference, images)
        weights, images = list(reference.state_dict().values()), images.to(report.device)
        wanted = _run(REFERENCE, small, T, weights, images, labels)
        for each in implementations:
            if each.build is not REFERENCE.build and not each.kernels:
                what = f"{each.name} is not the network of {REFERENCE.name} at T={T}"
                got = _run(each, small, T, weights, images, labels)
                place = {"implementation": each.name, "T": T, "dtype": "float64"}
                found += [place | one for one in compare(what, got, wanted, LIMIT)]
    report.line("equality", f"float64: {len(found)} comparisons within their limits")
    report.data["agreement"] = found


def _check_firing(network: nn.Module, images: Tensor) -> None:
    with monitor.OutputMonitor(network, LIFNode, lambda spikes: spikes.mean().item()) as firing, torch.no_grad():
        network(images)
    # The gate's output is below 1, CIFAR's threshold: one step of it leaves the first block silent.
    rates = [rate for i, rate in enumerate(firing.records) if not (network.T == 1 and i in (1, 2))]
    if not all(0 < rate < 1 for rate in rates):
        raise MeasurementError(f"a layer never or always fires at T={network.T}, which leaves nothing to compare")


@torch.no_grad()
def perturb(network: nn.Module, images: Tensor) -> None:
    """Take a new network out of its initial state, in which exchanged tensors and wrong gates would hardly show."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor += 0.2 * torch.rand_like(tensor)
    # A new gate is close to 1/2, or high at some times and low at others: too low for the first block to fire.
    gate = network.coding.gate
    gate.temporal.expand.weight.abs_()
    frame = network.train().stem(images)
    scores = gate.temporal(frame)[:, :, None, None, None] * gate.spatial_channel(frame)
    gate.spatial_channel.conv2.weight *= LARGEST_SCORE / scores.abs().max()


def _run(
    each: Implementation, size: NetworkSize, T: int, weights: Sequence[Tensor], images: Tensor, labels: Tensor
) -> Outcome:
    network = load(each.build(size, T), weights).to(images)
    logits = network.train()(images).movedim(each.time_dimension, 0)
    F.cross_entropy(logits.mean(0), labels).backward()
    statistics = [buffer.clone() for buffer in network.buffers()]
    with torch.no_grad():
        evaluated = network.eval()(images).movedim(each.time_dimension, 0)
    return {
        "training logits": [logits.detach()],
        # Where no spike arrives there is none.
        "loss gradients": [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()],
        "running statistics": statistics,
        "evaluation logits": [evaluated],
    }
