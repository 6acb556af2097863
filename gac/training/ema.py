"""The moving average of a network's weights, which often classifies better than the weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gac.checkpoint import load_weights
from gac.execution.device import float_for_sums


class MovingAverage:
    """A copy of a network whose weights and buffers are exponential moving averages of the network's.

    An update keeps min(decay, (1 + n) / (10 + n)) of the average, n being the number of updates before it, so that
    the first weights are soon forgotten. BatchNorm's running statistics are averaged like the weights, since the newest
    ones belong to the newest weights only.

    torch.optim.swa_utils.AveragedModel computes the same (with a constant decay), but reads on the host at each update
    whether it is the first, which a CUDA graph cannot capture, and also averages after steps that loss scaling skipped.

    Attributes:
        network: The copy, in evaluation mode.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        self._floating = _columns([pair for pair in pairs if pair[0].is_floating_point()])
        self._counts = _columns([pair for pair in pairs if not pair[0].is_floating_point()])
        device = pairs[0][0].device
        self._updates = torch.zeros((), dtype=float_for_sums(device), device=device)
        self._decay = torch.tensor(decay, dtype=float_for_sums(device), device=device)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Update the average with the current weights, unless the step was ``skipped`` (a bool scalar).

        Reads no value on the host.
        """
        done = (~skipped).to(self._decay.dtype)
        kept = torch.minimum(self._decay, (1 + self._updates) / (10 + self._updates))
        _move(*self._floating, ((1 - kept) * done).float())
        _move(*self._counts, done.long())
        self._updates += done

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return {"model": self.network.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, possibly on another device."""
        load_weights(self.network, state["model"])
        self._updates.copy_(state["updates"])


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [average for average, _ in pairs], [newest for _, newest in pairs]


def _move(averages: list[Tensor], newest: list[Tensor], fraction: Tensor) -> None:
    """Move each average towards the newest tensor by a ``fraction`` of the difference."""
    if averages:  # the operations refuse an empty list
        difference = torch._foreach_sub(newest, averages)
        torch._foreach_mul_(difference, fraction)
        torch._foreach_add_(averages, difference)
