"""Which runs a folder accepts."""

import errno
import fcntl
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data.interface import DataInfo, digest
from gac.errors import InputError
from gac.training.run_folder import (
    FREE_WHEN_RESUMING,
    FolderLock,
    RunFolder,
    append_metrics,
    check_same_data,
    check_same_run,
    read_metrics,
    write_metrics,
)


@pytest.fixture
def used(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "used")
    folder.path.mkdir()
    write_checkpoint(folder.path / "last-1.pt", {"step": 1})
    write_checkpoint(folder.path / "last.pt", {"step": 2})
    return folder


@pytest.mark.parametrize("left", ["last.pt", "last-1.pt"])
def test_a_run_is_not_overwritten(left: str, used: RunFolder, tmp_path: Path) -> None:
    for path in used.checkpoints.existing():
        if path.name != left:
            path.unlink()
    for resume in (None, str(tmp_path / "other" / "last.pt")):
        with pytest.raises(InputError, match="--resume auto or choose another --output"):
            used.checkpoint_to_resume(resume)


def test_a_run_is_continued_by_auto_or_by_name(used: RunFolder) -> None:
    last, older = used.path / "last.pt", used.path / "last-1.pt"
    assert used.checkpoint_to_resume("auto") == (last, read_checkpoint(last))
    assert used.checkpoint_to_resume(str(last)) == (last, read_checkpoint(last))
    assert used.checkpoint_to_resume(str(older)) == (older, read_checkpoint(older))


def test_auto_takes_the_one_before_a_damaged_one_and_a_path_does_not(used: RunFolder) -> None:
    last, older = used.path / "last.pt", used.path / "last-1.pt"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"last\.pt: damaged .*; --resume auto continues the newest that is whole$"):
        used.checkpoint_to_resume(str(last))
    assert last.exists()
    assert used.checkpoint_to_resume("auto") == (older, read_checkpoint(older))


def test_a_damaged_file_elsewhere_is_not_blamed_on_this_run(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"PK")
    with pytest.raises(
        InputError, match=r"damaged or not a PyTorch or safetensors file, or an old one with Python objects [a-z ]+$"
    ):
        RunFolder(tmp_path / "new").checkpoint_to_resume(str(tmp_path / "last.pt"))


def test_a_fresh_folder_accepts_everything(used: RunFolder, tmp_path: Path) -> None:
    fresh = RunFolder(tmp_path / "fresh")
    assert fresh.checkpoint_to_resume(None) is None
    assert fresh.checkpoint_to_resume("auto") is None
    elsewhere = used.path / "last.pt"
    assert fresh.checkpoint_to_resume(str(elsewhere)) == (elsewhere, read_checkpoint(elsewhere))


@pytest.mark.parametrize("name", ["best.pt", "metrics.jsonl"])
@pytest.mark.parametrize("resume", [None, "auto", "elsewhere/last.pt"])
def test_results_without_their_last_pt_are_not_overwritten(name: str, resume: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}\n{}\n")
    with pytest.raises(InputError, match=f"holds the {name} of a run that cannot be continued") as error:
        RunFolder(tmp_path).checkpoint_to_resume(resume)
    assert "\n" not in str(error.value)


