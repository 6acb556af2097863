"""--overfit-one-batch: whether the network can learn a single batch by heart, as every network that works can."""

from dataclasses import replace
from pathlib import Path

from gac.config import Config
from gac.data import Data
from gac.data.part import OneBatch
from gac.training.engine import train
from gac.training.metrics_file import read_metrics
from gac.training.scratch import scratch_folder

STEPS = 300
EPOCHS = 6
"""How many evaluations the steps are shared out to."""
LEARNT = 99.0
"""Test top-1 in percent above which the batch counts as learnt."""


def overfit_one_batch(config: Config, output: Path) -> tuple[bool, str]:
    """Train ``STEPS`` steps on the first batch alone and evaluate on it; return whether it was learnt, and in words.

    Neither augmentation nor mixing; an image folder's images keep the crop that they were given once. Everything is
    written to a temporary folder next to ``output``. Raises what :func:`gac.training.engine.train` does.
    """
    data = replace(config.data, crop_padding=0, horizontal_flip=False, augment="off", random_erasing=0.0)
    plain = replace(config.train, cutmix="off", mixup_alpha=0.0, mix_off_epochs=0, warmup_epochs=0.0)
    config = replace(config, data=data, train=replace(plain, epochs=EPOCHS, checkpoint_minutes=0, checkpoint_steps=0))
    with scratch_folder(output) as folder:
        train(config, folder / "run", part=_first_batch)
        top1 = max(line["test_top1"] for line in read_metrics(folder / "run" / "metrics.jsonl"))
    learnt = top1 > LEARNT
    verdict = "learnt" if learnt else "NOT learnt: look for a mistake in the data or the learning rate"
    return learnt, f"one batch, {STEPS} steps: {top1:.2f} % of it right, {verdict} (more than {LEARNT:.0f} % needed)"


def _first_batch(data: Data) -> Data:
    images, labels = next(data.train.epoch(0))
    return replace(data, train=OneBatch(images, labels, STEPS // EPOCHS), test=OneBatch(images, labels, 1))
