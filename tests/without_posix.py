"""A Python without what Windows does not have; run as a script, it trains and evaluates in there.

Worker processes are started, not forked, and run this file again before they do anything else.
"""

import multiprocessing
import os
import shutil
import signal
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

MODULES = {"fcntl", "grp", "pwd", "resource", "syslog", "termios"}
FUNCTIONS = {
    os: ("O_DIRECTORY", "chown", "fchmod", "fchown", "fork", "getuid", "mkfifo", "sched_getaffinity", "statvfs"),
    signal: ("pthread_sigmask", "sigwait", "sigwaitinfo"),
}  # fmt: skip


class _Hidden(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide() -> None:
    """Take the modules and functions away, and the right to open a folder."""
    # Python asks for these itself where they are there: Windows deletes a tree without opening its folders.
    shutil._use_fd_functions = False
    sys.meta_path.insert(0, _Hidden())
    for name in MODULES:
        sys.modules.pop(name, None)
    for module, names in FUNCTIONS.items():
        for name in names:
            delattr(module, name)
    open_ = os.open

    def open_file(path: object, flags: int, *rest: object, **more: object) -> int:
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, flags, *rest, **more)

    os.open = open_file


if __name__ in ("__main__", "__mp_main__"):
    hide()

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    from gac.cli import eval_main, train_main

    config, images, output = sys.argv[1:]
    data = ["--data.name", "imagefolder", "--data.root", images, "--data.workers", "1"]
    for arguments in ([], ["--resume", "auto"]):
        assert train_main(["--config", config, "--output", output, *data, *arguments]) == 0
    best, scores = str(Path(output, "best.pt")), str(Path(output, "result.json"))
    assert eval_main(["--checkpoint", best, "--json", scores, "--data.workers", "0"]) == 0
    assert train_main(["--config", config, "--output", str(Path(output, "synthetic")), "--data.name=synthetic"]) == 0
