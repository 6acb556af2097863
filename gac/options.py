"""Reading a command line and a YAML file into a Config.

Both spell every value as text, which means the same in either place; options and messages come from
:data:`gac.config.FIELDS`.
"""

import argparse
import difflib
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from gac.checkpoint import is_ours, read_checkpoint, read_config
from gac.config import EVALUATION_FIELDS, FIELDS, SECTIONS, Config, FieldError
from gac.errors import InputError, abridged
from gac.files import check_new_folder, check_writable, user_path

# A value as it is written, None for YAML's null, and where it stands in a file.
_Written = tuple[str | None, str]


class TrainArguments(NamedTuple):
    """The command line of train.py."""

    config: Config
    output: Path
    resume: str | None
    report: bool
    dry_run: bool
    overfit_one_batch: bool


# Data sets that data.root says nothing about.
_WITHOUT_FILES = ("digits", "synthetic")
# What a bare state dict does not say.
_OF_NETWORK = ("T", "coding", "neuron", "tau", "v_threshold", "surrogate", "detach_reset")


class EvalArguments(NamedTuple):
    """The command line of eval.py.

    ``payload`` is the checkpoint's content, ``config`` its own with overrides, ``network`` those of T, coding,
    neuron and its constants, which :func:`gac.checkpoint.build_network` takes, ``amp`` that of train.amp, None if
    there is none, ``sha256`` the digest of the checkpoint's file.
    """

    checkpoint: Path
    payload: dict[str, Any]
    config: Config
    network: dict[str, Any]
    amp: str | None
    json: Path | None
    predictions: Path | None
    energy: bool
    report: Path | None
    saliency: Path | None
    layer: str | None
    sha256: str


def parse_train(arguments: Sequence[str], processes: int = 1) -> TrainArguments:
    """Return what a command line of train.py, run by so many processes, asks for. Raises InputError."""
    given, overrides = _read_command_line(
        arguments,
        "train.py --config FILE [--output FOLDER] [--resume auto|FILE | --dry-run | --overfit-one-batch] [--report]",
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
            "--dry-run": "Do one step of everything (data, training, evaluation, checkpoint, resuming) in a temporary "
            "folder next to --output, which stays as it is.",
            "--overfit-one-batch": "Train on the first batch only, without augmentation and mixing, and say whether it "
            "was learnt; the exit status is 1 if not. Writes nothing that stays.",
        },
        FIELDS,
    )
    if len(modes := [name for name in ("resume", "dry-run", "overfit-one-batch") if name in given]) > 1:
        raise InputError(f"--{modes[0]} and --{modes[1]} exclude each other: choose one")
    if "report" in given and (trial := {"dry-run", "overfit-one-batch"} & given.keys()):
        raise InputError(f"--report is of a run that stays: leave out --{min(trial)}")
    if processes > 1 and not {"dry-run", "overfit-one-batch"}.isdisjoint(given):
        raise InputError("--dry-run and --overfit-one-batch are for a single process: start train.py without torchrun")
    if not given.get("config"):
        raise InputError("--config is required: name a YAML file, for example --config configs/digits.yaml")
    if "init" in given:
        if "train.init" in overrides:
            raise InputError("--init and --train.init are the same: give one")
        overrides["train.init"] = given["init"], ""
    path = Path(given["config"])
    config = _make_config(Config(), _read_yaml(path) | overrides)
    output = Path(given.get("output") or Path("runs", path.stem))
    flags = (name in given for name in ("report", "dry-run", "overfit-one-batch"))
    return TrainArguments(config, output, given.get("resume"), *flags)


