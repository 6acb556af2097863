"""Training and evaluation where something that Linux has is missing."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from gac.cli import train_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.training.engine import train
from image_tree import write_split

ROOT = Path(__file__).parents[1]
TINY = """
data: {name: synthetic, image_size: 16, resize: 16, synthetic_images: 8}
model: {T: 1, width: 2, depth: [1, 1, 1]}
train: {epochs: 1, batch_size: 8}
device: cpu
"""


def run(command: list[str], **more: object) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    environment |= more.pop("env", {})
    environment = {name: value for name, value in environment.items() if value is not None}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, **more)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    return result.stderr


def test_training_and_evaluation_without_what_windows_lacks(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(TINY)
    for split in ("train", "val"):
        write_split(tmp_path / "images" / split, images=4)
    paths = [str(tmp_path / name) for name in ("run.yaml", "images", "run")]
    run([str(ROOT / "tests" / "without_posix.py"), *paths])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["scores"]["images"] == 4
    assert (tmp_path / "run" / "synthetic" / "last.pt").exists()


def test_training_in_a_thread_says_that_signals_are_not_handled(tmp_path: Path, caplog) -> None:
    config = Config(
        data=DataConfig(name="synthetic", image_size=8, synthetic_images=8),
        model=ModelConfig(T=1, width=2, depth=[1, 1, 1]),
        train=TrainConfig(epochs=1, batch_size=8),
        device="cpu",
    )
    thread = threading.Thread(target=train, args=(config, tmp_path / "run"))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "last.pt").exists()
    (said,) = [each for each in caplog.messages if "runs in a thread" in each]
    assert said.startswith("training runs in a thread, so Ctrl-C and SIGTERM do not save it")


@pytest.mark.parametrize("home", [None, pytest.param("/proc/nowhere", marks=pytest.mark.slow)])
def test_no_home_directory_or_none_that_can_be_written_and_temporary_files_on_another_disk(home, tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(TINY)
    program = """
import pwd, sys
pwd.getpwuid = {}.__getitem__  # a user whom the system does not know
from gac.cli import eval_main, train_main
config, output = sys.argv[1:]
status = train_main(["--config", config, "--output", output, "--dry-run"])
status = status or train_main(["--config", config, "--output", output])
sys.exit(status or eval_main(["--checkpoint", output + "/best.pt", "--json", output + "/result.json"]))
"""
    missing = dict.fromkeys(("USER", "LOGNAME", "XDG_CACHE_HOME", "TORCH_HOME"))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as elsewhere:
        arguments = [str(tmp_path / "run.yaml"), str(tmp_path / "run")]
        run(["-c", program, *arguments], cwd=tmp_path, env={"HOME": home, "TMPDIR": elsewhere, **missing})
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("tasks", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_a_launcher_that_is_not_torchrun(tasks: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "run.yaml").write_text(TINY)
    arguments = ["--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run")]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(tasks, "4")
    assert train_main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"started 4 processes that do not know each other ({tasks}" in line
    assert "torchrun" in line
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(tasks, "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of the batch script
    assert train_main(arguments) == 0
