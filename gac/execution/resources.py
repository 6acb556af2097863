"""What the operating system refuses or ends, as one line with the remedy."""

import errno
import re
import traceback

import torch

from gac.errors import first_line

# cudaErrorMemoryAllocation, and CUDA_ERROR_OUT_OF_MEMORY of the driver.
_OUT_OF_MEMORY = 2
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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch, of CUDA's libraries or of CuPy says that memory is full, the CPU's too."""
    # torch's error for the CUDA runtime has its number as error_code, CuPy's for the driver as status.
    numbers = getattr(error, "error_code", None), getattr(error, "status", None)
    said = _OUT_OF_MEMORY in numbers or re.search("DefaultCPUAllocator|STATUS_ALLOC_FAILED", str(error))
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and bool(said))


def explain(error: BaseException) -> str | None:
    """Return in one line what an error says of the system's limits and what to do, or None if it is another error."""
    if is_out_of_memory(error):
        # The allocator's own words, with what was asked for, and not where in torch that was.
        reason = first_line(error).rpartition("DefaultCPUAllocator: ")[2].split(". ")[0]
        return f"{reason}; lower train.batch_size or train.eval_batch_size, or raise train.accumulate_steps"
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
