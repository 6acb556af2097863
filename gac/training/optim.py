"""Optimiser, learning rate and loss."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac.config import TrainConfig
from gac.training.resumed import check_optimizer_state


def parameter_groups(network: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the parameters of ``network`` in groups, one for each value of weight decay."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = config.weight_decay
        if name.startswith("stem.") and config.stem_weight_decay is not None:
            decay = config.stem_weight_decay
        # Biases and BatchNorm's parameters have one dimension.
        if config.weight_decay_on == "weights" and parameter.dim() < 2:
            decay = 0.0
        groups.setdefault(decay, []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def make_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Return SGD or AdamW for parameters, all with the configured weight decay, or for :func:`parameter_groups`."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        # The fused update skips overflowed half-precision steps on the device; the others ask the host.
        "fused": device.type == "cuda",
    }
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, momentum=config.momentum, nesterov=config.nesterov, **settings)
    else:
        optimizer = torch.optim.AdamW(
            parameters, betas=(config.momentum, 0.999), capturable=device.type == "cuda", **settings
        )
    if device.type == "cuda":
        # Read by the fused update on the device: it can change under a captured CUDA graph.
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(config.learning_rate, device=device)
    if config.optimizer == "sgd" and config.momentum > 0:
        # Otherwise the fused update allocates them in the first step, does not write to them if that step overflows,
        # and reads that memory in the second step. Zeros mean the same: the first step turns them into the gradients.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], device: torch.device) -> None:
    """Load ``optimizer.state_dict()`` of a run that may have been on another kind of device.

    Only the state of each parameter is taken: the groups' settings are the configuration's. Raises InputError for a
    state that is not of this optimiser's parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = ["momentum_buffer"] if any(group.get("momentum", 0) > 0 for group in optimizer.param_groups) else []
    if isinstance(optimizer, torch.optim.AdamW):
        names = ["step", "exp_avg", "exp_avg_sq"]
    check_optimizer_state(state["state"], [parameter.shape for parameter in parameters], names)
    for index, values in state["state"].items():
        parameter = parameters[index]
        for name, value in values.items():
            # In the memory order of the parameter, which the fused update takes for granted.
            like = torch.zeros((), device=device) if name == "step" else torch.empty_like(parameter)
            optimizer.state[parameter][name] = like.copy_(value)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, without waiting for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate_at(config: TrainConfig, epoch: int, batch: int, batches: int) -> float:
    """Return the learning rate of one step. It depends only on the position, so that resuming needs no state.

    A cosine from ``learning_rate`` to 0, updated every epoch or every batch. Before it, the rate rises linearly with
    every batch for ``warmup_epochs``; the cosine takes the remaining epochs.

    Args:
        config: The schedule.
        epoch: Number of the epoch, from 0.
        batch: Number of the batch in the epoch, from 0.
        batches: Batches in an epoch.
    """
    now = epoch + batch / batches
    if now < config.warmup_epochs:
        return config.learning_rate * min(1.0, (now + 1 / batches) / config.warmup_epochs)
    if config.schedule_step == "epoch":
        now = max(epoch, config.warmup_epochs)
    progress = (now - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def classification_loss(logits: Tensor, targets: Tensor, kind: str, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of outputs over time, a scalar.

    "mean" is the cross entropy of the outputs' mean over time. "tet" (temporal efficient training, Deng et
    al., ICLR 2022, without its regulariser) is the mean over time of the cross entropies; unlike
    SpikingJelly's function it also takes the soft targets that CutMix makes.

    Args:
        logits: Outputs [T, B, K].
        targets: Labels, int64 [B], or probabilities [B, K].
        kind: "mean" or "tet".
        label_smoothing: Share of the target spread evenly over all classes.
    """
    if kind == "mean":
        return F.cross_entropy(logits.mean(0), targets, label_smoothing=label_smoothing)
    repeated = targets.repeat(len(logits), *[1] * (targets.dim() - 1))
    return F.cross_entropy(logits.flatten(0, 1), repeated, label_smoothing=label_smoothing)
