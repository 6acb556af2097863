"""The one exception for bad input, and lists in its messages."""

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input or configuration; the message is one line that says what was wrong, what is allowed, what to do.

    The command-line tools print the message without a traceback and exit with status 2.
    """


def first_few(names: Sequence[str]) -> str:
    """Return up to three names and how many more there are, for a message of one line."""
    few = ", ".join(names[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more"
