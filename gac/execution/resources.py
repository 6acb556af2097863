"""What the operating system refuses or ends, as one line with the remedy."""

import errno
import re
import traceback

_ENDED = (
    "a process that decodes images was ended from outside, as systems do when memory runs out: lower data.workers;"
    " --resume auto continues the run"
)
# What PyTorch and its workers say, and what that means. Their exceptions are plain RuntimeErrors and OSErrors.
_MEANINGS = {
    r"Too many open files|received \d+ items of ancdata": (
        "too many open files: raise their number, for example with ulimit -n 65536, or lower data.workers"
    ),
    r"Bus error|insufficient shared memory|out of shared memory|shared memory.*No space left|</?torch_\w+>": (
        "/dev/shm, through which the processes that decode images pass them on, is too small: enlarge it (docker run"
        " --shm-size=8g or --ipc=host) or lower data.workers; 0 does without"
    ),
    r"DataLoader worker \(pid.*\) (?:is killed|exited)": _ENDED,
}


def explain(error: BaseException) -> str | None:
    """Return in one line what an error says of the system's limits and what to do, or None if it is another error."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return next(iter(_MEANINGS.values()))
    if isinstance(error, ConnectionError | EOFError | FileNotFoundError) and _is_of_loader(error):
        return _ENDED
    if not isinstance(error, RuntimeError | OSError):
        return None
    return next((meaning for pattern, meaning in _MEANINGS.items() if re.search(pattern, str(error), re.DOTALL)), None)


def _is_of_loader(error: BaseException) -> bool:
    """Return whether PyTorch's DataLoader met an error itself, in what it has from its workers."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    # An error that a worker met while it read images begins with these words.
    return not str(error).startswith("Caught ") and any(
        frame.f_globals.get("__name__", "").startswith("torch.utils.data.") for frame in frames
    )
