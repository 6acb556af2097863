"""Report which parts of the installation work and what to install for the others: python -m gac.doctor."""

import argparse
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

import gac.version
from gac.neuron import PRESETS
from gac.ops import backend, batch_norm, channels, gate_lif, lif, lif_pool, norm_lif, residual_lif
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.cuda import compiler
from gac.ops.cuda.compiler import ELEMENTS, Kernel
from gac.ops.neuron import LIFParameters

SHAPE = T, B, C, H, W = 6, 4, 32, 16, 16
# Largest deviation of a gradient, relative to the largest gradient.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Spikes that may differ. The gate's sigmoid is not torch's to the last bit.
DIFFERENT_SPIKES = {"gate_lif": 3}


@dataclass(frozen=True)
class Check:
    """The finding of one check, in one line; ``ok`` is False only if something installed is broken."""

    ok: bool
    text: str


def versions() -> Iterator[Check]:
    """Yield the versions of what the package runs on."""
    yield Check(True, f"gac {gac.version.__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield Check(True, f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'no version'}")
    for package in ("torchvision", "spikingjelly", "numpy"):
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
    yield Check(True, "cpu: neurons run in torch")
    if not torch.cuda.is_available():
        yield Check(True, "no CUDA device")
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None and other.type != "cuda":
        yield Check(True, f"{other.type}: neurons run in torch, which has not been tried there")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        status = backend.cupy_status(device)
        neurons = "the CUDA kernels" if status.ok else "torch"
        name = torch.cuda.get_device_name(device)
        yield Check(True, f"{device} ({name}): neurons run in {neurons} ({status.reason})")


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
    dtype, width = torch.float16, channels.vector_width(torch.float16, T)
    neuron = PRESETS["cifar"]
    forward, backward = neuron.forward_template, neuron.backward_template
    yield lif.forward_kernel(dtype, T, width, forward)
    yield lif.backward_kernel(dtype, T, width, backward)
    for file, name, template in (
        ("norm_lif.cu", "norm_lif_forward", (T, width, forward)),
        ("norm_lif.cu", "norm_lif_backward_sums", (T, width, backward)),
        ("norm_lif.cu", "norm_lif_backward_input", (T, width, backward)),
        ("residual_lif.cu", "residual_lif_forward", (T, width, forward, True, True)),
        ("residual_lif.cu", "residual_lif_backward_sums", (T, width, backward, True)),
        ("gate_lif.cu", "gate_lif_forward", (T, width, forward)),
        ("gate_lif.cu", "gate_lif_backward", (T, width, backward)),
        ("lif_pool.cu", "lif_pool_forward", (T, width, forward)),
        ("lif_pool.cu", "lif_pool_backward", (T, width, backward)),
    ):
        yield compiler.make_kernel(file, name, dtype, *template)


