"""The command lines of train.py and eval.py.

jsonargparse reads the options, their types and their help off the dataclasses of :mod:`gac.config`. Whatever
is wrong with a command line or a configuration file becomes one line on stderr and exit status 2.
"""

import difflib
import json
import logging
import re
import sys
import tempfile
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from gac.checkpoint import is_ours, read_checkpoint
from gac.config import SECTIONS, Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError
from gac.evaluation.report import evaluate_checkpoint, format_report
from gac.execution.distributed import Ranks, is_lost_connection, process_group
from gac.files import ResultsNotWritten, atomic_write, writing
from gac.training.dry_run import dry_run, overfit_one_batch
from gac.training.engine import train
from gac.training.signals import Interrupted
from gac.training.totals import TrainingDiverged

# The help of an option is the docstring below its field.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

FIELDS: dict[str, Any] = {
    **{name: hint for name, hint in get_type_hints(Config).items() if name not in SECTIONS},
    **{f"{section}.{name}": hint for section, kind in SECTIONS.items() for name, hint in get_type_hints(kind).items()},
}
# What train.py does besides training a run from its beginning.
MODES = ("resume", "dry-run", "overfit-one-batch")
# What may differ from the training run when its network is evaluated.
EVALUATION_FIELDS = [
    *(name for name in FIELDS if name.startswith("data.")),
    "device",
    "train.eval_batch_size",
    "train.cuda_graph",
    "train.channels_last",
    "model.backend",
    "model.T",
]


@dataclass(frozen=True)
class TrainArguments:
    """The command line of train.py."""

    config: Config
    output: Path
    resume: str | None
    dry_run: bool
    overfit_one_batch: bool


@dataclass(frozen=True)
class EvalArguments:
    """The command line of eval.py.

    ``payload`` is the checkpoint's content, ``config`` its own with overrides, ``T`` the override of model.T, if any.
    """

    checkpoint: Path
    payload: dict[str, Any]
    config: Config
    T: int | None
    json: Path | None


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run train.py's command line and return its exit status."""

    def run(arguments: Sequence[str], ranks: Ranks) -> int:
        parsed = ranks.together(lambda: parse_train(arguments))
        if ranks.size > 1 and (parsed.dry_run or parsed.overfit_one_batch):
            ranks.together(_refuse_several)
        if parsed.dry_run:
            print(dry_run(parsed.config, parsed.output))
        elif parsed.overfit_one_batch:
            learnt, verdict = overfit_one_batch(parsed.config, parsed.output)
            print(verdict)
            return 0 if learnt else 1
        else:
            train(parsed.config, parsed.output, parsed.resume, ranks=ranks)
        return 0

    return _run(run, arguments)


def eval_main(arguments: Sequence[str] | None = None) -> int:
    """Run eval.py's command line and return its exit status."""

    def run(arguments: Sequence[str], ranks: Ranks) -> int:
        parsed = ranks.together(lambda: parse_eval(arguments))
        report = evaluate_checkpoint(parsed.checkpoint, parsed.payload, parsed.config, parsed.T, ranks)
        if not ranks.is_main:
            return 0
        print(format_report(report))
        if parsed.json is not None:
            with writing(parsed.json), atomic_write(parsed.json) as file:
                file.write(f"{json.dumps(asdict(report), indent=2)}\n".encode())
        return 0

    return _run(run, arguments)


def parse_train(arguments: Sequence[str]) -> TrainArguments:
    """Return what a command line of train.py asks for. Raises InputError."""
    parser = _make_parser(
        "train.py --config FILE [--output FOLDER] [--resume auto|FILE | --dry-run | --overfit-one-batch]"
        " [--SECTION.FIELD VALUE ...]",
        "Train a network and write all results to a run folder.",
    )
    parser.add_argument("--config", type=str, metavar="FILE", help="YAML file with the options below; see configs/.")
    parser.add_argument(
        "--output", type=str, metavar="FOLDER", help="Run folder; without it runs/NAME for a file NAME.yaml."
    )
    parser.add_argument(
        "--resume",
        type=str,
        metavar="auto|FILE",
        help="auto continues the newest checkpoint of the run folder that is whole, or starts afresh if there is "
        "none; a file continues that checkpoint.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Do one step of everything (data, training, evaluation, checkpoint, resuming) in a temporary folder next "
        "to --output, which stays as it is.",
    )
    parser.add_argument(
        "--overfit-one-batch",
        action="store_true",
        help="Train on the first batch alone, without augmentation and mixing, and say whether it was learnt; the "
        "exit status is 1 if not. Writes nothing that stays.",
    )
    parser.add_class_arguments(Config)
    _help_if_asked(parser, arguments)
    config_path, overrides = _take("config", arguments)
    given = _check_names(overrides, ["config", "output", *MODES, *FIELDS])
    if len(modes := [mode for mode in MODES if mode in given]) > 1:
        raise InputError(f"--{modes[0]} and --{modes[1]} exclude each other: choose one")
    if config_path is None:
        raise InputError("--config is required: name a YAML file, for example --config configs/digits.yaml")
    from_file, lines = _read_yaml(Path(config_path))
    # Overrides come last, wherever --config stood.
    values = _parse(parser, [*from_file, *overrides], {k: v for k, v in lines.items() if k not in given})
    output = Path(values["output"] or Path("runs", Path(config_path).stem))
    return TrainArguments(
        _make_config(values), output, values["resume"], values["dry_run"], values["overfit_one_batch"]
    )


