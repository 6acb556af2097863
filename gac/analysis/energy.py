"""The energy of an inference, counted operation by operation on images: every layer, in two conventions."""

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from spikingjelly.activation_based import op_counter
from torch import Tensor, nn

from gac.analysis.running import run
from gac.errors import InputError, first_few

MAC_PJ = 4.6
"""Picojoule of a multiply-accumulate of 32-bit floats in 45 nm (Horowitz, ISSCC 2014), as the field uses it."""
AC_PJ = 0.9
"""The same for an accumulate, which is all that a spike causes at a synapse."""

IMAGES = 256
"""How many test images eval.py measures, at most."""

_MJ_PER_PJ = 1e-9
# Operations with weights that SpikingJelly's counters have no rule for.
_UNCOUNTED = re.compile(r"aten\._?(\w*(conv|attention|rnn|lstm|gru)\w*|linear|matmul|trilinear|\w+m[mv]|mv|v?dot)\.\w+")


@dataclass(frozen=True)
class LayerEnergy:
    """What a layer computes for all measured images together, and its energy for one of them.

    ``spiking`` says whether every input value was 0 or 1, ``rate`` is the share of the inputs that are not 0: for
    spikes the firing rate of the neurons that feed the layer. ``fan_in`` is the number of inputs of an output,
    ``fan_out`` the mean number of outputs that an input reaches; both count the padding. ``dense_macs`` is the number
    of multiply-accumulates were every input a real number, ``macs`` of those that SpikingJelly's MACCounter counts
    (none for spikes), ``synops`` the number of spikes times the synapses that each reaches, exact at borders, by its
    SynOpCounter. Energies are in millijoule; ``paper_mj`` is None for a layer that this convention has no term for.
    """

    layer: str
    spiking: bool
    rate: float
    fan_in: float
    fan_out: float
    dense_macs: int
    macs: int
    synops: int
    paper_mj: float | None
    full_mj: float


@dataclass(frozen=True)
class Energy:
    """The energy of one inference in millijoule, the mean over ``images``, in two conventions; see docs/energy.md.

    "paper" is the formula of the field, which the authors use: 4.6 pJ x MAC of the first layer + 0.9 pJ x T x firing
    rate x MAC of every layer that spikes drive. What has real-valued input beyond the first layer is not in it.
    "full" is 4.6 pJ for each multiply-accumulate of every layer, as often as it is computed, and 0.9 pJ for each
    synaptic operation. Neither has BatchNorm (which folds into the convolutions), neurons, products with the gate, or
    memory.
    """

    images: int
    layers: list[LayerEnergy]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all images."""
        return sum(layer.macs for layer in self.layers)

    @property
    def synops(self) -> int:
        """Synaptic operations of all images."""
        return sum(layer.synops for layer in self.layers)

    @property
    def paper_mj(self) -> float:
        """Millijoule of an image in the convention "paper"."""
        return sum(layer.paper_mj or 0.0 for layer in self.layers)

    @property
    def full_mj(self) -> float:
        """Millijoule of an image in the convention "full"."""
        return sum(layer.full_mj for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts of all images and the energies of one, in total and by layer, as plain values."""
        names = ("images", "macs", "synops", "paper_mj", "full_mj")
        return {name: getattr(self, name) for name in names} | {"layers": [asdict(layer) for layer in self.layers]}


@dataclass
class _Tally:
    calls: int = 0
    real_calls: int = 0
    inputs: int = 0
    nonzero: int = 0
    outputs: int = 0
    dense_macs: int = 0
    macs: int = 0
    synops: int = 0


class _ByLayer(op_counter.BaseCounter):
    """Counts each operation with SpikingJelly's rules, for the innermost module that is being called."""

    def __init__(self) -> None:
        super().__init__()
        self.mac, self.synop = op_counter.MACCounter(), op_counter.SynOpCounter()
        # BatchNorm, which has a rule for MAC only, folds into the convolution before it.
        self.rules = self.synop.rules
        self.layers: defaultdict[str, _Tally] = defaultdict(_Tally)

    def count(self, func: Any, args: tuple, kwargs: dict, out: Tensor, **scope: Any) -> int:
        name = max(scope["parent_names"] - {"Global"}, key=lambda each: each.count("."))
        tally = self.layers[name]
        addend = func in (torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default)
        x, weight = args[1:3] if addend else args[:2]
        tally.calls += 1
        tally.real_calls += not op_counter.is_binary_tensor(x)
        tally.inputs += x.numel()
        tally.nonzero += int(x.count_nonzero())
        tally.outputs += out.numel()
        tally.dense_macs += _dense_macs(func, args, x, weight, out)
        tally.macs += self.mac.count(func, args, kwargs, out)
        tally.synops += self.synop.count(func, args, kwargs, out)
        return 0


def _dense_macs(func: Any, args: tuple, x: Tensor, weight: Tensor, out: Tensor) -> int:
    if func is not torch.ops.aten.convolution.default:
        return out.numel() * x.shape[-1]
    # A transposed convolution's kernel is laid at each input, another's at each output.
    return (x if args[6] else out).numel() * weight[0].numel()