def kernels_against_reference() -> Iterator[Check]:
    """Yield, for each CUDA device that runs the kernels, how they compare with the reference in plain torch."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    usable = [device for device in devices if backend.cupy_status(device).ok]
    if not usable:
        yield Check(True, "not run: no device that runs the kernels")
    for device in usable:
        for operation in OPERATIONS:
            for preset in PRESETS:
                for dtype in ELEMENTS:
                    yield compare(operation, preset, dtype, device)


def compare(operation: str, preset: str, dtype: torch.dtype, device: torch.device) -> Check:
    """Run kernels and reference of an operation forward and backward on the same random input."""
    neuron = PRESETS[preset]
    generator = torch.Generator().manual_seed(0)
    x, other, weights = ((torch.randn(SHAPE, generator=generator) + 0.3).to(device, dtype) for _ in range(3))
    results = []
    for kernels in (False, True):
        leaf = x.clone().requires_grad_()
        spikes = OPERATIONS[operation](leaf, other, neuron, kernels)
        weights = weights.view(-1)[: spikes.numel()].view(spikes.shape)
        results.append((spikes, torch.autograd.grad(spikes, leaf, weights)[0].float()))
    (expected, expected_grad), (spikes, grad) = results
    different, allowed = int((spikes != expected).sum()), DIFFERENT_SPIKES.get(operation, 0)
    deviation = ((grad - expected_grad).abs().max() / expected_grad.abs().max()).item()
    tolerance = TOLERANCES[dtype]
    return Check(
        different <= allowed and deviation <= tolerance,
        f"{device}, {operation}, {preset} neuron, {str(dtype).removeprefix('torch.')}: {different} of "
        f"{spikes.numel()} outputs differ (allowed {allowed}), gradients deviate by {deviation:.1e} (allowed "
        f"{tolerance:.0e})",
    )


def _lif(x: Tensor, other: Tensor, neuron: LIFParameters, kernels: bool) -> Tensor:
    return (lif.lif if kernels else lif.reference)(x, 0.0, neuron)[0]


def _norm_lif(x: Tensor, other: Tensor, neuron: LIFParameters, kernels: bool) -> Tensor:
    return (norm_lif.norm_lif if kernels else norm_lif.reference)(x, _normalization(x, kernels), neuron)


def _residual_lif(x: Tensor, other: Tensor, neuron: LIFParameters, kernels: bool) -> Tensor:
    function = residual_lif.residual_lif if kernels else residual_lif.reference
    return function(x, _normalization(x, kernels), other, _normalization(other, kernels), neuron)[1]


def _gate_lif(x: Tensor, other: Tensor, neuron: LIFParameters, kernels: bool) -> Tensor:
    # Scores that open the gate: at 1 and below the next layer would hardly fire.
    temporal = other.float().abs().mean((2, 3, 4)) * 5
    function = gate_lif.gate_lif if kernels else gate_lif.reference
    return function(x[0], temporal, other[0], neuron)[1]


def _lif_pool(x: Tensor, other: Tensor, neuron: LIFParameters, kernels: bool) -> Tensor:
    return (lif_pool.lif_pool if kernels else lif_pool.reference)(x, neuron)


OPERATIONS = {
    "lif": _lif,
    "norm_lif": _norm_lif,
    "residual_lif": _residual_lif,
    "gate_lif": _gate_lif,
    "lif_pool": _lif_pool,
}


def _normalization(y: Tensor, kernels: bool) -> BatchNormTransform:
    weight, bias = torch.full((C,), 1.5, device=y.device), torch.full((C,), 0.5, device=y.device)
    mean, inverse_std = batch_norm.statistics(batch_norm.batch_moments(y.detach()), eps=1e-5)
    if not kernels:
        # The same values, with the gradient of the reference's own statistics.
        moments = batch_norm.reference_moments(y)
        own = moments[0], (moments[1] + 1e-5).rsqrt()
        mean, inverse_std = (
            each + (given - each).detach() for each, given in zip(own, (mean, inverse_std), strict=True)
        )
    return BatchNormTransform(weight, bias, mean, inverse_std, from_batch=True)


SECTIONS: dict[str, Callable[[], Iterator[Check]]] = {
    "Versions": versions,
    "Devices": backends,
    "CUDA kernels": toolchain,
    "CUDA kernels against the reference": kernels_against_reference,
}


def main(arguments: list[str] | None = None) -> int:
    """Print all checks; return 0 if what is there works (no GPU is fine), 1 if something installed is broken."""
    parser = argparse.ArgumentParser(prog="python -m gac.doctor", description=__doc__)
    parser.epilog = "Exit status 0: what is installed works (no GPU is fine); 1: something installed is broken."
    parser.parse_args(arguments)
    healthy = True
    for title, section in SECTIONS.items():
        print(title)
        try:
            for check in section():
                healthy &= check.ok
                print(f"  {'ok  ' if check.ok else 'FAIL'} {check.text}")
        except Exception as error:  # a check that raises has failed; the other sections still have to run
            healthy = False
            print(f"  FAIL {type(error).__name__}: {error}")
    print("All that is installed works." if healthy else "Something installed is broken: see FAIL above.")
    return 0 if healthy else 1


if __name__ == "__main__":
    raise SystemExit(main())
