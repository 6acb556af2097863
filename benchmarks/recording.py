"""What layers of a network get: the benchmarks take shapes and values from there instead of repeating them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def record_inputs(network: nn.Module, modules: Sequence[nn.Module], image_size: int) -> list[Tensor]:
    """Return a copy of what each of ``modules`` gets first in a training forward pass of two random images."""
    # Two, because BatchNorm refuses a single value for each channel.
    return record_inputs_of(network, modules, torch.randn(2, 3, image_size, image_size))


@torch.no_grad()
def record_inputs_of(network: nn.Module, modules: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    """Return a copy of the first argument that each of ``modules`` gets in a training forward pass of ``images``."""
    inputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[module] = arguments[0].detach().clone()

    handles = [module.register_forward_pre_hook(record) for module in modules]
    network.train()(images)
    for handle in handles:
        handle.remove()
    return [inputs[module] for module in modules]