def measure_energy(network: nn.Module, batches: Iterable[Tensor]) -> Energy:
    """Return the energy of a network, of any kind, on images: what each layer computes is counted while it runs.

    The arguments are those of :func:`gac.analysis.running.run`. What a network computes for each of T equal frames is
    counted T times; this package's compute it once.

    Raises:
        InputError: If there are no images, and for operations with weights that cannot be counted.
    """
    counter = _ByLayer()
    with op_counter.DispatchCounterMode([counter]) as mode:
        images = run(network, batches)
    unsupported = mode.get_unsupported(counter)
    if missed := sorted(name for name in unsupported if _UNCOUNTED.fullmatch(name)):
        raise InputError(
            f"the energy of {type(network).__name__} cannot be counted, as SpikingJelly's op_counter has no rule for"
            f" {first_few(missed)}: use layers that compute by convolution, mm, addmm, bmm or baddbmm"
        )
    if not counter.layers:
        raise InputError(f"{type(network).__name__} runs no convolution or linear layer, whose energy could be counted")
    root = f"{type(network).__name__}."
    layers = []
    for number, (name, tally) in enumerate(counter.layers.items()):
        rate = tally.nonzero / tally.inputs
        spiking = tally.real_calls == 0
        # The formula takes the rate of a layer's input for that of its synapses, which borders make a little smaller.
        paper = AC_PJ * rate * tally.dense_macs if spiking else MAC_PJ * tally.macs if number == 0 else None
        layers.append(
            LayerEnergy(
                layer=name.removeprefix(root),
                spiking=spiking,
                rate=rate,
                fan_in=tally.dense_macs / tally.outputs,
                fan_out=tally.dense_macs / tally.inputs,
                dense_macs=tally.dense_macs,
                macs=tally.macs,
                synops=tally.synops,
                paper_mj=None if paper is None else paper * _MJ_PER_PJ / images,
                full_mj=(MAC_PJ * tally.macs + AC_PJ * tally.synops) * _MJ_PER_PJ / images,
            )
        )
    return Energy(images, layers)


def is_spike_driven(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, bool]:
    """Return for each convolution and linear layer whether its input was binary on these images.

    The layers are in the order in which they first ran; the arguments are those of :func:`measure_energy`. Zeros count
    as binary, so that a layer behind silent neurons is spike-driven.
    """
    return {layer.layer: layer.spiking for layer in measure_energy(network, batches).layers}


def format_energy(energy: Energy) -> str:
    """Return a table of the layers, the two conventions in words and what the published figures leave out."""
    head = ("layer", "input", "rate", "fan-in", "fan-out", "M MAC", "M SynOp", "paper mJ", "full mJ")
    rows = [
        (
            layer.layer,
            "spikes" if layer.spiking else "real",
            f"{layer.rate:.4f}",
            f"{layer.fan_in:g}",
            f"{layer.fan_out:.4g}",
            *_millions(energy, layer.macs, layer.synops),
            "-" if layer.paper_mj is None else f"{layer.paper_mj:.6f}",
            f"{layer.full_mj:.6f}",
        )
        for layer in energy.layers
    ]
    totals = (*_millions(energy, energy.macs, energy.synops), f"{energy.paper_mj:.6f}", f"{energy.full_mj:.6f}")
    rows.append(("total", "", "", "", "", *totals))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in (head, *rows))
    ]
    first = energy.layers[0]
    stem = "" if first.spiking else f"{MAC_PJ} pJ x MAC of {first.layer} + "
    paper = f'"paper": {stem}{AC_PJ} pJ x T x rate x MAC of each layer that only spikes enter.'
    if left_out := [layer for layer in energy.layers if layer.paper_mj is None]:
        names, theirs = ", ".join(layer.layer for layer in left_out), sum(layer.full_mj for layer in left_out)
        paper += f" It has no term for {names}, which take {theirs:.6f} mJ."
    full = f'"full": {MAC_PJ} pJ for each MAC of every layer whose input is not binary + {AC_PJ} pJ for each SynOp.'
    notes = (textwrap.fill(each, 120, break_on_hyphens=False) for each in (paper, full, PUBLISHED_NOTE))
    return "\n".join([*lines, *notes])


def _millions(energy: Energy, *counts: int) -> tuple[str, ...]:
    """Return counts of all images as millions for one of them."""
    return tuple(f"{count / energy.images / 1e6:.4f}" for count in counts)


# The published ImageNet networks: two convolutions of 64 channels with a kernel of 4 x 4, on what the stem makes of
# 224 x 224 pixels.
_PUBLISHED_SPATIAL_CHANNEL_MACS = 2 * 64 * 64 * 4 * 4 * 112 * 112

PUBLISHED_NOTE = (
    "The published energies of GAC on ImageNet, 1.49 and 2.34 mJ (ResNet-18, T = 4 and 6) and 2.20 and 3.38 mJ"
    " (ResNet-34), cannot contain the spatial-channel convolutions: 2 convolutions x 64 x 64 channels x 4 x 4 kernel x"
    f" 112 x 112 pixels = {_PUBLISHED_SPATIAL_CHANNEL_MACS / 1e9:.3f} G MAC, and {MAC_PJ} pJ x"
    f" {_PUBLISHED_SPATIAL_CHANNEL_MACS / 1e9:.3f} G = {MAC_PJ * _PUBLISHED_SPATIAL_CHANNEL_MACS * _MJ_PER_PJ:.2f} mJ"
    ' if they are computed only once for an image. Compare those figures with "paper" only.'
)
