"""Look at a trained network within seconds: python -m gac.demo. Nothing is downloaded, nothing is trained.

The digits network that travels in the package is scored on the test set; pictures show what it does inside.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from gac.analysis import figures
from gac.analysis.energy import Energy, measure_energy
from gac.analysis.firing import measure_firing, record_spikes
from gac.analysis.gates import measure_gates
from gac.checkpoint import read_config
from gac.checkpoint.weights import FOLDER, SUFFIX, read_weights
from gac.command_line import Parser, finish
from gac.evaluation.report import Report, evaluate_checkpoint, format_report
from gac.evaluation.sample import Sample
from gac.files import atomic_write, user_path, writing

NETWORK = "digits"
OUTPUT = Path("runs/demo-pictures")
# Test images of which the inside is measured; pictures of single images show so many.
_SAMPLE, _SHOWN = 256, 4
_RASTER = "coding.lif"


def demo(output: Path) -> None:
    """Score the network, write the pictures into a folder and print what was found. Raises ResultsNotWritten."""
    file = FOLDER / f"{NETWORK}{SUFFIX}"
    payload = read_weights(file)
    # On a GPU the kernels would be compiled first, which takes longer than all of this.
    config = replace(read_config(payload), device="cpu")
    report = evaluate_checkpoint(file, payload, config, sample=_SAMPLE)
    print(format_report(report))
    print(f"trained by  {payload['command']}")
    sample = report.sample
    with sample.running():
        energy = measure_energy(sample.network, sample.inputs())
        print(
            f'energy      {energy.paper_mj:.6f} mJ an image in the convention "paper", {energy.full_mj:.6f} mJ in'
            f' "full" (docs/energy.md), mean over\n            {sample}'
        )
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        shown, probabilities = undecided(sample)
        for place, label, classes in zip(
            shown.places, shown.labels.tolist(), probabilities.argmax(-1).t().tolist(), strict=True
        ):
            answers = " ".join(report.class_names[k] for k in classes)
            print(f"test image  {place}: label {report.class_names[label]}, taken for {answers} after 1..t steps")
        for name, figure in pictures(report, energy, shown, probabilities):
            path = output / f"{name}.png"
            with writing(path), atomic_write(path) as opened:
                figure.savefig(opened, format="png")
            print(f"wrote       {path}")


def pictures(report: Report, energy: Energy, shown: Sample, probabilities: Tensor) -> Iterator[tuple[str, Figure]]:
    """Yield the pictures with their names, those of single images of the ones ``shown``, with these probabilities.

    Call it while the report's sample is running.
    """
    sample = report.sample
    yield "accuracy", figures.accuracy_figure(report.scores.top1_by_time)
    captions = [f"label {report.class_names[label]}" for label in shown.labels]
    yield "predictions", figures.prediction_figure(shown.images, probabilities, shown.data, captions)
    (gates,) = measure_gates(shown.network, shown.inputs(), maps=len(captions))
    yield "gates", figures.gate_maps_figure(shown.images, gates, shown.data, captions)
    spikes = record_spikes(shown.network, next(shown.inputs()), _RASTER)
    yield "raster", figures.raster_figure(spikes[:, 0], f"{_RASTER}, image with {captions[0]}")
    yield "firing", figures.firing_rate_figure(measure_firing(sample.network, sample.inputs()))
    yield "energy", figures.energy_figure(energy)


@torch.no_grad()
def undecided(sample: Sample) -> tuple[Sample, Tensor]:
    """Return a few of the images, and the class probabilities [T, N, K] of the mean output over steps 1..t.

    They are those whose class changes most often with time, as there is most to see in them.
    """
    logits = torch.cat([sample.network(batch) for batch in sample.inputs()], 1)
    steps = torch.arange(1, len(logits) + 1, device=logits.device)
    probabilities = (logits.cumsum(0) / steps[:, None, None]).softmax(-1)
    classes = probabilities.argmax(-1)
    changes = (classes[1:] != classes[:-1]).sum(0)
    chosen = changes.argsort(descending=True, stable=True)[:_SHOWN]
    places = [sample.places[i] for i in chosen.tolist()]
    shown = replace(sample, images=sample.images[chosen], labels=sample.labels[chosen], places=places)
    return shown, probabilities[:, chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status: 0, 1 if the pictures cannot be written, 2 for bad arguments."""
    parser = Parser("gac.demo", __doc__)
    parser.add("--output", "folder for the pictures", default=str(OUTPUT))
    # A network this small takes longer with several threads, and many times as long beside another program.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return finish(lambda: demo(user_path(parser.parse_args(arguments).output, "--output")))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