def test_what_a_crash_in_the_first_epoch_left_does_not_stop_resume_auto(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert RunFolder(tmp_path).checkpoint_to_resume("auto") is None
    (tmp_path / "best.pt").touch()
    assert RunFolder(tmp_path).checkpoint_to_resume("auto") is None
    with pytest.raises(InputError, match="cannot be continued"):
        RunFolder(tmp_path).checkpoint_to_resume(None)


def test_empty_metrics_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert RunFolder(tmp_path).checkpoint_to_resume("auto") is None


def test_a_checkpoint_under_another_name_is_continued_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_text("{}")
    write_checkpoint(tmp_path / "kept.pt", {"step": 3})
    assert RunFolder(tmp_path).checkpoint_to_resume(str(tmp_path / "kept.pt"))[1]["step"] == 3


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    for name in ("last.pt", "best.pt", "config.yaml", "metrics.jsonl"):
        (tmp_path / f".{name}.abc123.tmp").touch()
    (tmp_path / ".notes.tmp").touch()
    RunFolder(tmp_path).create(Config())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.tmp", "config.yaml", "run.lock"]


def test_create_writes_the_whole_configuration(tmp_path: Path) -> None:
    config = Config(train=TrainConfig(learning_rate=1e-5, amp="off"), model=ModelConfig(depth=[1, 2, 3]))
    folder = RunFolder(tmp_path / "a" / "b")
    folder.create(config)
    assert Config.from_dict(yaml.safe_load(folder.config.read_text())) == config


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write the run folder"):
        RunFolder(tmp_path / "file").create(Config())


def test_a_folder_that_is_there_is_entered_and_none_is_made(tmp_path: Path) -> None:
    there, missing = RunFolder(tmp_path), RunFolder(tmp_path / "missing")
    there.enter()
    assert there.lock.held
    missing.enter()
    assert not missing.path.exists()
    missing.create(Config())
    assert missing.lock.held


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_run_that_came_in_between_is_not_overwritten(resume: str | None, tmp_path: Path) -> None:
    slow = RunFolder(tmp_path / "run")
    slow.enter()
    assert slow.checkpoint_to_resume(resume) is None
    fast = RunFolder(tmp_path / "run")
    fast.create(Config(train=TrainConfig(seed=7)))
    write_checkpoint(fast.path / "last.pt", {"step": 1})
    fast.lock.close()
    with pytest.raises(InputError, match="holds a run already"):
        slow.create(Config())
    assert Config.from_dict(yaml.safe_load(fast.config.read_text())).train.seed == 7


def test_a_folder_that_cannot_be_written_is_named_on_entering(tmp_path: Path) -> None:
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(InputError, match=f"cannot write the run folder {tmp_path}: Is a directory; choose another"):
        RunFolder(tmp_path).enter()


def payload_of(config: Config, **training: object) -> dict[str, object]:
    return {"config": config.to_dict(), "training": {"totals": None} | training, "versions": {"gac": "0.9"}}


def test_every_difference_that_changes_the_result_is_listed() -> None:
    now = Config(
        data=DataConfig(name="digits"),
        train=TrainConfig(epochs=3, eval_batch_size=7, keep_checkpoints=5),
        model=ModelConfig(backend="torch"),
        device="cpu",
    )
    with pytest.raises(InputError) as error:
        check_same_run(payload_of(Config()), now, Path("last.pt"))
    message = str(error.value)
    assert "(data.name cifar10 -> digits, train.epochs 250 -> 3)" in message
    assert "\n" not in message


def test_a_preset_and_its_constants_are_the_same_run_and_other_constants_are_not() -> None:
    before, stored = Config(), payload_of(Config())
    for name in ("tau", "v_threshold", "surrogate", "detach_reset"):
        # As a version that did not know them wrote it.
        del stored["config"]["model"][name]
    spelled_out = before.with_neuron()
    check_same_run(stored, before, Path("last.pt"))
    check_same_run(stored, spelled_out, Path("last.pt"))
    check_same_run(payload_of(spelled_out), before, Path("last.pt"))
    other = replace(before, model=replace(before.model, tau=4.0, surrogate="atan"))
    with pytest.raises(InputError, match=r"\(model\.tau 2\.0 -> 4\.0, model\.surrogate triangle -> atan\)"):
        check_same_run(stored, other, Path("last.pt"))


def test_where_and_how_fast_it_runs_and_how_it_is_saved_may_change() -> None:
    stored = Config()
    now = Config(
        data=DataConfig(root="elsewhere", download=True, workers=1),
        model=replace(stored.model, backend="torch"),
        train=replace(
            stored.train,
            cuda_graph=True,
            overlap_weight_gradients=True,
            checkpoint_activations=True,
            eval_batch_size=1,
            checkpoint_minutes=1.5,
            checkpoint_steps=3,
            keep_checkpoints=1,
            accumulate_steps=2,
        ),
        device="cpu",
    )
    check_same_run(payload_of(stored), now, Path("last.pt"))
    before, after = stored.flat(), now.flat()
    assert {name for name in before if before[name] != after[name]} == FREE_WHEN_RESUMING


def test_a_network_without_its_training_state_is_not_resumed() -> None:
    payload = payload_of(Config())
    del payload["training"]
    with pytest.raises(InputError, match=r"best\.pt holds a network without the state to resume from"):
        check_same_run(payload, Config(), Path("best.pt"))


def test_the_state_of_an_older_version_is_not_resumed() -> None:
    payload = payload_of(Config())
    del payload["training"]["totals"]
    with pytest.raises(InputError, match=r"last\.pt: it was written by gac 0\.9, which can continue it"):
        check_same_run(payload, Config(), Path("last.pt"))


INFO = DataInfo("npz", 3, 1, 8, 8, ("a", "b", "c"), 90, 10, (0.5,), (0.25,), digest(np.arange(90)))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"train_size": 100, "mean": (0.4,)}, r"100 training images, now 90\)"),
        ({"class_names": ("b", "a", "c")}, r"class names \('b', 'a', 'c'\), now \('a', 'b', 'c'\)"),
        ({"class_names": ("a", "b", "C")}, r"class names \('a', 'b', 'C'\), now \('a', 'b', 'c'\)"),
        ({"mean": (0.4,), "std": (0.2,)}, r"mean \(0\.4,\), now \(0\.5,\), std \(0\.2,\), now"),
        ({"train_labels": digest(np.arange(90)[::-1])}, r"other train labels\)"),
    ],
)
def test_other_data_are_not_trained_on(other: dict, said: str) -> None:
    check_same_data({"data": INFO.to_dict()}, INFO, Path("last.pt"))
    with pytest.raises(InputError, match=rf"^cannot resume last\.pt with other data \(it had {said}"):
        check_same_data({"data": replace(INFO, **other).to_dict()}, INFO, Path("last.pt"))


