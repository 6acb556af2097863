"""Make the weights that travel in the package from a training run's folder: python -m gac.release."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from gac.checkpoint import is_ours, read_checkpoint, read_config
from gac.checkpoint.weights_file import SUFFIX, write_weights
from gac.command_line import Parser, finish, new_file
from gac.config import Config
from gac.data import build_data
from gac.data.arrays import ArrayLoader
from gac.errors import InputError
from gac.evaluation.report import Report, evaluate_checkpoint
from gac.files import atomic_write, writing


def release(checkpoint: Path, output: Path, command: str) -> str:
    """Write the network of a checkpoint of train.py in half precision, and return in a line what it scores.

    Raises:
        InputError: If the checkpoint cannot be used, if its data set is one of files, or if a test image gets another
            class in half precision than in float32.
    """
    payload = read_checkpoint(checkpoint)
    if not is_ours(payload):
        raise InputError(f"checkpoint {checkpoint}: expected a file of train.py")
    config = read_config(payload)
    halved = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in payload["model"].items()
    }
    full = evaluate_checkpoint(checkpoint, payload, config)
    half = evaluate_checkpoint(checkpoint, payload | {"model": halved}, config)
    changed = int((full.predictions.ranked[:, 0] != half.predictions.ranked[:, 0]).sum())
    if changed:
        raise InputError(
            f"checkpoint {checkpoint}: in half precision {changed} of {full.scores.images} test images get another"
            " class than in float32: train with another --train.seed"
        )
    card = {name: payload[name] for name in ("config", "data", "num_classes", "in_channels", "epoch", "weights")}
    card |= {
        "command": command,
        "seed": config.train.seed,
        "data_sha256": data_digest(config),
        "scores": {"float32": _scores(full), "float16": _scores(half)},
        "versions": payload["versions"],
    }
    with writing(output), atomic_write(output) as file:
        write_weights(file, halved, card)
    return f"wrote {output}: {output.stat().st_size / 1000:.0f} kB, top-1 {half.scores.top1:.2f} % as in float32"


def data_digest(config: Config) -> str:
    """Return the SHA-256 of a data set's bytes: training images and labels, then the test set's.

    Raises InputError for a data set whose images are not held in memory.
    """
    train = config.train
    data = build_data(
        config.data,
        device="cpu",
        batch_size=train.batch_size,
        eval_batch_size=train.eval_batch_size,
        seed=train.seed,
    )
    digest = hashlib.sha256()
    for loader in (data.train, data.test):
        if not isinstance(loader, ArrayLoader):
            raise InputError(f"data set {config.data.name} is one of files, of which no digest is taken")
        digest.update(loader.images.numpy().tobytes())
        digest.update(loader.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _scores(report: Report) -> dict[str, object]:
    scores = report.scores
    return {
        "images": scores.images,
        "correct": scores.correct,
        "top1": scores.top1,
        "top1_by_time": scores.top1_by_time,
        "loss": scores.loss,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a file that cannot be written, 2 for bad input."""
    parser = Parser("gac.release", __doc__)
    parser.add("--checkpoint", "file of train.py", type=Path, required=True)
    parser.add("--output", "the file to write", type=new_file(SUFFIX), required=True)
    parser.add("--command", "the command that makes the file again, which is stored in it", required=True)

    def run() -> None:
        options = parser.parse_args(arguments)
        print(release(options.checkpoint, options.output, options.command))

    return finish(run)


if __name__ == "__main__":
    sys.exit(main())
