"""Packages that only some exports need: imported when they are, and their absence is one line."""

import importlib
from types import ModuleType

from gac.errors import InputError


def require(extra: str, *names: str) -> list[ModuleType]:
    """Import modules that the package's ``extra`` brings, and return them.

    Raises:
        InputError: If one of them is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ModuleNotFoundError as error:
        if error.name not in {name.partition(".")[0] for name in names}:
            raise
        raise InputError(f"{error.name} is not installed: pip install '.[{extra}]' in this package's folder") from error
