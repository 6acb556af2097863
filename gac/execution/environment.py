"""What a result depends on: hardware and software, in words."""

import platform
from importlib.metadata import version

import torch
from spikingjelly.activation_based import functional

from gac.execution.device import describe_device
from gac.models import fused
from gac.models.ms_resnet import MSResNet
from gac.neuron import LIFNode
from gac.ops.backend import explain_backend, toolchain_status
from gac.version import __version__


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return what computations on a CPU or CUDA device depend on, as pairs of a title and a text."""
    lif = functional.neuron_implementation("lif", device)["implementation"]
    backend, reason = explain_backend("auto", torch.empty(0, device=device))
    torch_version = f"{torch.__version__}"
    if device.type == "cuda":
        convolutions = torch.backends.cudnn.conv.fp32_precision
        torch_version += f", cuDNN {torch.backends.cudnn.version()}, float32 convolutions: {convolutions}"
    return {
        "device": "CPU" if device.type == "cpu" else describe_device(device),
        "CPU": describe_device(torch.device("cpu")),
        "torch": torch_version,
        "backend": f"{backend} ({reason})",
        "CuPy": toolchain_status().reason.removeprefix("CuPy "),
        "SpikingJelly": f"{version('spikingjelly')}, float32 LIF: {lif}",
        "gac": __version__,
        "Python": platform.python_version(),
    }


def describe_backend(network: MSResNet, device: torch.device) -> dict[str, str]:
    """Return what runs a network's neurons on a device in float32, "cupy", "c" or "torch", and why, in a line."""
    backend, reason = "torch", "it has no spiking neurons"
    if isinstance(network.lif, LIFNode):
        nothing = torch.empty(0, device=device)
        backend, reason = network.lif.explain_backend(nothing)
        if explanation := fused.explain(network, fused.obstacle(network, nothing), nothing):
            reason += f"; {explanation}"
    return {"backend": backend, "backend_reason": reason}
