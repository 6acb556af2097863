"""The version of this package, and of the software that made a result."""

import platform
from importlib.metadata import version

import torch

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "gac": __version__,
        "python": platform.python_version(),
        # Unlike the package's metadata it names the CUDA version that PyTorch was built for.
        "torch": str(torch.__version__),
        **{name: version(name) for name in ("torchvision", "spikingjelly", "numpy")},
    }
