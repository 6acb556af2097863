"""The one exception for bad input."""


class InputError(ValueError):
    """Bad input or configuration; the message is one line that says what was wrong, what is allowed, what to do.

    The command-line tools print the message without a traceback and exit with status 2.
    """