def parse_eval(arguments: Sequence[str]) -> EvalArguments:
    """Return what a command line of eval.py asks for, with the checkpoint read. Raises InputError."""
    parser = _make_parser(
        "eval.py --checkpoint FILE [--json FILE] [--SECTION.FIELD VALUE ...]",
        "Score the network of a checkpoint on a test set. Defaults are the values it was trained with; a "
        "checkpoint of the authors holds none, so --data.name is required with it.",
    )
    parser.add_argument("--checkpoint", type=str, metavar="FILE", help="File of train.py or of the authors.")
    parser.add_argument(
        "--json", type=str, metavar="FILE", help="Write all numbers, the configuration and the versions there."
    )
    for section, kind in (("data", DataConfig), ("model", ModelConfig), ("train", TrainConfig)):
        skipped = {f.name for f in fields(kind) if f"{section}.{f.name}" not in EVALUATION_FIELDS}
        parser.add_class_arguments(kind, section, skip=skipped)
    parser.add_class_arguments(Config, skip=set(SECTIONS))
    _help_if_asked(parser, arguments)
    checkpoint, overrides = _take("checkpoint", arguments)
    given = _check_names(overrides, ["checkpoint", "json", *EVALUATION_FIELDS])
    if checkpoint is None:
        raise InputError("--checkpoint is required: name a file, for example --checkpoint runs/digits/best.pt")
    payload = read_checkpoint(checkpoint)
    if is_ours(payload):
        base = Config.from_dict(payload["config"])
    elif "data.name" in given:
        base = Config()
    else:
        raise InputError(
            f"checkpoint {checkpoint} does not say what it was trained on: name it with --data.name, for example"
            " --data.name cifar100"
        )
    stored = base.flat()
    parser.set_defaults({name: stored[name] for name in EVALUATION_FIELDS})
    values = _parse(parser, overrides, {})
    json_path = None if values["json"] is None else Path(values["json"])
    if json_path is not None and (json_path.is_dir() or not json_path.absolute().parent.is_dir()):
        raise InputError(f"--json {json_path}: expected a file in a folder that exists")
    if json_path is not None:
        # Now, as the evaluation may take an hour.
        try:
            tempfile.TemporaryFile(dir=json_path.absolute().parent).close()
        except OSError as error:
            raise InputError(f"--json {json_path}: its folder cannot be written: {error.strerror}") from error
    config = _make_config({**stored, **values})
    T = config.model.T if "model.T" in given else None
    return EvalArguments(Path(checkpoint), payload, config, T, json_path)


def _refuse_several() -> None:
    raise InputError("--dry-run and --overfit-one-batch are for a single process: start train.py without torchrun")


