"""python -m benchmarks.loader: images/s of the input pipeline alone (--help lists all options)."""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import Parser, at_least, new_file, run
from benchmarks.environment import describe_environment, format_environment
from benchmarks.output import Table, write_json
from benchmarks.photographs import write_photographs
from benchmarks.timing import Timing
from gac.config import DataConfig
from gac.data.class_folders import ClassFolders, open_folders
from gac.data.image_folder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFolderLoader,
    evaluation_transform,
    train_transform,
)
from gac.data.normalization import Normalization
from gac.errors import InputError
from gac.execution.device import select_device

MODULE = "benchmarks.loader"
METHOD = (
    "The loader of train.py yields normalised batches on the device, and nothing is done with them. A round is one"
    " batch from each worker (one batch without workers); the rate is that of the median round, in brackets that of"
    " the quartiles, after three untimed rounds: starting the workers and the batches that they prepare ahead. A file"
    " that was read before comes from memory, so a cold disk shows in a first run on a whole data set alone."
)
WARM_UP_ROUNDS = 3
SAMPLED_FILES = 1000
TABLE = Table(
    [
        ("split", 5),
        ("workers", 7),
        ("images/s", 9),
        ("[quartiles]", 16),
        ("per worker", 10),
        ("of the need", 11),
    ]
)


