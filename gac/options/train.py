"""The command line of train.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gac.checkpoint.weights_file import SUFFIX
from gac.config import FIELDS, Config
from gac.errors import InputError
from gac.files import check_writable
from gac.options.written import make_config, read_command_line, read_yaml


class TrainArguments(NamedTuple):
    """The command line of train.py."""

    config: Config
    output: Path
    resume: str | None
    report: bool
    dry_run: bool
    overfit_one_batch: bool
    export_weights: Path | None


def parse_train(arguments: Sequence[str], processes: int = 1) -> TrainArguments:
    """Return what a command line of train.py, run by so many processes, asks for. Raises InputError."""
    given, overrides = read_command_line(
        arguments,
        "train.py --config FILE [--output FOLDER] [--resume auto|FILE | --dry-run | --overfit-one-batch] [--report] "
        "[--export-weights FILE]",
        "Train a network and write all results to a run folder.",
        {
            "--config FILE": "YAML file with the options below; see configs/.",
            "--output FOLDER": "Run folder; without it runs/NAME for a file NAME.yaml.",
            "--resume auto|FILE": "auto continues the newest checkpoint of the run folder that is whole, or starts "
            "afresh if there is none; a file continues that checkpoint. train.epochs may be more than before: from "
            "there on the learning rate is that of a run of so many, not what such a run without the stop gives.",
            "--init FILE": "Begin with the weights of a checkpoint; the same as --train.init.",
            "--report": "At the end write a page about best.pt to the folder report in the run folder, as eval.py"
            " --report does; an earlier report there is replaced.",
            "--export-weights FILE": "At the end write the network of best.pt there as safetensors; with it the"
            " configuration, the data set's mean, std and classes, the scores and this command line. eval.py"
            " --checkpoint and --init take that file.",
            "--dry-run": "Do one step of everything (data, training, evaluation, checkpoint, resuming) in a temporary "
            "folder next to --output, which stays as it is.",
            "--overfit-one-batch": "Train on the first batch only, without augmentation and mixing, and say whether it "
            "was learnt; the exit status is 1 if not. Writes nothing that stays.",
        },
        FIELDS,
    )
    if len(modes := [name for name in ("resume", "dry-run", "overfit-one-batch") if name in given]) > 1:
        raise InputError(f"--{modes[0]} and --{modes[1]} exclude each other: choose one")
    for name in ("report", "export-weights"):
        if name in given and (trial := {"dry-run", "overfit-one-batch"} & given.keys()):
            raise InputError(f"--{name} is of a run that stays: leave out --{min(trial)}")
    if processes > 1 and not {"dry-run", "overfit-one-batch"}.isdisjoint(given):
        raise InputError("--dry-run and --overfit-one-batch are for a single process: start train.py without torchrun")
    if not given.get("config"):
        raise InputError("--config is required: name a YAML file, for example --config configs/digits.yaml")
    if "init" in given:
        if "train.init" in overrides:
            raise InputError("--init and --train.init are the same: give one")
        overrides["train.init"] = given["init"], ""
    path = Path(given["config"])
    config = make_config(Config(), read_yaml(path) | overrides)
    output = Path(given.get("output") or Path("runs", path.stem))
    weights = Path(given["export-weights"]) if "export-weights" in given else None
    if weights is not None:
        if weights.suffix != SUFFIX:
            raise InputError(f"--export-weights {weights}: expected a file *{SUFFIX}")
        # The run makes its own folder.
        if weights.absolute().parent != output.absolute():
            weights = check_writable(weights, "--export-weights")
    flags = (name in given for name in ("report", "dry-run", "overfit-one-batch"))
    return TrainArguments(config, output, given.get("resume"), *flags, weights)
