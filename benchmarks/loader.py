"""Measure how many images/s the input pipeline delivers: python -m benchmarks.loader (--help lists all options).

The loader of train.py yields normalised batches on the device, and nothing is done with them. A round is one batch
from each worker (one batch without workers); the rate is that of the median round, in brackets that of the quartiles,
after three untimed rounds: starting the workers and the batches that they prepare ahead. A file that was read before
comes from memory, so a cold disk shows in a first run on a whole data set only.
"""

import math
import os
import sys
import tempfile
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.common import Report, Table, make_parser, program, take_turn, timing
from gac.command_line import at_least
from gac.config import DataConfig
from gac.data import image_folder
from gac.data.class_folders import ClassFolders, open_folders
from gac.data.normalization import Normalization
from gac.errors import InputError

WARM_UP_ROUNDS = 3
SAMPLED_FILES = 1000
TABLE = Table(
    *(("split", 5), ("workers", 7), ("images/s", 9), ("[quartiles]", 16), ("per worker", 10), ("of the need", 11))
)
# The commonest size in ImageNet, in pixels, and a quality that gives about 100 kB, as its files have.
SIZE, QUALITY, CROPS = (500, 375), 98, 8


def _measure_and_report(options: Namespace, report: Report) -> None:
    augment = "autoaugment_imagenet" if options.auto_augment else "off"
    sizes = {"image_size": options.image_size, "resize": options.resize}
    config = DataConfig(name="imagefolder", augment=augment, horizontal_flip=False, **sizes)
    splits, counts, batch = options.splits, options.workers, options.batch
    with tempfile.TemporaryDirectory(prefix="gac-loader-") as made:
        if options.make_images is not None:
            for name in ("train", "val"):
                write_photographs(Path(made) / name, options.make_images)
        folders = open_folders(made if options.root is None else options.root, splits)
        most = max(1, *counts)
        needed = (WARM_UP_ROUNDS + options.rounds) * most * batch
        for listed in folders.values():
            if len(listed) < needed:
                raise InputError(
                    f"{len(listed)} images in {listed.folder} are too few: {WARM_UP_ROUNDS} + {options.rounds} rounds"
                    f" of {most} batches of {batch} take {needed}; lower --workers, --rounds or --batch"
                )
        report.environment["cores"] = str(len(os.sched_getaffinity(0)))
        data = {split: _describe(folders[split]) for split in splits}
        report.begin(data=data, transforms=asdict(config), batch=batch, need=options.need)
        for split, text in data.items():
            report.line(split, text)
        augmentation = "AutoAugment" if options.auto_augment else "no AutoAugment"
        report.line("batches", f"{batch} images of {config.image_size} x {config.image_size}, {augmentation}\n")
        TABLE.header()
        for split in splits:
            cells = []
            for workers in counts:
                cell = _measure(folders[split], split, config, workers, options, report.device)
                rates = *cell["quartiles"], cell["images_per_second"], cell["per_worker"]
                low, high, rate, each = (f"{value:,.0f}" for value in rates)
                of_need = "-" if options.need is None else f"{100 * cell['share_of_need']:.0f} %"
                TABLE.row(split, workers, rate, f"[{low}, {high}]", each, of_need)
                report.add("cells", [cell])
                cells.append(cell)
            if options.need is not None:
                print(_verdict(cells, options.need), flush=True)