def parse_eval(arguments: Sequence[str], processes: int = 1) -> EvalArguments:
    """Return what a command line of eval.py, run by so many processes, asks for, with the checkpoint read.

    Raises InputError.
    """
    given, overrides = _read_command_line(
        arguments,
        "eval.py --checkpoint FILE [--json FILE] [--predictions FILE] [--energy] [--report FOLDER] "
        "[--saliency FILE] [--layer NAME]",
        "Score the network of a checkpoint on a test set. Defaults are the values it was trained with; a checkpoint of "
        "the authors holds none, so --data.name is required with it. Of what a checkpoint says, data.download is never "
        "followed, and data.root only where it exists on this machine.",
        {
            "--checkpoint FILE": "File of train.py or of the authors.",
            "--json FILE": "Write all numbers, the accuracy of each class, the confusion matrix, the configuration and"
            " the versions there.",
            "--predictions FILE": "Write the label, the prediction and the five most probable classes of each image"
            " there, as CSV. With it data.name imagefolder also takes a folder of images without class folders.",
            "--energy": "Count the operations of each layer on some of the test images and print the energy of an image"
            " in two conventions; see docs/energy.md.",
            "--report FOLDER": "Write a page about the network there, index.html, with all tables and figures behind"
            " it: accuracy, energy, firing rates, spikes, gates, saliency. The folder must be new or empty.",
            "--saliency FILE": "Draw some of the test images there, as PNG, under maps of what speaks for the class"
            " that each is taken for, at every time step; see docs/analysis.md. With it and with --report, as with"
            " --predictions, a folder of images without class folders is taken.",
            "--layer NAME": "The layer whose saliency is drawn, for example stages.2; without it the last stage whose"
            " maps have 4 x 4 pixels.",
        },
        EVALUATION_FIELDS,
    )
    if not given.get("checkpoint"):
        raise InputError("--checkpoint is required: name a file, for example --checkpoint runs/digits/best.pt")
    if processes > 1 and {"report", "saliency"} & given.keys():
        # One that has a part of the images would call them all of them.
        raise InputError("--report and --saliency are for a single process: start eval.py without torchrun")
    path = Path(given["checkpoint"])
    digest = hashlib.sha256()
    payload = read_checkpoint(path, digest)
    if not is_ours(payload) and "data.name" not in overrides:
        raise InputError(
            f"checkpoint {path} does not say what it was trained on: name it with --data.name, for example"
            " --data.name cifar100"
        )
    try:
        base = read_config(payload) if is_ours(payload) else Config()
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from None
    # Whoever wrote the file must not make this machine load anything.
    config = _make_config(replace(base, data=replace(base.data, download=False)), overrides)
    stored = base.data
    named = not is_ours(payload) or {"data.name", "data.root", "data.download"} & overrides.keys()
    if not named and stored.name not in _WITHOUT_FILES and not user_path(stored.root, "data.root").exists():
        raise InputError(
            f"the data set of checkpoint {path}, {stored.name}, was in {stored.root!r}, which is not here: name it"
            " with --data.root"
        )
    network = {name: getattr(config.model, name) for name in _OF_NETWORK if f"model.{name}" in overrides}
    amp = config.train.amp if "train.amp" in overrides else None
    if "predictions" in given and "data.root" in overrides and config.data.name in _WITHOUT_FILES:
        raise InputError(
            f"--data.root {config.data.root} is not read, as data.name is {config.data.name}: add --data.name"
            " imagefolder for images in a folder, npz for arrays"
        )
    used = {os.path.realpath(path): "--checkpoint"}
    if config.data.name == "npz":
        used[os.path.realpath(user_path(config.data.root, "data.root"))] = "data.root"
    outputs: dict[str, Path] = {}
    for name in [each for each in ("json", "predictions", "saliency") if each in given]:
        outputs[name] = check_writable(Path(given[name]), f"--{name}")
        if (other := used.setdefault(os.path.realpath(outputs[name]), f"--{name}")) != f"--{name}":
            raise InputError(f"--{name} {outputs[name]} is the file of {other} too: choose another one")
    if "layer" in given and not {"saliency", "report"} & given.keys():
        raise InputError("--layer is the layer of --saliency and --report: add one of them")
    report = check_new_folder(Path(given["report"]), "--report") if "report" in given else None
    return EvalArguments(
        checkpoint=path,
        payload=payload,
        config=config,
        network=network,
        amp=amp,
        json=outputs.get("json"),
        predictions=outputs.get("predictions"),
        energy="energy" in given,
        report=report,
        saliency=outputs.get("saliency"),
        layer=given.get("layer"),
        sha256=digest.hexdigest(),
    )