def _run(command: Callable[[Sequence[str], Ranks], int], arguments: Sequence[str] | None) -> int:
    who = ""
    try:
        with process_group() as ranks:
            who = "" if ranks.is_main else f"rank {ranks.rank}: "
            logging.basicConfig(format=f"{who}%(message)s", stream=sys.stderr)
            # What the ranks have in common rank 0 says.
            logging.getLogger("gac").setLevel(logging.INFO if ranks.is_main else logging.WARNING)
            return command(sys.argv[1:] if arguments is None else arguments, ranks)
    except InputError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 2
    except TrainingDiverged as error:
        # All ranks raise it.
        if not who:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except ResultsNotWritten as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        advice = "lower train.batch_size or train.eval_batch_size, or raise train.accumulate_steps"
        print(f"{who}error: {reason}; {advice}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        return interrupted.exit_status
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        reason = " ".join(str(error).split())[:200]
        print(f"{who}error: another process of the run has ended or hangs ({reason})", file=sys.stderr)
        return 1


def _make_parser(usage: str, description: str) -> ArgumentParser:
    return ArgumentParser(usage=usage, description=description, exit_on_error=False, allow_abbrev=False)


def _help_if_asked(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Print the help and exit if the command line asks for it, whatever else is on it."""
    if "-h" in arguments or "--help" in arguments:
        for action in parser._actions:
            # jsonargparse's own --data FILE and the like, which this command line does not have.
            if action.dest in SECTIONS:
                action.help = SUPPRESS
        parser.parse_args(["--help"])


def _take(name: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of the option ``name`` (None if absent) and the other arguments."""
    value, others = None, []
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, text = argument.partition("=")
        if option != f"--{name}":
            others.append(argument)
            continue
        if value is not None:
            raise InputError(f"--{name} was given twice; give one")
        value = text if equals else next(remaining, "")
        if not value or value.startswith("--"):
            raise InputError(f"--{name} needs a value")
    return value, others


def _check_names(arguments: Sequence[str], known: Collection[str]) -> set[str]:
    """Return the names of the options given. Raises InputError for one that is not ``known``."""
    given = {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}
    for name in sorted(given - set(known)):
        if name in FIELDS:
            raise InputError(f"--{name} is fixed by the checkpoint; eval.py takes {', '.join(known)}")
        raise InputError(f"unknown option --{name}{_suggest(name, known, '--')}")
    return given


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


def _read_yaml(path: Path) -> tuple[list[str], dict[str, str]]:
    """Return the options that a YAML file spells out and where each of them stands.

    A value means what it means on the command line: its text is taken, not the type that YAML gives it, which
    would make ``off`` a truth value and ``1e-5`` a string.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot read --config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path} is not a text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where} is not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path} must hold the sections {', '.join(SECTIONS)} with their fields")
    options: list[str] = []
    lines: dict[str, str] = {}
    for name, node, where in _items(root, path):
        if name in SECTIONS:
            if not isinstance(node, yaml.MappingNode):
                raise InputError(f"{where}: {name} is a section; write its fields below it")
            leaves = [(f"{name}.{key}", leaf, place) for key, leaf, place in _items(node, path)]
        else:
            leaves = [(name, node, where)]
        for field, leaf, place in leaves:
            if field not in FIELDS:
                raise InputError(f"{place}: unknown field {field}{_suggest(field, [*FIELDS, *SECTIONS])}")
            options.append(f"--{field}={_text(leaf, field, place)}")
            lines[field] = place
    return options, lines


def _items(mapping: yaml.MappingNode, path: Path) -> list[tuple[str, yaml.Node, str]]:
    """Return the keys of a mapping with their values and places. Raises InputError for a repeated key."""
    items: dict[str, tuple[str, yaml.Node, str]] = {}
    for key, node in mapping.value:
        where = f"{path} line {key.start_mark.line + 1}"
        name = str(key.value)
        if name in items:
            raise InputError(f"{where}: {name} is there twice; keep one")
        items[name] = (name, node, where)
    return list(items.values())


def _text(node: yaml.Node, field: str, where: str) -> str:
    """Return a value as it would be written on the command line."""
    if isinstance(node, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in node.value):
        return f"[{', '.join(each.value for each in node.value)}]"
    if not isinstance(node, yaml.ScalarNode):
        raise InputError(f"{where}: {field} must be {_describe(FIELDS[field])}")
    if not node.tag.endswith(":null"):
        return node.value
    if type(None) not in get_args(FIELDS[field]):
        # As an option the word would be a text where one is wanted.
        raise _bad_value(field, "None", {field: where})
    return "null"


def _parse(parser: ArgumentParser, arguments: Sequence[str], lines: dict[str, str]) -> dict[str, Any]:
    """Return the value of every option by its full name; ``lines`` says where in a file an option stands."""
    try:
        values = dict(parser.parse_args(list(arguments)).items())
    except ArgumentError as error:
        message = str(error)
        field = re.search(r'Parser key "([\w.]+)"', message)
        value = re.search(r"(?:Got|Given) value: *(.*)$", message)
        if field is None or value is None or field[1] not in FIELDS:
            raise InputError(" ".join(message.split())) from error
        raise _bad_value(field[1], value[1], lines) from error
    for field, hint in FIELDS.items():
        # jsonargparse takes null for any field.
        if field in values and values[field] is None and type(None) not in get_args(hint):
            raise _bad_value(field, "None", lines)
    return values


def _bad_value(field: str, value: str, lines: dict[str, str]) -> InputError:
    where = f"{lines[field]}: " if field in lines else ""
    got = {"": "nothing", "None": "null"}.get(value, value)
    return InputError(f"{where}{field} must be {_describe(FIELDS[field])}; got {got}")


def _describe(hint: Any) -> str:
    """Return what a field of this type accepts, in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if type(None) in get_args(hint):
        return " or ".join(["null" if part is type(None) else _describe(part) for part in get_args(hint)])
    return {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        list[int]: "a list of whole numbers such as [3, 3, 2]",
    }[hint]


def _make_config(values: dict[str, Any]) -> Config:
    nested: dict[str, Any] = {}
    for name in FIELDS:
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = values[name]
    return Config.from_dict(nested)
