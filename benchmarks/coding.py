"""Compare codings by accuracy: python -m benchmarks.coding [OPTIONS] -- --config FILE [OPTIONS OF train.py].

One network is trained with each coding and seed as train.py would, with one budget on one data set, each in a folder
of its own below --output. gac-temporal and gac-spatial-channel are gated attention coding with only that attention.
Seeds are train.seed and the numbers after it; runs of one seed see the same images in the same order. Top-1 is that of
the last epoch, as the best one is chosen on the test images. A difference is gac minus the other coding at the same
seed, in percentage points; its 95 % interval (Student's t, each by itself) is over seeds and says nothing of other test
images, sizes and budgets. Energy is what eval.py --energy counts for last.pt, images/s the median of a run's training
epochs; both are means over runs. Started again after any stop, even kill -9, it goes on from the last checkpoint. With
several devices start it for each --device, with one --output: each process takes the runs that no other has, and the
same command in the end shows all.
"""

import math
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from scipy.stats import t as student

from benchmarks import plot
from benchmarks.coding_figure import coding_figure
from benchmarks.common import MeasurementError, Report, Table, grouped, make_parser, program
from gac.analysis.energy import IMAGES, measure_energy
from gac.checkpoint import read_checkpoint, read_config
from gac.coding import Coding
from gac.command_line import at_least
from gac.config import Config
from gac.errors import InputError
from gac.evaluation.report import evaluate_checkpoint
from gac.files import ResultsNotWritten
from gac.models import create_model
from gac.options import parse_train
from gac.training.checkpoints import Checkpoints
from gac.training.engine import train
from gac.training.run_folder import FolderInUse
from gac.training.signals import Interrupted
from gac.training.totals import TrainingDiverged

# Coding and gate of the network by the name that a coding has here.
CODINGS = {
    "gac": ("gac", "both"),
    "gac-temporal": ("gac", "temporal"),
    "gac-spatial-channel": ("gac", "spatial_channel"),
    **{coding: (coding, "both") for coding in get_args(Coding) if coding != "gac"},
}
# What a summary has the mean over runs of, beside top-1.
MEANS = ("paper_mj", "full_mj", "images_per_second")
RUNS = Table(("coding", 19), ("seed", 5), ("last top-1", 10), ("best top-1", 10), ("images/s", 9))
SUMMARY = Table(
    *(("coding", 19), ("runs", 4), ("top-1", 6), ("std", 5), ("gac minus it", 12), ("[95 % interval]", 16)),
    *(("parameters", 10), ("paper mJ", 8), ("full mJ", 8), ("images/s", 9)),
)


def configuration(config: Config, coding: str, seed: int) -> Config:
    """Return the run of a coding with a seed."""
    name, gate = CODINGS[coding]
    return replace(config, model=replace(config.model, coding=name, gate=gate), train=replace(config.train, seed=seed))


