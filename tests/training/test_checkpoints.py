"""Which checkpoints are kept, which one is read, and when one is due."""

import logging
import os
import time
from pathlib import Path

import pytest

from gac.checkpoint import read_checkpoint
from gac.errors import InputError
from gac.files import ResultsNotWritten
from gac.training.checkpoints import CheckpointInterval, Checkpoints


def steps_in(folder: Path) -> dict[str, int]:
    return {path.name: read_checkpoint(path)["step"] for path in sorted(folder.glob("*.pt"))}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.fixture
def three(tmp_path: Path) -> Checkpoints:
    """The last three of five checkpoints."""
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.write({"step": step}, keep=3)
    return checkpoints


def test_the_last_n_are_kept(three: Checkpoints) -> None:
    assert steps_in(three.folder) == {"last.pt": 5, "last-1.pt": 4, "last-2.pt": 3}
    three.write({"step": 6}, keep=2)
    assert steps_in(three.folder) == {"last.pt": 6, "last-1.pt": 5}
    three.write({"step": 7}, keep=1)
    assert steps_in(three.folder) == {"last.pt": 7}


def test_there_are_more_than_ten(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 14):
        checkpoints.write({"step": step}, keep=12)
    assert [read_checkpoint(path)["step"] for path in checkpoints.existing()] == list(range(13, 1, -1))


def test_all_can_be_kept(tmp_path: Path) -> None:
    # Nothing grows with the number but the files that there are.
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 4):
        checkpoints.write({"step": step}, keep=10**15)
    assert steps_in(tmp_path) == {"last.pt": 3, "last-1.pt": 2, "last-2.pt": 1}


def test_other_files_are_none_of_its_business(three: Checkpoints) -> None:
    names = ["last-0.pt", "last-01.pt", "last-good.pt", "lastly.pt", "best.pt", "last.pt.damaged"]
    for name in names:
        (three.folder / name).touch()
    three.write({"step": 6}, keep=1)
    assert sorted(os.listdir(three.folder)) == sorted([*names, "last.pt"])


def test_the_newest_is_read(three: Checkpoints) -> None:
    path, payload = three.read()
    assert (path, payload["step"]) == (three.newest, 5)
    assert Checkpoints(three.folder / "elsewhere").read() is None


def test_damaged_ones_are_named_and_set_aside(three: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    truncate(three.newest)
    truncate(three.folder / "last-1.pt")
    with caplog.at_level(logging.WARNING, "gac"):
        path, payload = three.read()
    assert (path.name, payload["step"]) == ("last-2.pt", 3)
    assert caplog.messages == [
        f"{three.folder / name} is damaged: using last-2.pt, which is older; renamed it to {name}.damaged"
        for name in ("last.pt", "last-1.pt")
    ]
    # A damaged one must not take the place of a good one.
    three.write({"step": 4}, keep=2)
    assert steps_in(three.folder) == {"last.pt": 4, "last-2.pt": 3}
    three.write({"step": 5}, keep=2)
    assert steps_in(three.folder) == {"last.pt": 5, "last-1.pt": 4}


def test_if_all_are_damaged_that_is_one_line_and_they_stay(three: Checkpoints) -> None:
    for path in three.existing():
        truncate(path)
    before = sorted(os.listdir(three.folder))
    with pytest.raises(InputError, match=r"cannot resume: .*last\.pt and .*last-2\.pt are damaged; start") as error:
        three.read()
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(three.folder)) == before


def test_a_checkpoint_of_another_format_is_not_taken_for_damaged(three: Checkpoints) -> None:
    three.write({"step": 6, "format": "gac-checkpoint-9"}, keep=3)
    with pytest.raises(InputError, match="format 'gac-checkpoint-9' is not known"):
        three.read()
    assert three.newest.exists()


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_killed_while_names_change_a_complete_one_is_read(
    moves: int, three: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, done = os.replace, []

    def stop_after_some(source: Path, destination: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(source)
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_after_some)
        with pytest.raises(KeyboardInterrupt):
            three.write({"step": 6}, keep=3)
    assert three.read()[1]["step"] == 5
    # The name that was left free is filled, so that none is lost by the interruption.
    three.write({"step": 6}, keep=3)
    assert steps_in(three.folder) == {"last.pt": 6, "last-1.pt": 5, "last-2.pt": 4}


def test_a_failing_write_leaves_all_as_they_were(three: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = r"cannot write .*last\.pt: No space left on device; the checkpoints before it are as they were$"
    with pytest.raises(ResultsNotWritten, match=message):
        three.write({"step": 6}, keep=3)
    assert steps_in(three.folder) == {"last.pt": 5, "last-1.pt": 4, "last-2.pt": 3}
    assert len(os.listdir(three.folder)) == 3


def test_every_so_many_steps() -> None:
    interval = CheckpointInterval(minutes=0, steps=4)
    assert [step for step in range(1, 13) if interval.due(step)] == [4, 8, 12]
    assert not any(CheckpointInterval(minutes=0, steps=0).due(step) for step in range(1, 13))


def test_every_so_many_minutes_since_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    interval = CheckpointInterval(minutes=1.5, steps=0)
    due = []
    for now[0] in (0.0, 89.0, 90.0, 91.0, 180.0, 200.0):
        if interval.due(1):
            due.append(now[0])
            interval.restart()
    assert due == [90.0, 180.0]
    now[0] = 1e9
    assert not CheckpointInterval(minutes=0, steps=0).due(1)
