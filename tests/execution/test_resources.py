"""What the system refuses or ends is one line with the remedy: real workers that fail, and PyTorch's messages."""

import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

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


FEW_FILES = """
import os, resource, sys
from gac.cli import train_main
from gac.training import engine

train_step = engine.Trainer.train_step

def lower(trainer, *batch):
    train_step(trainer, *batch)
    # Enough for what is open and the evaluation's first few processes.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, hard))

engine.Trainer.train_step = lower
sys.exit(train_main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_too_many_open_files(config: Config, tmp_path: Path) -> None:
    short = replace(config, data=replace(config.data, workers=8), train=replace(config.train, epochs=1, batch_size=20))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(short.to_dict()))
    # In a process of its own: what runs the tests needs files too.
    arguments = ["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]
    process = subprocess.run([sys.executable, "-c", FEW_FILES, *arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 1, process.stderr
    assert "error: too many open files: raise their number" in process.stderr


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
