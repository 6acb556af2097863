"""Parts of a network that training leaves as they are."""

import logging
from fnmatch import fnmatchcase

from torch import nn

from gac.config import TrainConfig
from gac.errors import InputError, first_few
from gac.models.batch_norm import BatchNorm2d

logger = logging.getLogger("gac")


def freeze(network: nn.Module, config: TrainConfig) -> None:
    """Turn gradients off for the parameters that train.freeze and train.freeze_batch_norm name.

    Raises InputError for a pattern that names no parameter, and if none is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    patterns = config.freeze.replace(",", " ").split()
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"train.freeze: {pattern} names no parameter; there are {first_few(names)}")
    for name, parameter in network.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if config.freeze_batch_norm:
        for module in _batch_norms(network):
            module.requires_grad_(False)
    trained = sum(parameter.requires_grad for parameter in network.parameters())
    if trained == 0:
        raise InputError(f"train.freeze {config.freeze} leaves nothing to train")
    if trained < len(names):
        logger.info("frozen: %d of %d parameter tensors", len(names) - trained, len(names))


def training_mode(network: nn.Module, config: TrainConfig) -> None:
    """Put the network into training mode, but for the BatchNorms that train.freeze_batch_norm freezes."""
    network.train()
    if config.freeze_batch_norm:
        for module in _batch_norms(network):
            module.eval()


def _batch_norms(network: nn.Module) -> list[BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, BatchNorm2d)]
