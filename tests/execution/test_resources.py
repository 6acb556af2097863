"""What the system refuses or ends is one line with the remedy: real workers that fail, and PyTorch's messages."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.execution.resources import explain
from image_tree import write_split

ROOT = Path(__file__).parents[2]

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


PROGRAM = """
import multiprocessing, os, resource, signal, sys
from gac.cli import train_main
from gac.training import engine

train_step = engine.Trainer.train_step

def then(trainer, *batch):
    train_step(trainer, *batch)
    {then}

engine.Trainer.train_step = then
sys.exit(train_main(sys.argv[1:]))
"""


def error_of_run(config: Config, folder: Path, then: str) -> str:
    """Return what a run prints that does ``then`` after every step and must end with status 1.

    It has a process of its own: what fails there would fail at any moment in the process that runs the tests.
    """
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-c", PROGRAM.format(then=then), "--config", str(folder / "config.yaml")]
    process = subprocess.run(
        [*command, "--output", str(folder / "run")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 1, process.stderr
    return process.stderr


def test_a_decoding_process_that_is_killed(config: Config, tmp_path: Path) -> None:
    kill = "[os.kill(each.pid, signal.SIGKILL) for each in multiprocessing.active_children()]"
    assert "error: a process that decodes images was ended from outside" in error_of_run(config, tmp_path, kill)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_too_many_open_files(config: Config, tmp_path: Path) -> None:
    short = replace(config, data=replace(config.data, workers=8), train=replace(config.train, epochs=1, batch_size=20))
    # Enough for what is open and the evaluation's first few processes.
    files = "(len(os.listdir('/proc/self/fd')) + 4, resource.getrlimit(resource.RLIMIT_NOFILE)[1])"
    lower = f"resource.setrlimit(resource.RLIMIT_NOFILE, {files})"
    assert "error: too many open files: raise their number" in error_of_run(short, tmp_path, lower)


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
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
            " allocate 43366400 bytes. Error code 12 (Cannot allocate memory)",
            "can't allocate memory: you tried to allocate 43366400 bytes; lower train.batch_size",
        ),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`; lower train.batch_size",
        ),
    ],
)
def test_what_pytorch_says_is_explained(message: str, meaning: str) -> None:
    assert explain(RuntimeError(message)).startswith(meaning)
    assert "\n" not in explain(RuntimeError(message))


@pytest.mark.parametrize("number", ["error_code", "status"])
def test_full_memory_of_a_device_is_explained_by_its_number(number: str) -> None:
    error = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
    setattr(error, number, 2)
    assert explain(error).startswith("CUDA error: out of memory; lower train.batch_size")
    setattr(error, number, 700)
    assert explain(error) is None


def test_other_errors_are_not_explained() -> None:
    for error in (
        RuntimeError("shape mismatch"),
        OSError(28, "No space left on device"),
        ConnectionResetError(),
        ValueError("Bus error"),
    ):
        assert explain(error) is None
