"""The metrics of an epoch: its line of metrics.jsonl."""

from collections.abc import Mapping

from gac.config import TrainConfig
from gac.evaluation.evaluate import Evaluation
from gac.training.optim import learning_rate_at
from gac.training.position import Position
from gac.training.run_folder import Metric
from gac.training.totals import Totals


def epoch_metrics(
    config: TrainConfig,
    position: Position,
    totals: Totals,
    scores: Mapping[str, Evaluation],
    batches: int,
    skipped_images: int,
    test_skipped_images: int,
    backend: str,
    cuda_graph: bool,
) -> dict[str, Metric]:
    """Return the metrics of the epoch that ends at ``position``, by their names in metrics.jsonl.

    ``totals`` and the numbers of unreadable images are those of all ranks, ``batches`` is the length of an epoch, and
    ``scores`` has the trained weights ("raw") and their moving average ("ema"), if there is one. ``cuda_graph`` says
    whether steps are replayed.
    """
    test, average = scores["raw"], scores.get("ema")
    return {
        "epoch": position.epoch + 1,
        "step": position.step,
        "train_loss": totals.mean_loss,
        "train_top1": totals.top1,
        "test_loss": test.loss,
        "test_top1": test.top1,
        "test_top5": test.top5,
        **({} if average is None else {"test_loss_ema": average.loss, "test_top1_ema": average.top1}),
        "learning_rate": learning_rate_at(config, position.epoch, batches - 1, batches),
        "skipped_steps": int(totals.skipped),
        "skipped_images": skipped_images,
        "test_skipped_images": test_skipped_images,
        "images_per_second": totals.images / position.seconds,
        "seconds": position.seconds,
        "backend": backend,
        "cuda_graph": cuda_graph,
    }
