"""Trial runs whose results nobody keeps: --dry-run and --overfit-one-batch."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from gac.analysis.firing import FiringRates
from gac.checkpoint import load_checkpoint
from gac.config import Config
from gac.data import Data
from gac.data.part import FirstBatches, OneBatch
from gac.errors import InputError
from gac.execution.cuda_graph import WARM_UP_CALLS
from gac.execution.device import select_device
from gac.training.checkpoints import Checkpoints
from gac.training.engine import train
from gac.training.run_folder import read_metrics

STEPS = 300
"""Steps on the one batch."""
EPOCHS = 6
"""Epochs that these steps are divided into, with an evaluation after each."""
LEARNT = 99.0
"""Test top-1 in percent above which the batch counts as learnt."""


def dry_run(config: Config, output: Path) -> str:
    """Train a few steps, evaluate, write checkpoints, resume before the last step; return what was done, in words.

    That takes two steps and one test batch, or as many as it takes to capture and replay CUDA graphs where the run may
    have them. Everything is written to a temporary folder next to ``output``. Raises what
    :func:`gac.training.engine.train` does.
    """
    device = select_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    short = replace(config.train, epochs=1, warmup_epochs=0.0, mix_off_epochs=0)
    # Three: after the epoch, after its last step, and after the step before that, which the second run resumes from.
    config = replace(config, train=replace(short, checkpoint_steps=1, keep_checkpoints=3))
    steps, batches = 2, 1
    if config.train.cuda_graph is not False and device.type == "cuda":
        # Each of the two kinds of targets has its own graph, and batches whose firing rates are counted have none.
        steps = 2 * WARM_UP_CALLS + 3
        batches = -(-FiringRates.IMAGES // config.train.eval_batch_size) + WARM_UP_CALLS + 2

    def first_batches(data: Data) -> Data:
        return replace(data, train=FirstBatches(data.train, steps), test=FirstBatches(data.test, batches))

    done = []
    with scratch_folder(output) as folder:
        train(config, folder / "run", part=first_batches)
        (metrics,) = read_metrics(folder / "run" / "metrics.jsonl")
        done.append(
            f"trained {metrics['step']} steps with batches of {config.train.batch_size} and evaluated with batches of"
            f" {config.train.eval_batch_size}"
        )
        if device.type == "cuda":
            done.append(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}")
        oldest = Checkpoints(folder / "run").existing()[-1]
        train(config, folder / "resumed", resume=str(oldest), part=first_batches)
        load_checkpoint(folder / "resumed" / "best.pt")
        done.append(f"resumed a checkpoint of {oldest.stat().st_size / 1e6:.1f} MB and ended the run again")
    return f"dry run of {config.model.name} on {config.data.name}: {'; '.join(done)}"


def overfit_one_batch(config: Config, output: Path) -> tuple[bool, str]:
    """Train ``STEPS`` steps on only the first batch; return whether it was learnt, and that in words.

    There is no augmentation or mixing; images of an image folder keep their first crop. Everything is written to a
    temporary folder next to ``output``. Raises what :func:`gac.training.engine.train` does.
    """
    unchanged = {"crop_padding": 0, "horizontal_flip": False, "roll": 0, "cutout": 0, "random_erasing": 0.0}
    data = replace(config.data, augment="off", **unchanged)
    plain = replace(config.train, cutmix="off", mixup_alpha=0.0, mix_off_epochs=0, warmup_epochs=0.0)
    config = replace(config, data=data, train=replace(plain, epochs=EPOCHS, checkpoint_minutes=0, checkpoint_steps=0))
    with scratch_folder(output) as folder:
        train(config, folder / "run", part=_first_batch)
        top1 = max(line["test_top1"] for line in read_metrics(folder / "run" / "metrics.jsonl"))
    learnt = top1 > LEARNT
    verdict = "learnt" if learnt else "NOT learnt: look for a mistake in the data or the learning rate"
    return (
        learnt,
        f"one batch, {STEPS} steps: {top1:.2f} % of it right, {verdict} (more than {LEARNT:.0f} % needed)",
    )


def _first_batch(data: Data) -> Data:
    images, labels = next(data.train.epoch(0))
    return replace(data, train=OneBatch(images, labels, STEPS // EPOCHS), test=OneBatch(images, labels, 1))


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """Make a temporary folder next to ``output``, on the same disk. Raises InputError if it cannot be made."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise InputError(f"cannot write next to {output}: {error.strerror}; choose another --output") from error
    with folder as path:
        yield Path(path)
