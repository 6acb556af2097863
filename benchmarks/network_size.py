"""Which network is measured, and how large: the options that all benchmarks of networks share."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

import torch

from benchmarks.command_line import at_least
from gac import create_model
from gac.errors import InputError


@dataclass(frozen=True)
class _Defaults:
    family: str
    image_size: int
    num_classes: int


_CIFAR = _Defaults("cifar", 32, 100)
_IMAGENET = _Defaults("imagenet", 224, 1000)
_NETWORKS = {
    "gac_msresnet18_cifar": _CIFAR,
    "gac_msresnet18": _IMAGENET,
    "gac_msresnet34": _IMAGENET,
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
        return _NETWORKS[self.network].family

    def __str__(self) -> str:
        pixels = f"{self.image_size} x {self.image_size} pixels"
        return f"{self.network}, width {self.width}, depth {list(self.depth)}, {pixels}, {self.num_classes} classes"


def add_network_options(parser: ArgumentParser) -> None:
    """Add the options that :func:`network_size` reads."""
    positive = at_least(1)
    parser.add_argument("--network", choices=_NETWORKS, default="gac_msresnet18_cifar", help="what is measured")
    parser.add_argument("--width", type=positive, default=64, metavar="C", help="channels of the stem")
    parser.add_argument(
        "--depth", nargs="+", type=positive, metavar="N", help="blocks in each stage; None: the published network's"
    )
    parser.add_argument(
        "--image-size", type=at_least(8), metavar="PIXELS", help="side of the images; None: 32 for CIFAR, else 224"
    )
    parser.add_argument(
        "--num-classes", type=positive, metavar="K", help="number of classes; None: 100 for CIFAR, else 1000"
    )


def network_size(options: Namespace) -> NetworkSize:
    """Return the size that the options ask for.

    Raises:
        InputError: If the depth does not have one number for each stage of the network.
    """
    defaults = _NETWORKS[options.network]
    published = _published_depth(options.network)
    depth = published if options.depth is None else tuple(options.depth)
    if len(depth) != len(published):
        raise InputError(f"--depth: {options.network} has {len(published)} stages, got {len(depth)} numbers")
    return NetworkSize(
        options.network,
        options.width,
        depth,
        defaults.image_size if options.image_size is None else options.image_size,
        defaults.num_classes if options.num_classes is None else options.num_classes,
    )


def _published_depth(network: str) -> tuple[int, ...]:
    # Without memory and without drawing weights.
    with torch.device("meta"):
        return tuple(len(stage) for stage in create_model(network, num_classes=1, T=1).stages)
