"""What the gates of gated attention coding do: their mean over time and channel, and maps over images."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gac.analysis.firing import FiringRates
from gac.analysis.running import run
from gac.coding.gated import GatedAttentionUnit
from gac.errors import InputError
from gac.execution.distributed import SINGLE_PROCESS, Ranks


@dataclass(frozen=True, eq=False)
class Gates:
    """The gate sigmoid(TA x SCA) of a gated attention unit, on N images; values in (0, 1), 1/2 where attention is 0.

    ``mean``, float64 [T, C], is over images and pixels. ``temporal``, float32 [N, T], are the scores of the temporal
    attention. ``maps``, float32 [M, T, H, W], are the gates of the first M images, the mean over channels.
    """

    layer: str
    mean: Tensor
    temporal: Tensor
    maps: Tensor

    @property
    def by_time(self) -> list[float]:
        """The mean at each time step."""
        return self.mean.mean(1).tolist()

    @property
    def by_channel(self) -> list[float]:
        """The mean of each channel."""
        return self.mean.mean(0).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return the means as plain values, without what is of single images."""
        return {"layer": self.layer, "by_time": self.by_time, "by_channel": self.by_channel}


class _Watch:
    """Adds up what one unit's gate is; the attention's two branches are modules also where the rest runs fused."""

    def __init__(self, unit: GatedAttentionUnit, maps: int, hooks: ExitStack) -> None:
        self.wanted = maps
        self.total: Tensor | float = 0.0
        self.pixels = 0
        self.temporal: list[Tensor] = []
        self.maps: list[Tensor] = []
        for module, hook in ((unit.temporal, self._keep_temporal), (unit.spatial_channel, self._add)):
            hooks.callback(module.register_forward_hook(hook).remove)

    def _keep_temporal(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.temporal.append(output.t().float().cpu())

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        scores = self.temporal[-1].t().to(output.device)  # [T, B]
        # An image's frame [B, C, H, W] stands for all time steps.
        frames = output.float() if output.dim() == 5 else output.float().expand(len(scores), *output.shape)
        kept = min(output.shape[-4], self.wanted - sum(map(len, self.maps)))
        sums, maps = [], []
        # Step by step: the gate of all steps may not fit the memory.
        for score, frame in zip(scores, frames, strict=True):
            gate = torch.sigmoid(score[:, None, None, None] * frame)
            sums.append(gate.sum((0, 2, 3)).cpu().double())
            maps.append(gate[:kept].mean(1).cpu())
        self.total = self.total + torch.stack(sums)
        self.pixels += output.shape[-4] * output.shape[-2] * output.shape[-1]
        self.maps.append(torch.stack(maps, 1))

    def result(self, name: str) -> Gates:
        return Gates(name, self.total / self.pixels, torch.cat(self.temporal), torch.cat(self.maps))


class GateMeans:
    """Mean of each gate at each time step, over images and pixels, in the first images of an evaluation.

    As :class:`gac.analysis.firing.FiringRates`: hooks only for these images. They keep no layer off the fused path.
    """

    def __init__(self, network: nn.Module, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.units = _units(network)
        self.ranks = ranks
        self._watched: dict[str, _Watch] = {}

    def watch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches; the caller runs the network on each before it takes the next."""
        seen = 0
        with ExitStack() as hooks:
            self._watched = {name: _Watch(unit, 0, hooks) for name, unit in self.units.items()}
            for images, labels in batches:
                if seen < FiringRates.IMAGES / self.ranks.size:
                    seen += len(labels)
                else:
                    hooks.close()
                yield images, labels

    def read(self) -> dict[str, float]:
        """Return the means in the evaluation just watched, as NAME/tSTEP; waits for the device.

        Every rank must call it.
        """
        means = {}
        for name, watch in self._watched.items():
            found = self.ranks.gather((watch.total, watch.pixels))
            mean = sum(total for total, _ in found) / sum(pixels for _, pixels in found)
            means |= {f"{name}/t{step}": value for step, value in enumerate(mean.mean(1).tolist(), 1)}
        return means


def _units(network: nn.Module) -> dict[str, GatedAttentionUnit]:
    return {name: unit for name, unit in network.named_modules() if isinstance(unit, GatedAttentionUnit)}


def measure_gates(network: nn.Module, batches: Iterable[Tensor], maps: int = 8) -> list[Gates]:
    """Return what each gated attention unit of a network does, with the ``maps`` of the first so many images.

    The arguments are those of :func:`gac.analysis.running.run`.

    Raises:
        InputError: If there are no images, or the network has no gated attention.
    """
    units = _units(network)
    if not units:
        raise InputError(f"{type(network).__name__} has no gated attention, whose gates could be shown")
    with ExitStack() as hooks:
        watched = {name: _Watch(unit, maps, hooks) for name, unit in units.items()}
        run(network, batches)
    return [watch.result(name) for name, watch in watched.items() if watch.pixels]