def _describe(folders: ClassFolders) -> str:
    some = folders.paths[:: max(1, len(folders) // SAMPLED_FILES)]
    size = sum(os.stat(path).st_size for path in some) / len(some)
    return f"{len(folders):,} images in {len(folders.class_names):,} classes, {size / 1000:.0f} kB on average"


def _measure(
    folders: ClassFolders, split: str, config: DataConfig, workers: int, options: Namespace, device: torch.device
) -> dict[str, Any]:
    """Return what a loader reached: rates of the median round and of its quartiles, and the rounds themselves."""
    training = split == "train"
    transform = image_folder.train_transform if training else image_folder.evaluation_transform
    loader = image_folder.ImageFolderLoader(
        folders,
        transform(config),
        batch_size=options.batch,
        workers=workers,
        normalization=Normalization(image_folder.IMAGENET_MEAN, image_folder.IMAGENET_STD, device),
        device=device,
        seed=0,
        # In the folders' order every round would have images of other classes.
        shuffle=True,
        replace_unreadable=training,
    )
    batches, per_round = loader.epoch(0), max(1, workers)

    def take_round() -> None:
        for _ in range(per_round):
            next(batches)

    for _ in range(WARM_UP_ROUNDS - 1):
        take_round()
    # One more untimed round, then the timed ones.
    rounds, images = timing(take_turn(take_round, device, options.rounds)), per_round * options.batch
    fast, slow, rate = (1000 * images / ms for ms in (*rounds["quartiles_ms"], rounds["median_ms"]))
    found = {"split": split, "workers": workers, "images_per_second": rate, "quartiles": (slow, fast)}
    found |= {"per_worker": rate / per_round, "share_of_need": None if options.need is None else rate / options.need}
    return found | {"skipped_images": loader.skipped, "images_per_round": images, "rounds_ms": rounds["samples_ms"]}


def _verdict(cells: Sequence[dict[str, Any]], need: float) -> str:
    enough = [cell["workers"] for cell in cells if cell["images_per_second"] >= need]
    if enough:
        return f"{need:,.0f} images/s are reached with {min(enough)} workers"
    each = max(cells, key=lambda cell: cell["workers"])["per_worker"]
    workers = f"{math.ceil(need / each)} workers on as many cores would"
    return f"{need:,.0f} images/s are not reached; at {each:,.0f} images/s each, {workers}"


def write_photographs(folder: Path, images: int) -> None:
    """Write ``images`` JPEG files, half of them in each of two class folders below ``folder``.

    They are links to 16 different ones, crops of the two photographs that scikit-learn holds, so that a large number
    takes no space. Reading them never waits for a disk.
    """
    for label, (name, pixels) in enumerate(zip(("china", "flower"), load_sample_images().images, strict=True)):
        image = Image.fromarray(pixels)
        (folder / name).mkdir(parents=True)
        for number in range(label, images, 2):
            path, crop = folder / name / f"{number}.JPEG", number // 2
            if crop < CROPS:
                left = crop * (image.width - SIZE[0]) // (CROPS - 1)
                image.crop((left, 0, left + SIZE[0], SIZE[1])).save(path, quality=QUALITY)
            else:
                os.link(folder / name / f"{label + 2 * (crop % CROPS)}.JPEG", path)


PARSER = make_parser("benchmarks.loader", __doc__, "all measurements")
add, positive = PARSER.add, at_least(1)
source = PARSER.add_mutually_exclusive_group(required=True)
help = "folder with train/ and val/, each with a folder per class"
source.add_argument("--data.root", dest="root", metavar="FOLDER", help=help)
help = "make N JPEG files of 500 x 375 pixels and about 100 kB in a temporary folder"
source.add_argument("--make-images", type=at_least(2), metavar="N", help=help)
add("--splits", "training images, augmented, or test", choices=("train", "test"), default=["train"])
cores = len(os.sched_getaffinity(0))
workers = sorted({*(2**power for power in range(cores.bit_length())), cores})
help = "numbers of processes that decode; 0 decodes in the process that takes the batches"
add("--workers", help, type=at_least(0), default=workers, metavar="W")
add("--need", "what the network takes, to compare with", type=at_least(1, float), metavar="IMAGES/S")
add("--batch", "images per batch", type=positive, default=256, metavar="B")
add("--image-size", "side of the images", type=positive, default=224, metavar="PIXELS")
add("--resize", "short side before a test crop", type=positive, default=256, metavar="PIXELS")
help = "AutoAugment on training images"
PARSER.add_argument("--auto-augment", action=BooleanOptionalAction, default=True, help=help)
add("--rounds", "timed rounds", type=positive, default=7)
main = program(PARSER, _measure_and_report)

if __name__ == "__main__":
    sys.exit(main())
