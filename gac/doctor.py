"""Report which parts of the installation work and what to install for the others: python -m gac.doctor."""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import product

import torch
from torch import Tensor

from gac.command_line import Parser, finish
from gac.execution.device import describe_device, unused_gpus
from gac.execution.environment import describe_environment
from gac.neuron import PRESETS
from gac.ops import backend, c_kernels, channels, event_conv, lif
from gac.ops.catalogue import OPERATIONS, Layer
from gac.ops.cuda import compiler
from gac.ops.cuda.compiler import ELEMENTS, Kernel

SHAPE = (6, 4, 32, 16, 16)
# Largest deviation of a gradient, relative to the largest gradient.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# The statistics, which have no backward pass of their own, are part of the others.
CHECKED = [name for name in OPERATIONS if name != "batch_statistics"]
# Spikes that may differ. The gate's sigmoid is not torch's to the last bit.
DIFFERENT_SPIKES = {"gate_lif": 3}


@dataclass(frozen=True)
class Check:
    """The finding of one check, in one line; ``ok`` is False only if something installed is broken."""

    ok: bool
    text: str


def versions() -> Iterator[Check]:
    """Yield the versions of what the package runs on."""
    for title, text in describe_environment(torch.device("cpu")).items():
        if title not in ("device", "backend"):
            yield Check(True, f"{title} {text}")
    yield Check(True, f"{platform.platform()}; torch is built for CUDA {torch.version.cuda or 'no version'}")
    for package in ("torchvision", "numpy"):
        yield Check(True, f"{package} {metadata.version(package)}")
    cupy = [d for d in metadata.distributions() if (d.name or "").lower().partition("-")[0] == "cupy"]
    if not cupy:
        yield Check(True, "cupy is not installed")
    for distribution in cupy:
        yield Check(True, f"{distribution.name} {distribution.version}")
    if len(cupy) > 1:
        names = " ".join(distribution.name for distribution in cupy)
        yield Check(False, f"several CuPy packages overwrite each other: pip uninstall {names}, then install one")


def backends() -> Iterator[Check]:
    """Yield each device and what runs the neurons on it."""
    yield Check(True, f"cpu: neurons run in {'the C kernels' if c_kernels.status().ok else 'torch'}")
    if not torch.cuda.is_available():
        unused = unused_gpus()
        yield Check(True, f"no CUDA device: {unused}" if unused else "no CUDA device")
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None and other.type != "cuda":
        yield Check(True, f"{other.type}: neurons run in torch, which has not been tried there")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        status = backend.cupy_status(device)
        neurons = "the CUDA kernels" if status.ok else "torch"
        yield Check(True, f"{device} ({describe_device(device)}): neurons run in {neurons} ({status.reason})")


def toolchain() -> Iterator[Check]:
    """Yield whether NVRTC compiles the kernels; a CuPy that is installed but does not work is a failure."""
    status = backend.toolchain_status()
    if not status.ok:
        remedy = f"; to get the CUDA kernels: {status.hint}"
        yield Check(not backend.cupy_installed(), status.reason + remedy)
        return
    yield Check(True, status.reason)
    if torch.cuda.is_available():
        capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        targets, where = sorted({10 * major + minor for major, minor in capabilities}), "this machine's GPUs"
    else:
        targets, where = [90], "no GPU here, so compiled only, not run"
    for capability in targets:
        kernels = list(_kernels())
        for kernel in kernels:
            compiler.compile_kernel(kernel, capability)
        yield Check(True, f"NVRTC compiles {len(kernels)} kernels for compute capability {capability / 10} ({where})")


def _kernels() -> Iterator[Kernel]:
    """Yield one instance of each kernel that depends on the neuron."""
    dtype, T = torch.float16, SHAPE[0]
    width = channels.vector_width(dtype, T)
    neuron = PRESETS["cifar"]
    forward, backward = neuron.forward_template, neuron.backward_template
    yield lif.forward_kernel(dtype, T, width, forward)
    yield lif.backward_kernel(dtype, T, width, backward)
    for file, name, template in (
        ("norm_lif.cu", "norm_lif_forward", (T, width, forward)),
        ("norm_lif.cu", "norm_lif_backward_sums", (T, width, backward)),
        ("norm_lif.cu", "norm_lif_backward_input", (T, width, backward)),
        ("residual_lif.cu", "residual_lif_forward", (T, width, forward, True, True)),
        ("residual_lif.cu", "residual_lif_backward_sums", (T, width, backward, True, True)),
        ("gate_lif.cu", "gate_lif_forward", (T, width, forward)),
        ("gate_lif.cu", "gate_lif_backward", (T, width, backward)),
        ("residual_lif_pool.cu", "residual_lif_pool_forward", (T, width, forward, True)),
        ("residual_lif_pool.cu", "residual_lif_pool_backward_sums", (T, width, backward, True)),
    ):
        yield compiler.make_kernel(file, name, dtype, *template)


