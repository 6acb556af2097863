"""Command lines of the smaller programs: argparse, with one line for what is wrong."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gac.errors import InputError
from gac.files import ResultsNotWritten, check_writable, user_path


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputError, and whose help shows the defaults."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists all options")

    def add(self, name: str, help: str, **options: Any) -> None:
        """Add an option; one whose ``default`` is a list takes several values, of which equal ones count once."""
        several = {"nargs": "+", "action": _Distinct} if isinstance(options.get("default"), list) else {}
        self.add_argument(name, help=help, **several, **options)


class _Distinct(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: list, option_string: Any = None) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def finish(run: Callable[[], object], *failures: type[Exception]) -> int:
    """Run a program and return its exit status: 0, or 2 for bad input and 1 for results that cannot be written.

    Of these, and of ``failures``, which are 1 too, one line is printed to stderr. An output that nobody reads to its
    end, as in ``... | head -1``, is 1 without a line.
    """
    try:
        run()
        print(end="", flush=True)
    except BrokenPipeError:
        discard_output()
        return 1
    except (InputError, ResultsNotWritten, *failures) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def discard_output() -> None:
    """Let what is still to be printed go nowhere, as Python would complain at its end that nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def at_least(minimum: int, kind: type = int) -> Callable[[str], float]:
    """Return an argument type: a number of this kind that is ``minimum`` or more."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value < float("inf"):
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"expected a {whole}number >= {minimum}, got {text!r}")
        return value

    return parse


def new_file(suffix: str) -> Callable[[str], Path]:
    """Return an argument type: a file that can be written and whose name ends in ``suffix``."""

    def parse(text: str) -> Path:
        try:
            path = check_writable(user_path(text, "file"), "file")
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if path.suffix != suffix:
            raise argparse.ArgumentTypeError(f"expected a file *{suffix}, got {text!r}")
        return path

    return parse
