"""Weights and images of a training run, with which layers fire as they do in use."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import NETWORKS, NetworkSize
from gac import create_model
from gac.checkpoint.build import build_network, read_config
from gac.checkpoint.format import read_checkpoint
from gac.data import build_data
from gac.errors import InputError


@dataclass(frozen=True, eq=False)
class Trained:
    """A network's size, T and weights, and test images [N, C, H, W] of the data set that it was trained on."""

    size: NetworkSize
    T: int
    weights: list[Tensor]
    images: Tensor

    def batch(self, size: int) -> Tensor:
        """Return the first ``size`` images, from the start again where there are fewer."""
        return self.images[torch.arange(size) % len(self.images)]


def load(path: Path, most: int) -> Trained:
    """Return what a checkpoint of train.py holds, and up to ``most`` images from where its configuration says.

    Raises InputError for a network that the benchmark's other implementations are not: another one than GAC-MS-ResNet
    with the published neurons and gate.
    """
    payload = read_checkpoint(path)
    config, network = read_config(payload), build_network(payload)
    if config.model.name not in NETWORKS:
        raise InputError(f"--checkpoint: {path} has {config.model.name}, expected one of {', '.join(NETWORKS)}")
    data = build_data(config.data, device="cpu", batch_size=1, eval_batch_size=most, seed=0, splits=("test",))
    images, _ = next(data.test.epoch(0))
    depth = tuple(map(len, network.stages))
    size = NetworkSize(config.model.name, config.model.width, depth, images.shape[-1], network.num_classes)
    published = create_model(size.network, size.num_classes, network.T, width=size.width, depth=depth)
    shapes = [{key: tensor.shape for key, tensor in each.state_dict().items()} for each in (network, published)]
    neurons = [each.lif.lif_parameters().flatten() for each in (network, published)]
    if shapes[0] != shapes[1] or neurons[0] != neurons[1] or images.shape[-1] != images.shape[-2]:
        raise InputError(
            f"--checkpoint: {path} has other neurons, attention or images than the published network, which the other"
            " implementations are"
        )
    return Trained(size, network.T, list(network.state_dict().values()), images)
