"""Compare codings by accuracy: python -m benchmarks.coding [OPTIONS] -- --config FILE [OPTIONS OF train.py].

The same network is trained with each coding and seed as train.py would, with one budget on one data set, in a run folder
each. gac-temporal and gac-spatial-channel are gated attention coding with only that attention. Seeds are train.seed and
the numbers after it; runs of one seed see the same images in the same order. Top-1 is that of the last epoch, as the best
epoch is chosen on the test images. A difference is gac minus the other coding at the same seed, in percentage points,
with the 95 % interval of Student's t, which says nothing of other data, sizes and budgets. images/s is the median of a
run's epochs, in training, then the mean of the runs. Started again after any stop, it goes on with the run it was in. For
several devices start it once with each --device and the same --output: each process takes runs that no other has.
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
from benchmarks.common import MeasurementError, Report, Table, grouped, make_parser, program
from gac.checkpoint import build_network
from gac.coding import Coding
from gac.command_line import at_least
from gac.config import Config
from gac.errors import InputError
from gac.files import ResultsNotWritten
from gac.models import create_model
from gac.options import parse_train
from gac.training.checkpoints import Checkpoints
from gac.training.engine import train
from gac.training.run_folder import FolderInUse, check_same_run
from gac.training.signals import Interrupted
from gac.training.totals import TrainingDiverged

# Coding and gate of the network by the name that a coding has here.
CODINGS = {
    "gac": ("gac", "both"),
    "gac-temporal": ("gac", "temporal"),
    "gac-spatial-channel": ("gac", "spatial_channel"),
    **{coding: (coding, "both") for coding in get_args(Coding) if coding != "gac"},
}
RUNS = Table(("coding", 19), ("seed", 5), ("last top-1", 10), ("best top-1", 10), ("images/s", 9))
SUMMARY = Table(
    *(("coding", 19), ("runs", 4), ("top-1", 6), ("std", 5), ("gac minus it", 12), ("std", 5), ("[95 % interval]", 16)),
    *(("parameters", 10), ("images/s", 9)),
)


def configuration(config: Config, coding: str, seed: int) -> Config:
    """Return the run of a coding with a seed."""
    name, gate = CODINGS[coding]
    return replace(config, model=replace(config.model, coding=name, gate=gate), train=replace(config.train, seed=seed))


def run(config: Config, folder: Path, coding: str) -> dict[str, Any] | None:
    """Train, or go on with what is in the folder, and return the result; None while another process is at it.

    Raises what :func:`gac.training.engine.train` does, and MeasurementError for a run that diverges.
    """
    try:
        train(config, folder, resume="auto")
    except FolderInUse:
        pass
    except (TrainingDiverged, ResultsNotWritten) as error:
        raise MeasurementError(f"{coding}, seed {config.train.seed}: {error}") from error
    found = Checkpoints(folder).read()
    if found is None or found[1]["epoch"] < config.train.epochs:
        return None
    check_same_run(found[1], config, found[0])
    network, history = build_network(found[1]), found[1]["training"]["history"]
    return {
        "coding": coding,
        "seed": config.train.seed,
        "top1": history[-1]["test_top1"],
        "best_top1": max(epoch["test_top1"] for epoch in history),
        "images_per_second": statistics.median(epoch["images_per_second"] for epoch in history),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "history": history,
    }


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean, standard deviation and paired difference to gac of each coding; None for what too few runs give."""
    by_coding = {coding: runs for (coding,), runs in grouped(rows, "coding").items()}
    gac = {row["seed"]: row["top1"] for row in by_coding.get("gac", [])}
    summary = []
    for coding, runs in by_coding.items():
        pairs = [gac[row["seed"]] - row["top1"] for row in runs if coding != "gac" and row["seed"] in gac]
        mean, std = _mean_and_std(pairs)
        half = None if std is None else student.ppf(0.975, len(pairs) - 1).item() * std / math.sqrt(len(pairs))
        top1, top1_std = _mean_and_std([row["top1"] for row in runs])
        summary.append(
            {
                "coding": coding,
                "runs": len(runs),
                "top1": top1,
                "top1_std": top1_std,
                "gain": mean,
                "gain_std": std,
                "gain_interval": None if half is None else (mean - half, mean + half),
                "parameters": runs[0]["parameters"],
                "images_per_second": statistics.mean(row["images_per_second"] for row in runs),
            }
        )
    return summary