def kernels_against_reference() -> Iterator[Check]:
    """Yield, for each device that runs the kernels, how they compare with the reference in plain torch."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    usable = [(device, ELEMENTS) for device in devices if backend.cupy_status(device).ok]
    if c_kernels.status().ok:
        usable.append((torch.device("cpu"), [torch.float32]))
    if not usable:
        yield Check(True, "not run: no device that runs the kernels")
    for device, dtypes in usable:
        for operation, preset, dtype in product(CHECKED, PRESETS, dtypes):
            yield compare(operation, preset, dtype, device)


def compare(operation: str, preset: str, dtype: torch.dtype, device: torch.device) -> Check:
    """Run kernels and reference of an operation forward and backward on the same random tensors."""
    results = []
    for kernels in (False, True):
        torch.manual_seed(0)
        layer = Layer(SHAPE, dtype, PRESETS[preset], device, kernels, same_statistics=True)
        inputs = OPERATIONS[operation].inputs(layer)
        outputs = OPERATIONS[operation].run(layer, *inputs)
        gradients = torch.autograd.grad(outputs, inputs, [torch.randn_like(output) for output in outputs])
        results.append((outputs[-1], gradients))
    (expected, expected_gradients), (spikes, gradients) = results
    different, allowed = int((spikes != expected).sum()), DIFFERENT_SPIKES.get(operation, 0)
    deviation = max(
        ((found - wanted).abs().max() / wanted.abs().max()).item()
        for found, wanted in zip(gradients, expected_gradients, strict=True)
    )
    tolerance = TOLERANCES[dtype]
    return Check(
        different <= allowed and deviation <= tolerance,
        f"{device}, {operation}, {preset} neuron, {str(dtype).removeprefix('torch.')}: {different} of "
        f"{spikes.numel()} outputs differ (allowed {allowed}), gradients deviate by {deviation:.1e} (allowed "
        f"{tolerance:.0e})",
    )


def c_versions() -> Iterator[Check]:
    """Yield whether the CPU has the kernels' C versions, and how convolutions over spikes compare with dense ones."""
    status = c_kernels.status()
    yield Check(True, status.reason if status.ok else f"none, so torch runs: {status.reason}")
    if not status.ok:
        return
    torch.manual_seed(0)
    spikes, weight = (torch.rand(24, 256, 16, 16) < 0.05).float(), torch.randn(256, 256, 3, 3)
    spikes = spikes.to(memory_format=torch.channels_last)
    (found, events_ms), (expected, dense_ms) = (
        _timed(function, spikes, weight, 1, 1) for function in (event_conv.event_conv2d, event_conv.reference)
    )
    deviation = ((found - expected).abs().max() / expected.abs().max()).item()
    tolerance = TOLERANCES[torch.float32]
    yield Check(
        deviation <= tolerance,
        f"convolution by events: deviates by {deviation:.1e} (allowed {tolerance:.0e}), {events_ms:.1f} ms where 5 % of"
        f" the inputs spike, dense {dense_ms:.1f} ms",
    )


def _timed(function: Callable[..., Tensor], *arguments: object) -> tuple[Tensor, float]:
    """Return what a function gives, and the median of its time in milliseconds in five calls."""
    samples = []
    for _ in range(6):
        start = time.perf_counter()
        result = function(*arguments)
        samples.append(1000 * (time.perf_counter() - start))
    return result, statistics.median(samples[1:])


SECTIONS: dict[str, Callable[[], Iterator[Check]]] = {
    "Versions": versions,
    "Devices": backends,
    "CUDA kernels": toolchain,
    "C kernels on the CPU": c_versions,
    "Kernels against the reference": kernels_against_reference,
}


class Broken(Exception):
    """Something that is installed does not work; the message is one line."""


def examine() -> None:
    """Print all checks. Raises Broken if something installed does not work; no GPU is fine."""
    healthy = True
    for title, section in SECTIONS.items():
        print(title)
        for check in _all_of(section):
            healthy &= check.ok
            print(f"  {'ok  ' if check.ok else 'FAIL'} {check.text}")
    if not healthy:
        raise Broken("something installed is broken: see FAIL above")
    print("All that is installed works.")


def _all_of(section: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Yield the checks of a section; one that raises has failed, and the other sections still have to run."""
    try:
        yield from section()
    except Exception as error:
        yield Check(False, f"{type(error).__name__}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print all checks; return 0 if what is there works (no GPU is fine), 1 if not, 2 for bad arguments."""
    parser = Parser("gac.doctor", __doc__)
    parser.epilog = "Exit status 0: what is installed works (no GPU is fine); 1: something installed is broken."

    def run() -> None:
        parser.parse_args(arguments)
        examine()

    return finish(run, Broken)


if __name__ == "__main__":
    sys.exit(main())