def test_other_sizes_than_an_older_checkpoint_says_are_not_trained_on() -> None:
    now = {"training images": 90, "test images": 10, "classes": 3}
    check_same_data({"training": {"data": now}}, INFO, Path("last.pt"))
    check_same_data({"training": {}}, INFO, Path("last.pt"))
    before = {"training images": 100, "test images": 10, "classes": 4}
    with pytest.raises(InputError, match=r"\(it had 100 training images, now 90, 4 classes, now 3\): "):
        check_same_data({"training": {"data": before}}, INFO, Path("last.pt"))


@pytest.fixture
def three_epochs(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2, 3):
        append_metrics(path, {"epoch": epoch, "train_loss": epoch / 7})
    return path


def test_lines_come_back_exactly(three_epochs: Path) -> None:
    assert read_metrics(three_epochs) == [{"epoch": n, "train_loss": n / 7} for n in (1, 2, 3)]
    assert three_epochs.read_text().count("\n") == 3


def test_half_a_last_line_does_not_count(three_epochs: Path) -> None:
    with three_epochs.open("a") as file:
        file.write('{"epoch": 4, "tra')
    assert [line["epoch"] for line in read_metrics(three_epochs)] == [1, 2, 3]


@pytest.mark.parametrize("complete", [0, 1, 3])
def test_a_resumed_run_has_the_epochs_before_it_and_no_others(three_epochs: Path, complete: int) -> None:
    before = read_metrics(three_epochs)
    with three_epochs.open("a") as file:
        file.write('{"epoch": 4, "tra')
    write_metrics(three_epochs, before[:complete])
    append_metrics(three_epochs, {"epoch": complete + 1, "train_loss": 0.0})
    assert read_metrics(three_epochs) == [*before[:complete], {"epoch": complete + 1, "train_loss": 0.0}]


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


def test_a_lock_file_that_its_holder_removed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock_file, removed = FolderLock._lock, []

    def lock_as_its_holder_removes_it(lock: FolderLock, file: object) -> None:
        lock_file(lock, file)
        if not removed:
            removed.append(lock.path.read_text())
            lock.path.unlink()

    monkeypatch.setattr(FolderLock, "_lock", lock_as_its_holder_removes_it)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert removed
    assert lock.path.read_text().startswith(f"process {os.getpid()} ")
    lock.close()
    assert not list(tmp_path.iterdir())
