"""Look at a trained network within seconds: python -m gac.demo. Nothing is downloaded, nothing is trained.

The digits network that travels in the package is scored on the test set; a page shows what it does inside.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gac.analysis.report import SHOWN, check_replaceable, energy_of, write_report
from gac.checkpoint import find_released, read_checkpoint, read_config
from gac.command_line import Parser, finish
from gac.evaluation.report import evaluate_checkpoint, format_report
from gac.evaluation.sample import undecided
from gac.files import user_path, writing

NETWORK = "digits"
OUTPUT = Path("runs/demo-report")
# Test images of which the inside is measured.
_SAMPLE = 256


def demo(output: Path) -> None:
    """Score the network, print what was found and write the report page into a folder.

    Raises:
        InputError: If the folder holds something else than an earlier page.
        ResultsNotWritten: If it cannot be written.
    """
    check_replaceable(output)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    file, digest = find_released(NETWORK).file(), hashlib.sha256()
    payload = read_checkpoint(file, digest)
    # On a GPU the kernels would be compiled first, which takes longer than all of this.
    config = replace(read_config(payload), device="cpu")
    report = evaluate_checkpoint(file, payload, config, sample=_SAMPLE)
    print(format_report(report))
    print(f"trained by  {payload['command']}")
    sample, energy = report.sample, energy_of(report)
    print(
        f'energy      {energy.paper_mj:.6f} mJ an image in the convention "paper", {energy.full_mj:.6f} mJ in'
        f' "full" (docs/energy.md), mean over\n            {sample}'
    )
    with sample.running():
        shown, probabilities = undecided(sample, SHOWN)
    for place, label, classes in zip(
        shown.places, shown.labels.tolist(), probabilities.argmax(-1).t().tolist(), strict=True
    ):
        answers = " ".join(report.class_names[k] for k in classes)
        print(f"test image  {place}: label {report.class_names[label]}, taken for {answers} after 1..t steps")
    write_report(report, digest.hexdigest(), energy, output, may_replace=True)
    print(f"pictures    {output / 'figures'}: gates, spikes, firing rates, energy, saliency and others")
    print(f"all of it   {output / 'index.html'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status: 0, 1 if the page cannot be written, 2 for bad arguments."""
    parser = Parser("gac.demo", __doc__)
    parser.add("--output", "folder for the page; an earlier one there is replaced", default=str(OUTPUT))
    # A network this small takes longer with several threads, and many times as long beside another program.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return finish(lambda: demo(user_path(parser.parse_args(arguments).output, "--output")))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
