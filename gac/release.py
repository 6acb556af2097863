"""Gather what a release of trained weights needs from a run's folder: python -m gac.release RUN OUT.

OUT, which must be new or empty, is then a repository for the Hugging Face Hub: model.safetensors with config.json and
the model card README.md; beside them config.yaml, metrics.jsonl, environment.json, the page about the network (report/)
and release.json, which is the entry for the registry (gac/weights).
"""

import hashlib
import io
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gac.analysis.energy import IMAGES
from gac.analysis.report import energy_of, report_files, write_files
from gac.checkpoint import is_ours, read_checkpoint, read_config
from gac.checkpoint.model_card import FILE, LICENSE, model_card
from gac.checkpoint.weights import Released
from gac.checkpoint.weights_file import card_of, write_weights
from gac.command_line import Parser, finish
from gac.config import Config
from gac.data import build_data
from gac.data.arrays import ArrayLoader
from gac.errors import InputError
from gac.evaluation.report import Report, evaluate_checkpoint
from gac.execution.device import select_device
from gac.execution.distributed import SINGLE_PROCESS
from gac.execution.environment import describe_environment
from gac.files import check_new_folder, user_path

logger = logging.getLogger("gac")


def release(
    run: Path, output: Path, name: str, *, command: str, license: str = LICENSE, urls: Sequence[str] = (), half: bool
) -> str:
    """Write a release of a run's best network to a folder, and return in a line what it scores.

    Args:
        run: Folder of train.py.
        output: The folder, missing or empty.
        name: In the registry.
        command: That made the run, which is stored.
        license: Of the weights, by its SPDX identifier.
        urls: Where the weights will be; none for those that travel in the package.
        half: Store the weights in half precision.

    Raises:
        InputError: If the run or its data set cannot be used, or if in half precision a test image gets another class
            than in float32.
        ResultsNotWritten: If the folder cannot be written.
    """
    checkpoint = run / "best.pt"
    payload = read_checkpoint(checkpoint)
    if not is_ours(payload) or "data" not in payload:
        raise InputError(f"checkpoint {checkpoint}: expected a file of train.py that says what it was trained on")
    files = {each: _read(run / each) for each in ("config.yaml", "metrics.jsonl")}
    config = read_config(payload)
    evaluated = evaluate_checkpoint(checkpoint, payload, config, sample=0 if half else IMAGES)
    scores = {"float32": _scores(evaluated)}
    tensors = payload["model"]
    if half:
        tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
        full = evaluated
        evaluated = evaluate_checkpoint(checkpoint, payload | {"model": tensors}, config, sample=IMAGES)
        changed = int((full.predictions.ranked[:, 0] != evaluated.predictions.ranked[:, 0]).sum())
        if changed:
            raise InputError(
                f"checkpoint {checkpoint}: in half precision {changed} of {full.scores.images} test images get another"
                " class than in float32: leave out --half, or train with another --train.seed"
            )
        scores["float16"] = _scores(evaluated)
    card = card_of(payload) | {"command": command, "seed": config.train.seed, "scores": scores}
    if (digest := data_digest(config)) is not None:
        card["data_sha256"] = digest
    else:
        logger.warning("no digest of the images is stored: data set %s is one of files", config.data.name)
    content = io.BytesIO()
    write_weights(content, tensors, card)
    sha256 = hashlib.sha256(content.getvalue()).hexdigest()
    entry = Released(name, sha256, len(content.getvalue()), license, tuple(urls), card)
    environment = describe_environment(select_device(config.device, SINGLE_PROCESS))
    report = report_files(replace(evaluated, checkpoint=FILE), sha256, energy_of(evaluated))
    files |= {FILE: content.getvalue()} | {f"report/{path}": each for path, each in report.items()}
    files["release.json"] = entry.to_json().encode()
    files["config.json"] = _json({"card": card})
    files["environment.json"] = _json({"training": card["versions"], "release": environment})
    files["README.md"] = model_card(card, license).encode()
    write_files(files, output, may_replace=False)
    as_before = " as in float32" if half else ""
    return f"wrote {output}: {entry.size / 1000:.0f} kB of weights, top-1 {evaluated.scores.top1:.2f} %{as_before}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: expected the folder of a run of train.py") from error


def _json(values: dict[str, Any]) -> bytes:
    return f"{json.dumps(values, indent=2, sort_keys=True)}\n".encode()


def data_digest(config: Config) -> str | None:
    """Return the SHA-256 of a data set's bytes: training images and labels, then the test set's.

    It is None for a data set of files, whose images are not held in memory.
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
            return None
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
    """Run the command line and return its exit status: 0, 1 for a folder that cannot be written, 2 for bad input."""
    parser = Parser("gac.release", __doc__)
    parser.add_argument("run", help="folder of a run of train.py", metavar="RUN")
    parser.add_argument("output", help="folder to write, new or empty", metavar="OUT")
    parser.add("--name", "what gac.load_pretrained is to call the weights: data, coding and T", required=True)
    parser.add(
        "--command", "command that makes the run again", default="train.py --config config.yaml", metavar="COMMAND"
    )
    parser.add("--license", "of the weights, by its SPDX identifier", default=LICENSE)
    parser.add("--url", "address that the weights will have; may be given several times", action="append", default=None)
    parser.add("--half", "store the weights in half precision, if that changes no prediction", action="store_true")

    def run() -> None:
        given = parser.parse_args(arguments)
        output = check_new_folder(user_path(given.output, "OUT"), "OUT")
        print(
            release(
                user_path(given.run, "RUN"),
                output,
                given.name,
                command=given.command,
                license=given.license,
                urls=given.url or (),
                half=given.half,
            )
        )

    return finish(run)


if __name__ == "__main__":
    sys.exit(main())