@dataclass(frozen=True)
class Cell:
    """What a loader reached: the times of rounds of ``images`` images each."""

    split: str
    workers: int
    images: int
    rounds: Timing
    skipped: int

    @property
    def images_per_second(self) -> float:
        """Rate of the median round."""
        return 1000 * self.images / self.rounds.median_ms

    @property
    def quartiles(self) -> tuple[float, float]:
        """Rates of the slower and of the faster quartile."""
        fast, slow = self.rounds.quartiles_ms
        return 1000 * self.images / slow, 1000 * self.images / fast

    @property
    def per_worker(self) -> float:
        """Rate of one process that decodes."""
        return self.images_per_second / max(1, self.workers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run(_measure_and_report, arguments)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(MODULE, f"Measure how many images/s the input pipeline delivers. {METHOD}")
    positive = at_least(1)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data.root", dest="root", metavar="FOLDER", help="folder with train/ and val/, each with a folder per class"
    )
    source.add_argument(
        "--make-images",
        type=at_least(2),
        metavar="N",
        help="make N JPEG files of 500 x 375 pixels and about 100 kB in a temporary folder",
    )
    parser.add_argument(
        "--splits", nargs="+", choices=("train", "test"), default=["train"], help="training images, augmented, or test"
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers",
        nargs="+",
        type=at_least(0),
        default=[*(2**power for power in range(cores.bit_length())), cores],
        metavar="W",
        help="numbers of processes that decode; 0 decodes in the process that takes the batches",
    )
    parser.add_argument("--need", type=_rate, metavar="IMAGES/S", help="what the network takes, to compare with")
    parser.add_argument("--batch", type=positive, default=256, metavar="B", help="images per batch")
    parser.add_argument("--image-size", type=positive, default=224, metavar="PIXELS", help="side of the images")
    parser.add_argument("--resize", type=positive, default=256, metavar="PIXELS", help="short side before a test crop")
    parser.add_argument(
        "--auto-augment", action=argparse.BooleanOptionalAction, default=True, help="AutoAugment on training images"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU where there is one")
    parser.add_argument("--rounds", type=positive, default=7, help="timed rounds")
    parser.add_argument("--json", type=new_file(".json"), metavar="FILE", help="write all measurements there")
    return parser


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def _measure_and_report(arguments: Sequence[str]) -> None:
    options = make_parser().parse_args(arguments)
    device = select_device(options.device)
    config = DataConfig(
        name="imagefolder",
        image_size=options.image_size,
        resize=options.resize,
        augment="autoaugment_imagenet" if options.auto_augment else "off",
        horizontal_flip=False,
    )
    splits, counts = list(dict.fromkeys(options.splits)), list(dict.fromkeys(options.workers))
    with ExitStack() as stack:
        root = options.root
        if root is None:
            root = stack.enter_context(tempfile.TemporaryDirectory(prefix="gac-loader-"))
            for name in ("train", "val"):
                write_photographs(Path(root) / name, options.make_images)
        folders = open_folders(root, splits)
        _check_sizes(folders, max(counts), options.batch, options.rounds)
        environment = describe_environment(MODULE, arguments, device)
        environment["cores"] = str(len(os.sched_getaffinity(0)))
        print(format_environment(environment))
        for split in splits:
            print(f"{split:<14}{_describe(folders[split])}")
        augmentation = "AutoAugment" if options.auto_augment else "no AutoAugment"
        print(f"{'batches':<14}{options.batch} images of {config.image_size} x {config.image_size}, {augmentation}")
        print(f"\n{TABLE.header()}", flush=True)
        report: dict[str, Any] = {
            "environment": environment,
            "method": METHOD,
            "data": {split: _describe(folders[split]) for split in splits},
            "transforms": asdict(config),
            "batch": options.batch,
            "need": options.need,
            "cells": [],
        }
        for split in splits:
            cells = []
            for workers in counts:
                cells.append(_measure(folders[split], split, config, workers, options.batch, options.rounds, device))
                print(TABLE.row(_table_row(cells[-1], options.need)), flush=True)
                report["cells"].append(_json_cell(cells[-1], options.need))
                # Written each time: what is measured stays, whatever happens next.
                if options.json is not None:
                    write_json(options.json, report)
            if options.need is not None:
                print(_verdict(cells, options.need), flush=True)


def _check_sizes(folders: dict[str, ClassFolders], workers: int, batch: int, rounds: int) -> None:
    needed = (WARM_UP_ROUNDS + rounds) * max(1, workers) * batch
    for listed in folders.values():
        if len(listed) < needed:
            raise InputError(
                f"{len(listed)} images in {listed.folder} are too few: {WARM_UP_ROUNDS} + {rounds} rounds of"
                f" {max(1, workers)} batches of {batch} take {needed}; lower --workers, --rounds or --batch"
            )


def _describe(folders: ClassFolders) -> str:
    some = folders.paths[:: max(1, len(folders) // SAMPLED_FILES)]
    size = sum(os.stat(path).st_size for path in some) / len(some)
    return f"{len(folders):,} images in {len(folders.class_names):,} classes, {size / 1000:.0f} kB on average"


def _measure(
    folders: ClassFolders,
    split: str,
    config: DataConfig,
    workers: int,
    batch: int,
    rounds: int,
    device: torch.device,
) -> Cell:
    training = split == "train"
    loader = ImageFolderLoader(
        folders,
        train_transform(config) if training else evaluation_transform(config),
        batch_size=batch,
        workers=workers,
        normalization=Normalization(IMAGENET_MEAN, IMAGENET_STD, device),
        device=device,
        seed=0,
        # In the folders' order every round would have images of other classes.
        shuffle=True,
        replace_unreadable=training,
    )
    batches = loader.epoch(0)
    per_round = max(1, workers)
    samples = []
    for number in range(WARM_UP_ROUNDS + rounds):
        started = time.perf_counter()
        for _ in range(per_round):
            next(batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= WARM_UP_ROUNDS:
            samples.append(1000 * (time.perf_counter() - started))
    return Cell(split, workers, per_round * batch, Timing(tuple(samples)), loader.skipped)


def _table_row(cell: Cell, need: float | None) -> list[str]:
    low, high = cell.quartiles
    share = "-" if need is None else f"{100 * cell.images_per_second / need:.0f} %"
    rates = [f"{cell.images_per_second:,.0f}", f"[{low:,.0f}, {high:,.0f}]", f"{cell.per_worker:,.0f}"]
    return [cell.split, str(cell.workers), *rates, share]


def _json_cell(cell: Cell, need: float | None) -> dict[str, Any]:
    return {
        "split": cell.split,
        "workers": cell.workers,
        "images_per_second": cell.images_per_second,
        "quartiles": cell.quartiles,
        "per_worker": cell.per_worker,
        "share_of_need": None if need is None else cell.images_per_second / need,
        "skipped_images": cell.skipped,
        "images_per_round": cell.images,
        "rounds_ms": cell.rounds.samples_ms,
    }


def _verdict(cells: Sequence[Cell], need: float) -> str:
    enough = [cell.workers for cell in cells if cell.images_per_second >= need]
    if enough:
        return f"{need:,.0f} images/s are reached with {min(enough)} workers"
    most = max(cells, key=lambda cell: cell.workers)
    workers = math.ceil(need / most.per_worker)
    return (
        f"{need:,.0f} images/s are not reached; at {most.per_worker:,.0f} images/s each, {workers} workers on as many"
        " cores would"
    )


if __name__ == "__main__":
    sys.exit(main())
