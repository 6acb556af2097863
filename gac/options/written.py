"""Reading a command line and a YAML file into a Config.

Both spell every value as text, which means the same in either place; options and messages come from
:data:`gac.config.FIELDS`.
"""

import argparse
import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from gac.config import FIELDS, SECTIONS, Config, FieldError
from gac.errors import InputError, abridged
from gac.files import user_path

# A value as it is written, None for YAML's null, and where it stands in a file.
Written = tuple[str | None, str]

# What the options that are no fields call a value that names a file or a folder.
_NAMES_A_PATH = re.compile("FILE|FOLDER|CHECKPOINT")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def read_command_line(
    arguments: Sequence[str], usage: str, description: str, own: dict[str, str], fields: Collection[str]
) -> tuple[dict[str, Any], dict[str, Written]]:
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


def read_yaml(path: Path) -> dict[str, Written]:
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
    return dict(_fields(root, path, set()))


def _fields(mapping: yaml.MappingNode, path: Path, names: set[str], prefix: str = "") -> Iterator[tuple[str, Written]]:
    for key, node in mapping.value:
        name, place = f"{prefix}{key.value}", f"{path} line {key.start_mark.line + 1}: "
        if name in names:
            raise InputError(f"{place}{key.value} is there twice; keep one")
        names.add(name)
        if name in FIELDS:
            yield name, (_text(node, name, place), place)
        elif name not in SECTIONS:
            raise InputError(f"{place}unknown field {name}{_suggest(name, [*FIELDS, *SECTIONS])}")
        elif not isinstance(node, yaml.MappingNode):
            raise InputError(f"{place}{name} is a section; write its fields below it")
        else:
            yield from _fields(node, path, names, f"{name}.")


def _text(node: yaml.Node, name: str, place: str) -> str | None:
    """Return a field's value as it would be written on the command line."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    is_list = isinstance(node, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in node.value)
    # A text has no list in it: its brackets would become part of a path or of a pattern.
    if not is_list or FIELDS[name].is_text:
        raise InputError(f"{place}{name} must be {FIELDS[name].kind}")
    return f"[{', '.join(each.value for each in node.value)}]"


def make_config(base: Config, written: Mapping[str, Written]) -> Config:
    """Return ``base`` with the values that are ``written``."""
    try:
        return Config.from_flat(base.flat() | {name: FIELDS[name].parse(text) for name, (text, _) in written.items()})
    except FieldError as error:
        if error.field not in written:
            raise
        text, place = written[error.field]
        got = "null" if text is None else abridged(text) or "nothing"
        raise InputError(f"{place}{error.field} must be {error.allowed}; got {got}") from None