def _mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    return statistics.mean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def verdict(each: dict[str, Any]) -> str:
    """Return in words whether a coding's difference to gac is more than noise."""
    low, high = each["gain_interval"]
    if low <= 0 <= high:
        return f"gac against {each['coding']}: within noise, the interval has 0 in it"
    return f"gac is {'better' if low > 0 else 'worse'} than {each['coding']} by more than noise"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _measure_and_report(options: Namespace, report: Report) -> None:
    parsed = parse_train(["--output", str(options.output), *options.train])
    config = replace(parsed.config, device=str(report.device))
    if parsed.resume or parsed.dry_run or parsed.overfit_one_batch or parsed.output != options.output:
        raise InputError("--output, --resume and trial runs are not for after --: the benchmark resumes by itself")
    if config.model.coding is not None or config.model.gate != "both":
        raise InputError("model.coding and model.gate are what is compared: leave them out and choose --codings")
    seeds = range(config.train.seed, config.train.seed + options.seeds)
    runs = {
        (coding, seed): configuration(config, coding, seed)
        for seed, coding in product(seeds, dict.fromkeys(options.codings))
    }
    for each in runs.values():
        # What one of them cannot have is said before the first one is trained.
        with torch.device("meta"):
            create_model(num_classes=2, **asdict(each.model))
    report.begin(config=config.to_dict())
    report.line("runs", f"{len(runs)}, in {options.output}\n")
    RUNS.header()
    rows: list[dict[str, Any]] = []
    for (coding, seed), each in runs.items():
        try:
            row = run(each, options.output / f"{coding}-{seed}", coding)
        except Interrupted as stopped:
            print(f"{stopped}: the same command goes on with {coding}, seed {seed}", file=sys.stderr)
            raise SystemExit(stopped.exit_status) from stopped
        if row is None:
            RUNS.row(coding, seed, "in use by another process", "-", "-")
            continue
        RUNS.row(coding, seed, *(f"{row[key]:.2f}" for key in ("top1", "best_top1")), f"{row['images_per_second']:.0f}")
        rows.append(row)
        report.add("runs", [row])
    summary = summarise(rows)
    report.add("codings", summary)
    print()
    SUMMARY.header()
    for each in summary:
        interval = "-" if each["gain_interval"] is None else "[{:+.2f}, {:+.2f}]".format(*each["gain_interval"])
        cells = [_number(each[key], form) for key, form in (("top1", ".2f"), ("top1_std", ".2f"), ("gain", "+.2f"))]
        cells += [_number(each["gain_std"], ".2f"), interval, f"{each['parameters']:,}"]
        SUMMARY.row(each["coding"], each["runs"], *cells, f"{each['images_per_second']:.0f}")
    print("", *(verdict(each) for each in summary if each["gain_interval"] is not None), sep="\n", flush=True)
    if options.plot is not None and rows:
        title = f"{config.model.name} on {config.data.name}, T = {config.model.T}, {config.train.epochs} epochs"
        plot.write(plot.coding_figure(rows, summary, title, report.environment), options.plot)


PARSER = make_parser("benchmarks.coding", __doc__, "all results", "the accuracies and the paired differences")
PARSER.add("--codings", "what is compared", choices=CODINGS, default=list(CODINGS))
PARSER.add("--seeds", "runs of each coding", type=at_least(1), default=5, metavar="N")
PARSER.add("--output", "folder of the run folders", type=Path, default=Path("runs/coding"), metavar="FOLDER")
PARSER.add("train", "after --: options of train.py, the same for all runs; --config is needed", nargs="*")
main = program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
