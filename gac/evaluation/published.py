"""The accuracies that the authors published, to print beside measured ones."""

from dataclasses import dataclass
from typing import Literal

import torch

from gac.models import create_model
from gac.models.ms_resnet import MSResNet
from gac.neuron import LIFNode

README = "README of the authors' repository (Qiu et al., AAAI 2024)"


@dataclass(frozen=True)
class PublishedResult:
    """Top-1 accuracy in percent of a network on a data set with T time steps."""

    model: str
    data: Literal["cifar10", "cifar100", "imagenet"]
    T: int
    top1: float
    source: str


PUBLISHED = (
    PublishedResult("gac_msresnet18_cifar", "cifar10", 6, 96.46, README),
    PublishedResult("gac_msresnet18_cifar", "cifar10", 4, 96.24, README),
    PublishedResult("gac_msresnet18_cifar", "cifar10", 2, 96.18, README),
    PublishedResult("gac_msresnet18_cifar", "cifar100", 6, 80.45, README),
    PublishedResult("gac_msresnet18_cifar", "cifar100", 4, 79.83, README),
    PublishedResult("gac_msresnet18_cifar", "cifar100", 2, 78.92, README),
    PublishedResult("gac_msresnet18", "imagenet", 4, 64.05, README),
    PublishedResult("gac_msresnet18", "imagenet", 6, 65.14, README),
    PublishedResult("gac_msresnet34", "imagenet", 4, 69.77, README),
    PublishedResult("gac_msresnet34", "imagenet", 6, 70.42, README),
)


def find_published(network: MSResNet, data: str) -> PublishedResult | None:
    """Return the published result of exactly this network on ``data``, or None.

    The network is a published one if its T, the names and shapes of its weights and the constants of its
    neurons are; a checkpoint of the authors, which says nothing else about itself, can be told by them too.
    """
    for result in PUBLISHED:
        if result.data == data and result.T == network.T:
            # On the meta device a network has shapes and no memory.
            with torch.device("meta"):
                published = create_model(result.model, network.num_classes, result.T, in_channels=3)
            if _structure(published) == _structure(network):
                return result
    return None


def _structure(network: MSResNet) -> tuple[dict[str, torch.Size], list[tuple]]:
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    neurons = [
        (node.tau, node.v_threshold, node.detach_reset, type(node.surrogate_function))
        for node in network.modules()
        if isinstance(node, LIFNode)
    ]
    return shapes, neurons
