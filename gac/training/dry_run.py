"""--dry-run: one step of everything that a run does, so that what would fail after hours fails within a minute."""

from dataclasses import replace
from pathlib import Path

import torch

from gac.checkpoint import load_checkpoint
from gac.config import Config
from gac.data import Data
from gac.data.part import FirstBatches
from gac.training.checkpoints import Checkpoints
from gac.training.cuda_graph import WARM_UP_CALLS
from gac.training.device import select_device
from gac.training.engine import train
from gac.training.firing import FiringRates
from gac.training.metrics_file import read_metrics
from gac.training.scratch import scratch_folder


def dry_run(config: Config, output: Path) -> str:
    """Train a few steps, evaluate a batch, write checkpoints, resume before the last step; say what was done.

    The steps are two and the batch one, or as many as capture a CUDA graph and replay it where train.cuda_graph asks
    for one. Everything is written to a temporary folder next to ``output``. Raises what
    :func:`gac.training.engine.train` does.
    """
    device = select_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    short = replace(config.train, epochs=1, warmup_epochs=0.0, mix_off_epochs=0)
    # Three: after the epoch, after its last step and after the step before that, to resume from.
    config = replace(config, train=replace(short, checkpoint_steps=1, keep_checkpoints=3))
    steps, batches = 2, 1
    if config.train.cuda_graph and device.type == "cuda":
        # Each of two kinds of targets is captured apart, and test batches whose firing rates are counted never.
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