def run(config: Config, folder: Path) -> dict[str, Any] | None:
    """Train, or go on with what is in the folder, and return the result; None while another process is at it.

    Raises what :func:`gac.training.engine.train` does, and InputError for a run of another number of epochs, which
    would go on with another learning rate.
    """
    if (found := Checkpoints(folder).read()) is not None:
        epochs, asked = read_config(found[1]).train.epochs, config.train.epochs
        if epochs != asked:
            raise InputError(f"{folder} holds a run of {epochs} epochs, not {asked}: choose another --output")
    try:
        train(config, folder, resume="auto")
    except FolderInUse:
        return None
    payload = read_checkpoint(folder / "last.pt")
    history = payload["training"]["history"]
    scored = evaluate_checkpoint(folder / "last.pt", payload, config, sample=IMAGES)
    with scored.sample.running():
        energy = measure_energy(scored.sample.network, scored.sample.inputs())
    return {
        "top1": history[-1]["test_top1"],
        "best_top1": max(epoch["test_top1"] for epoch in history),
        "images_per_second": statistics.median(epoch["images_per_second"] for epoch in history),
        "parameters": scored.parameters,
        "energy_images": energy.images,
        "paper_mj": energy.paper_mj,
        "full_mj": energy.full_mj,
        "history": history,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation and the 95 % interval of the mean; None for what there are too few values for."""
    mean = statistics.mean(values) if values else None
    if len(values) < 2:
        return {"mean": mean, "std": None, "interval": None}
    std = statistics.stdev(values)
    half = student.ppf(0.975, len(values) - 1).item() * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "interval": (mean - half, mean + half)}


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each coding the spread of top-1, and of gac's gain over it at the same seed."""
    gac = {row["seed"]: row["top1"] for row in rows if row["coding"] == "gac"}
    return [
        {
            "coding": coding,
            "runs": len(runs),
            "top1": spread([row["top1"] for row in runs]),
            "gain": spread([gac[row["seed"]] - row["top1"] for row in runs if coding != "gac" and row["seed"] in gac]),
            "parameters": runs[0]["parameters"],
            **{name: statistics.mean(row[name] for row in runs) for name in MEANS},
        }
        for (coding,), runs in grouped(rows, "coding").items()
    ]


def verdict(each: dict[str, Any]) -> str:
    """Return in words whether gac's gain over a coding is more than noise."""
    low, high = each["gain"]["interval"]
    if low == high:
        return f"gac against {each['coding']}: every seed has the same difference, so the noise is not known"
    if low <= 0 <= high:
        return f"gac against {each['coding']}: within noise"
    return f"gac against {each['coding']}: {'better' if low > 0 else 'worse'} by more than noise"


def _show(each: dict[str, Any]) -> None:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    top1, gain = each["top1"], each["gain"]
    interval = "-" if gain["interval"] is None else "[{:+.2f}, {:+.2f}]".format(*gain["interval"])
    cells = number(top1["mean"], ".2f"), number(top1["std"], ".2f"), number(gain["mean"], "+.2f")
    energies = (f"{each[name]:.3g}" for name in ("paper_mj", "full_mj"))
    cells += interval, f"{each['parameters']:,}", *energies, f"{each['images_per_second']:.0f}"
    SUMMARY.row(each["coding"], each["runs"], *cells)


def _measure_and_report(options: Namespace, report: Report) -> None:
    parsed = parse_train(options.train)
    if parsed.resume or parsed.dry_run or parsed.overfit_one_batch or parsed.config.device != "auto":
        raise InputError("the benchmark resumes by itself: no --resume and trial runs, and --device before --")
    config = replace(parsed.config, device=str(report.device))
    if config.model.coding is not None or config.model.gate != "both":
        raise InputError("model.coding and model.gate are what is compared: leave them out and choose --codings")
    seeds = range(config.train.seed, config.train.seed + options.seeds)
    places = product(seeds, dict.fromkeys(options.codings))
    runs = {(coding, seed): configuration(config, coding, seed) for seed, coding in places}
    for each in runs.values():
        # What one of them cannot have is said before the first one is trained.
        with torch.device("meta"):
            create_model(num_classes=2, **asdict(each.model))
    report.begin(config=config.to_dict())
    report.line("runs", f"{len(runs)}, in {parsed.output}\n")
    RUNS.header()
    rows: list[dict[str, Any]] = []
    for (coding, seed), each in runs.items():
        try:
            row = run(each, parsed.output / f"{coding}-{seed}")
        except Interrupted as stopped:
            print(f"{stopped}; the same command goes on with {coding}, seed {seed}", file=sys.stderr)
            raise SystemExit(stopped.exit_status) from stopped
        except (TrainingDiverged, ResultsNotWritten) as error:
            raise MeasurementError(f"{coding}, seed {seed}: {error}") from error
        if row is None:
            RUNS.row(coding, seed, "in use by another process", "-", "-")
            continue
        RUNS.row(coding, seed, *(f"{row[key]:.2f}" for key in ("top1", "best_top1")), f"{row['images_per_second']:.0f}")
        rows.append({"coding": coding, "seed": seed, **row})
        report.add("runs", rows[-1:])
    report.add("codings", summary := summarise(rows))
    print()
    SUMMARY.header()
    for each in summary:
        _show(each)
    print("", *(verdict(each) for each in summary if each["gain"]["interval"] is not None), sep="\n", flush=True)
    if options.plot is not None and rows:
        title = f"{config.model.name} on {config.data.name}, T = {config.model.T}, {config.train.epochs} epochs"
        plot.write(coding_figure(rows, summary, title, report.environment), options.plot)


PARSER = make_parser("benchmarks.coding", __doc__, "all results", "the accuracies and the paired differences")
PARSER.add("--codings", "what is compared", choices=CODINGS, default=list(CODINGS))
PARSER.add("--seeds", "runs of each coding", type=at_least(1), default=5, metavar="N")
PARSER.add("train", "after --: options of train.py, the same for all runs; --config is needed", nargs="*")
main = program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