# What the options that are no fields call a value that names a file or a folder.
_NAMES_A_PATH = re.compile("FILE|FOLDER|CHECKPOINT")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _read_command_line(
    arguments: Sequence[str], usage: str, description: str, own: dict[str, str], fields: Collection[str]
) -> tuple[dict[str, Any], dict[str, _Written]]:
    """Return the options given and, apart, which of them are ``fields``; ``own`` are the help texts of the others."""
    usage += " [--SECTION.FIELD VALUE ...]"
    parser = _Parser(usage=usage, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups = {name: parser.add_argument_group(cls.__doc__.splitlines()[0][:-1]) for name, cls in SECTIONS.items()}
    known = []
    for spelling, text in (own | {f"--{name} {FIELDS[name].metavar}": FIELDS[name].help for name in fields}).items():
        option, _, metavar = spelling.partition(" ")
        known.append(name := option.removeprefix("--"))
        kind = {"metavar": metavar} if metavar else {"action": "store_true"}
        group = groups.get(name.partition(".")[0], parser)
        group.add_argument(option, dest=name, help=text.replace("%", "%%"), **kind)
    if not {"-h", "--help"}.isdisjoint(arguments):
        parser.parse_args(["--help"])
    options = [each[2:].partition("=")[0] for each in arguments if each.startswith("--")]
    for name in options:
        if name in ("local-rank", "local_rank"):
            raise InputError(
                f"--{name} comes from python -m torch.distributed.launch: start the processes with torchrun and the"
                " same arguments"
            )
        if name not in known and name in FIELDS:
            raise InputError(f"--{name} is fixed by the checkpoint; eval.py takes {', '.join(known)}")
        if name not in known:
            raise InputError(f"unknown option --{name}{_suggest(name, known, '--')}")
        if name in ("config", "checkpoint") and options.count(name) > 1:
            raise InputError(f"--{name} was given twice; give one")
    given = vars(parser.parse_args(arguments))
    for spelling in own:
        option, _, metavar = spelling.partition(" ")
        name = option.removeprefix("--")
        if given.get(name) and _NAMES_A_PATH.search(metavar) and not (given[name] == "auto" and "auto" in metavar):
            given[name] = str(user_path(given[name], option))
    return given, {name: (given[name], "") for name in given.keys() & FIELDS}


def _suggest(name: str, known: Collection[str], prefix: str = "") -> str:
    section, _, field = name.rpartition(".")
    near = [each for each in known if each.rpartition(".")[0] == section] if section else known
    keys = {each: each.rpartition(".")[2] for each in near if len(field) > 1}
    close = (
        [each for each in known if each.rpartition(".")[2] == field]
        # lr for learning_rate
        or [each for each, key in keys.items() if "".join(word[:1] for word in key.split("_")) == field]
        or [each for each, key in keys.items() if key.startswith(field)]
        or difflib.get_close_matches(name, known, n=1)
    )
    return f"; did you mean {prefix}{close[0]}?" if close else "; --help lists all of them"


def _read_yaml(path: Path) -> dict[str, _Written]:
    """Return every field in a YAML file.

    A value's text is taken, not the type that YAML gives it, which would make ``off`` a truth value.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise InputError(f"cannot read --config {path}: {reason}") from error
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{path} line {error.problem_mark.line + 1} is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise InputError(f"{path} is nested too deeply: sections hold fields, and fields values or lists") from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path} must hold the sections {', '.join(SECTIONS)} with their fields")
    return dict(_fields(root, path))


def _fields(mapping: yaml.MappingNode, path: Path, prefix: str = "") -> Iterator[tuple[str, _Written]]:
    names = set()
    for key, node in mapping.value:
        name, place = f"{prefix}{key.value}", f"{path} line {key.start_mark.line + 1}: "
        if name in names:
            raise InputError(f"{place}{key.value} is there twice; keep one")
        names.add(name)
        if name in FIELDS:
            yield name, (_text(node, f"{place}{name} must be {FIELDS[name].kind}"), place)
        elif name not in SECTIONS:
            raise InputError(f"{place}unknown field {name}{_suggest(name, [*FIELDS, *SECTIONS])}")
        elif not isinstance(node, yaml.MappingNode):
            raise InputError(f"{place}{name} is a section; write its fields below it")
        else:
            yield from _fields(node, path, f"{name}.")


def _text(node: yaml.Node, refusal: str) -> str | None:
    """Return a value as it would be written on the command line."""
    if isinstance(node, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in node.value):
        return f"[{', '.join(each.value for each in node.value)}]"
    if not isinstance(node, yaml.ScalarNode):
        raise InputError(refusal)
    return None if node.tag.endswith(":null") else node.value


def _make_config(base: Config, written: Mapping[str, _Written]) -> Config:
    """Return ``base`` with the values that are ``written``."""
    try:
        return Config.from_flat(base.flat() | {name: FIELDS[name].parse(text) for name, (text, _) in written.items()})
    except FieldError as error:
        if error.field not in written:
            raise
        text, place = written[error.field]
        got = "null" if text is None else abridged(text) or "nothing"
        raise InputError(f"{place}{error.field} must be {error.allowed}; got {got}") from None
