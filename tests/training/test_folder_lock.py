"""The lock of a run folder, between real processes."""

import errno
import fcntl
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gac.errors import InputError
from gac.training.folder_lock import FolderLock


@contextmanager
def process(work: Callable[[], None]) -> Iterator[int]:
    """Fork a process that does some work and waits, and kill it at the end."""
    done, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(tell, b".")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(done, 1) == b"."
        yield child
    finally:
        os.close(done)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_another_process_is_kept_out_and_told_who_is_in(tmp_path: Path) -> None:
    with process(FolderLock(tmp_path).acquire) as child:
        before = (tmp_path / "run.lock").read_text()
        lock = FolderLock(tmp_path)
        who = rf"process {child} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \+\d{{4}}"
        with pytest.raises(InputError, match=rf"\A{re.escape(str(tmp_path))} is in use by {who}: wait .*\Z") as error:
            lock.acquire()
        assert "\n" not in str(error.value)
        assert not lock.held
        assert (tmp_path / "run.lock").read_text() == before
        # Being refused does not let the next one in.
        with pytest.raises(InputError, match=f"process {child} "):
            lock.acquire()
    lock.acquire()
    assert lock.held
    assert f"process {os.getpid()} on" in (tmp_path / "run.lock").read_text()
    assert (tmp_path / "run.lock").read_text().count("\n") == 1


def test_a_killed_process_keeps_nobody_out_though_its_workers_live(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)

    def fork_a_worker() -> None:
        lock.acquire()
        if os.fork() == 0:
            os.close(tell)
            os.read(end, 1)
            os._exit(0)

    # A worker that lives until the test closes the pipe.
    end, tell = os.pipe()
    with process(fork_a_worker):
        pass
    FolderLock(tmp_path).acquire()
    os.close(tell)
    os.close(end)


def test_whoever_closes_it_lets_the_next_one_in(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.close()
    lock.acquire()

    def refused() -> None:
        with pytest.raises(InputError, match=f"process {os.getppid()} "):
            FolderLock(tmp_path).acquire()

    with process(refused):
        pass
    lock.close()
    with process(FolderLock(tmp_path).acquire):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_there_is_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fail)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert lock.held
    assert caplog.messages == [
        f"{tmp_path} cannot be locked ({os.strerror(number)}): see to it that no other run writes there"
    ]


def test_other_errors_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", fail)
    lock = FolderLock(tmp_path)
    with pytest.raises(OSError, match="Input/output error"):
        lock.acquire()
    assert not lock.held
