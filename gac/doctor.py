"""Tell what of the installation works, and what to install where something is missing: python -m gac.doctor."""

import argparse
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

import torch

import gac.version
from gac.neuron import PRESETS
from gac.ops import lif, runtime

NEURONS = {
    name: (
        lif.LIFParameters.from_tau(preset.tau, False, preset.v_threshold, 0.0, preset.detach_reset),
        preset.surrogate(alpha=1.0),
    )
    for name, preset in PRESETS.items()
}
T = 6
# Largest deviation of a gradient, relative to the largest gradient. Spikes must be equal.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Check:
    """What one check found, in a line; ``ok`` is False only for something installed that is broken."""

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
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        status = runtime.cupy_status(device)
        backend = "the CUDA kernels" if status.ok else "torch"
        name = torch.cuda.get_device_name(device)
        yield Check(True, f"{device} ({name}): neurons run in {backend} ({status.reason})")


def toolchain() -> Iterator[Check]:
    """Yield whether NVRTC compiles the kernels; a CuPy that is installed but does not work is a failure."""
    status = runtime.toolchain_status()
    if not status.ok:
        remedy = f"; to get the CUDA kernels: {status.hint}"
        yield Check(not runtime.cupy_installed(), status.reason + remedy)
        return
    yield Check(True, status.reason)
    if torch.cuda.is_available():
        capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        targets, where = sorted({10 * major + minor for major, minor in capabilities}), "this machine's GPUs"
    else:
        targets, where = [80, 90], "no GPU here, so compiled only, not run"
    for capability in targets:
        count = 0
        for neuron in NEURONS.values():
            for dtype in runtime.KERNEL_DTYPES:
                width, constants = lif.vector_width(dtype, T), lif.Constants.of(dtype, *neuron)
                runtime.compile_kernel(lif.forward_kernel(dtype, T, width, constants.forward_template), capability)
                runtime.compile_kernel(lif.backward_kernel(dtype, T, width, constants.backward_template), capability)
                count += 2
        yield Check(True, f"NVRTC compiles {count} LIF kernels for compute capability {capability / 10} ({where})")


def kernels_against_reference() -> Iterator[Check]:
    """Yield, for each CUDA device that runs the kernels, how they compare with the reference in plain torch."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    usable = [device for device in devices if runtime.cupy_status(device).ok]
    if not usable:
        yield Check(True, "not run: no device that runs the kernels")
    for device in usable:
        for preset, neuron in NEURONS.items():
            for dtype in runtime.KERNEL_DTYPES:
                yield compare(preset, neuron, dtype, device)


def compare(preset: str, neuron: tuple, dtype: torch.dtype, device: torch.device) -> Check:
    """Run kernels and reference forward and backward on the same random input."""
    generator = torch.Generator().manual_seed(0)
    shape = (T, 4, 32, 16, 16)
    x = (torch.randn(shape, generator=generator) + 0.3).to(device, dtype).requires_grad_()
    weights = torch.randn(shape, generator=generator).to(device, dtype)
    results = []
    for function in (lif.reference, lif.lif):
        spikes, _ = function(x, 0.0, *neuron)
        results.append((spikes, torch.autograd.grad(spikes, x, weights)[0].float()))
    (expected, expected_grad), (spikes, grad) = results
    different = int((spikes != expected).sum())
    deviation = ((grad - expected_grad).abs().max() / expected_grad.abs().max()).item()
    tolerance = TOLERANCES[dtype]
    return Check(
        different == 0 and deviation <= tolerance,
        f"{device}, {preset} neuron, {str(dtype).removeprefix('torch.')}: {different} of {spikes.numel()} spikes "
        f"differ (allowed 0), gradients deviate by {deviation:.1e} (allowed {tolerance:.0e})",
    )


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
        except Exception as error:  # a check that breaks is a finding; the other sections still have to run
            healthy = False
            print(f"  FAIL {type(error).__name__}: {error}")
    print("All that is installed works." if healthy else "Something installed is broken: see FAIL above.")
    return 0 if healthy else 1


if __name__ == "__main__":
    raise SystemExit(main())
