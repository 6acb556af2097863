"""What the command lines of all benchmarks share."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from gac.errors import InputError


class MeasurementError(Exception):
    """A measurement that must not be reported; the message is one line that says why."""


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


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an argument type: a whole number that is ``minimum`` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {minimum}, got {text!r}")
        return value

    return parse


def new_file(suffix: str) -> Callable[[str], Path]:
    """Return an argument type: a file that can be written and whose name ends in ``suffix``."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix or path.is_dir() or not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"expected a file *{suffix} in a folder that exists, got {text!r}")
        return path

    return parse


def run(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit status: 0, 1 for a MeasurementError, 2 for bad input, 130 for an interrupt."""
    try:
        command(sys.argv[1:] if arguments is None else arguments)
    except MeasurementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
