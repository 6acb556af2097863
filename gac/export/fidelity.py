"""How far what another program computes is from our network: on trained weights and real images, as a table.

Random weights prove nothing: their last neurons are silent, and no membrane potential lies exactly on the threshold.
On trained ones that is frequent, and there a neuron that fires on h >= threshold, or a last bit that rounds otherwise,
gives other spikes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import monitor, neuron
from torch import Tensor, nn

from gac.errors import InputError
from gac.files import atomic_write, writing

Outputs = tuple[Tensor, dict[str, Tensor]]
"""Logits [..., B, K], and by the name of each spiking layer whose spikes are visible these [T, B, ...]."""


@dataclass(frozen=True)
class SpikesCompared:
    """Spikes of one layer: ``of`` neurons and time steps ``fired`` fire in our network, and ``differ`` do otherwise."""

    of: int
    fired: int
    differ: int


@dataclass(frozen=True)
class Fidelity:
    """What two programs compute from the same images, ``data`` says which.

    ``max_difference`` is the largest difference of two logits, beside ``largest_logit``, the largest of ours by size;
    ``predictions_differ`` counts the images that get another class (largest logit, summed over time). ``correct`` and
    ``correct_exported`` count those that get their label. ``spikes`` are those of the layers whose spikes both show.
    """

    program: str
    data: str
    images: int
    max_difference: float
    largest_logit: float
    predictions_differ: int
    correct: int
    correct_exported: int
    spiking_layers: int
    spikes: dict[str, SpikesCompared]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("compared", f"{self.program} with this package, float32 on the CPU, on {self.data}"),
            ("logits", f"differ by at most {self.max_difference:.3g}; the largest is {self.largest_logit:.3g}"),
            ("predictions", f"{self.predictions_differ} of {self.images} differ"),
            ("top-1", f"{self._percent(self.correct_exported)} % there, {self._percent(self.correct)} % here"),
            ("spikes", self._spikes()),
        ]
        rows += [
            (f"  {layer}", f"{each.differ} of {each.of} differ ({each.fired} fired)")
            for layer, each in self.spikes.items()
            if each.differ
        ]
        if silent := [layer for layer, each in self.spikes.items() if not each.fired]:
            rows.append(("warning", f"no neuron fired in {', '.join(silent)}: about these layers this says nothing"))
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)

    def _percent(self, correct: int) -> str:
        return f"{100 * correct / self.images:.2f}"

    def _spikes(self) -> str:
        if not self.spikes:
            return "not visible there" if self.spiking_layers else "the network has none"
        of, fired, differ = (
            sum(getattr(each, key) for each in self.spikes.values()) for key in ("of", "fired", "differ")
        )
        return f"{differ} of {of} differ ({fired} fired), in {len(self.spikes)} of {self.spiking_layers} layers"


def network_outputs(network: nn.Module) -> Callable[[Tensor], Outputs]:
    """Return what calls a network on images, as a fresh sequence without gradients, and shows all of its spikes."""

    def call(x: Tensor) -> Outputs:
        with monitor.OutputMonitor(network, neuron.BaseNode) as recorded, torch.no_grad():
            logits = network(x)
        return logits, {layer: recorded[layer][0] for layer in recorded.monitored_layers if recorded[layer]}

    return call


def compare(
    network: nn.Module,
    exported: Callable[[Tensor], Outputs],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    program: str,
    data: str,
    seed: int = 0,
) -> Fidelity:
    """Run our network and its export on the same images and return how far apart they are.

    Args:
        network: In evaluation mode; its logits are [T, B, K].
        exported: Returns logits [T, B, K], or their mean over time [B, K], and the spikes that are visible in it, in
            the shapes of our network's.
        batches: What the network takes, and labels [B].
        program: What runs the export, in words.
        data: Which images they are, in words.
        seed: For what a coding draws at random, of PyTorch's generator in both.

    Raises:
        InputError: If there are no images, and if the export gives logits that are not finite.
    """
    reference = network_outputs(network)
    images = predictions_differ = correct = correct_exported = 0
    differences, largest = [], []
    counts: dict[str, Tensor] = {}
    layers: dict[str, Tensor] = {}
    for number, (x, labels) in enumerate(batches):
        (expected, layers), (actual, spikes) = (_seeded(each, x, seed + number) for each in (reference, exported))
        if actual.dim() == 2:
            expected = expected.mean(0)
        actual = actual.float()
        if not actual.isfinite().all():
            raise InputError(f"{program}: gives logits that are not finite for images that our network classifies")
        differences.append((actual - expected).abs().max())
        largest.append(expected.abs().max())
        classes, classes_exported = (
            each.reshape(-1, *each.shape[-2:]).sum(0).argmax(-1) for each in (expected, actual)
        )
        predictions_differ += int((classes != classes_exported).sum())
        correct += int((classes == labels).sum())
        correct_exported += int((classes_exported == labels).sum())
        images += len(labels)
        for layer, found in spikes.items():
            ours, theirs = layers[layer] != 0, found.reshape(layers[layer].shape) != 0
            counted = torch.tensor([ours.numel(), int(ours.sum()), int((ours != theirs).sum())])
            counts[layer] = counts.get(layer, 0) + counted
    if not images:
        raise InputError("there are no images to compare the export with our network on")
    return Fidelity(
        program=program,
        data=data,
        images=images,
        max_difference=float(torch.stack(differences).max()),
        largest_logit=float(torch.stack(largest).max()),
        predictions_differ=predictions_differ,
        correct=correct,
        correct_exported=correct_exported,
        spiking_layers=len(layers),
        spikes={layer: SpikesCompared(*each.tolist()) for layer, each in counts.items()},
    )


def write_and_tell(path: Path, content: bytes, fidelity: Fidelity | None, **more: Any) -> None:
    """Write an exported file and, beside it, its fidelity with ``more`` entries as JSON; print both.

    Without a fidelity that of an earlier file of this name is deleted: it would be taken for this one's.

    Raises ResultsNotWritten if one of them cannot be written.
    """
    beside = path.with_name(f"{path.name}.fidelity.json")
    with writing(path), atomic_write(path) as file:
        file.write(content)
    print(f"wrote {path}: {len(content) / 1e6:.1f} MB")
    if fidelity is None:
        with writing(beside):
            beside.unlink(missing_ok=True)
        print("not compared with our network, as no images were asked for")
        return
    entries = fidelity.to_dict() | more | {"sha256": hashlib.sha256(content).hexdigest()}
    with writing(beside), atomic_write(beside) as file:
        file.write(f"{json.dumps(entries, indent=2, allow_nan=False)}\n".encode())
    print(fidelity)
    print(f"wrote {beside}")


def _seeded(call: Callable[[Tensor], Outputs], x: Tensor, seed: int) -> Outputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return call(x)
