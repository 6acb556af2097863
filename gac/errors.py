"""The one exception for bad input, and what its messages are made of."""

import difflib
import numbers
from collections.abc import Mapping, Sequence

_LONGEST_VALUE = 120
_LONGEST_MESSAGE = 2000
_LARGEST_NUMBER = 2**128


class InputError(ValueError):
    """Bad input or configuration; the message is one line that says what was wrong, what is allowed, what to do.

    The command-line tools print the message without a traceback and exit with status 2. What no terminal shows as it
    is, such as a line break in a file's name or bytes that are not UTF-8, is escaped in the message.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST_MESSAGE:
            # What was wrong stands at the beginning, what to do at the end.
            message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


def check_size(name: str, value: object) -> int:
    """Return a whole number, of any library's type, as Python's. Raises InputError unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise InputError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def first_line(error: Exception) -> str:
    """Return the first line of another library's error that says something, or its type's name."""
    # Some draw a line above it.
    lines = (line.strip(" =") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def first_few(names: Sequence[str]) -> str:
    """Return up to three names and how many more there are, for a message of one line."""
    few = ", ".join(names[:3])
    return few if len(names) <= 3 else f"{few} and {len(names) - 3} more"


def did_you_mean(written: str, names: Mapping[str, str]) -> str:
    """Return " (did you mean NAME?)" with the name whose spelling, the key, is closest to what was written, or ""."""
    spellings = {spelling.lower(): name for spelling, name in names.items()}
    close = difflib.get_close_matches(written.lower(), spellings, n=1)
    return f" (did you mean {spellings[close[0]]}?)" if close else ""


def quoted(value: object) -> str:
    """Return a value that came from somewhere else as a message quotes it; the text of some would have no end."""
    if isinstance(value, list | tuple) and all(isinstance(each, str | int | float | None) for each in value):
        return abridged(f"[{', '.join(map(quoted, value))}]")
    if not isinstance(value, str | bytes | int | float | None):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"
    return abridged(repr(value))


def abridged(value: str) -> str:
    """Return a value as a message quotes it: what is too long to read ends in three dots."""
    return value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."
