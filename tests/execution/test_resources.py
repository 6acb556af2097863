"""What the system refuses or ends is one line with the remedy: real workers that fail, and PyTorch's messages."""

import gc
import multiprocessing
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.execution.resources import explain
from gac.training.engine import Trainer, train
from image_tree import write_split

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for split in ("train", "val"):
        write_split(tmp_path / "images" / split, images=20)
    return Config(
        data=DataConfig(name="imagefolder", root=str(tmp_path / "images"), image_size=16, resize=16, workers=1),
        model=ModelConfig(T=1, width=2, depth=[1, 1, 1]),
        train=TrainConfig(epochs=100, batch_size=2, cutmix="off"),
        device="cpu",
    )


def test_a_decoding_process_that_is_killed(config: Config, tmp_path: Path) -> None:
    def kill(trainer: Trainer) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises((RuntimeError, OSError, EOFError)) as error:
        train(config, tmp_path / "run", after_step=kill)
    assert explain(error.value).startswith("a process that decodes images was ended from outside")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_too_many_open_files(config: Config, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def lower(trainer: Trainer) -> None:
        # Enough for what is open and the evaluation's first few processes.
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, limits[1]))

    short = replace(config, data=replace(config.data, workers=8), train=replace(config.train, epochs=1, batch_size=20))
    try:
        with pytest.raises((OSError, RuntimeError)) as error:
            train(short, tmp_path / "run", after_step=lower)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert explain(error.value).startswith("too many open files: raise their number")
    # Else the garbage collector waits for them in some other test.
    for worker in multiprocessing.active_children():
        worker.kill()
    del error
    gc.collect()


@pytest.mark.parametrize(
    ("message", "meaning"),
    [
        ("unable to allocate shared memory(shm) for file </torch_87_16_0>: No space left on device (28)", "/dev/shm"),
        ("unable to write to file </torch_87_16_0>: No space left on device (28)", "/dev/shm"),
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out"
            " of shared memory. Please try to raise your shared memory limit.",
            "/dev/shm",
        ),
        (
            "unable to open shared memory object </torch_87_16_0> in read-write mode: Too many open files (24)",
            "too many",
        ),
        ("received 0 items of ancdata", "too many"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "a process that decodes"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "a process that decodes"),
    ],
)
def test_what_pytorch_says_is_explained(message: str, meaning: str) -> None:
    assert explain(RuntimeError(message)).startswith(meaning)
    assert "\n" not in explain(RuntimeError(message))


def test_other_errors_are_not_explained() -> None:
    for error in (
        RuntimeError("shape mismatch"),
        OSError(28, "No space left on device"),
        ConnectionResetError(),
        ValueError("Bus error"),
    ):
        assert explain(error) is None
