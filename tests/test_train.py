"""train.py as a user runs it: a real process, real signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from gac.checkpoint import read_checkpoint
from gac.cli import train_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.training.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]
CONFIG = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=600, crop_padding=1),
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1]),
    train=TrainConfig(epochs=3, batch_size=10, cutmix="batch"),
    device="cpu",
)
BATCHES = 60


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG.to_dict()))
    return path


def start(config_file: Path, output: Path, *options: str, start_new_session: bool = False) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config", str(config_file), "--output", str(output), *options]
    # Work as small as this takes longer to share out than to do.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=start_new_session,
    )  # fmt: skip


def wait_for_epoch(process: subprocess.Popen, output: Path, epoch: int) -> list[dict[str, float]]:
    """Wait until ``epoch`` epochs are complete and return their metrics."""
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(read_metrics(metrics)) < epoch:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return read_metrics(metrics)


def signal_within_epoch(process: subprocess.Popen, output: Path, number: int, epoch: int) -> tuple[int, str]:
    """Send a signal a fifth of an epoch into ``epoch`` (from 0); return the exit status and stderr."""
    time.sleep(wait_for_epoch(process, output, epoch)[-1]["seconds"] / 5)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_stopped_twice_and_resumed_it_ends_as_if_nothing_had_happened(config_file: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, stderr = signal_within_epoch(start(config_file, parts), parts, signal.SIGINT, epoch=1)
    assert status == 130, stderr
    assert f"continue by adding --resume auto --output {parts}" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    first = read_checkpoint(parts / "last.pt")["training"]["position"]
    assert first["epoch"] == 1
    assert 0 < first["batch"] < BATCHES

    resumed = start(config_file, parts, "--resume", "auto")
    status, stderr = signal_within_epoch(resumed, parts, signal.SIGTERM, epoch=2)
    assert status == 143, stderr
    assert f"resuming {parts / 'last.pt'} after 1 epochs and {first['batch']} batches" in stderr

    arguments = ["--config", str(config_file), "--output"]
    assert train_main([*arguments, str(parts), "--resume", "auto"]) == 0
    assert train_main([*arguments, str(whole)]) == 0

    def timeless(path: Path) -> list[dict[str, float]]:
        times = ("seconds", "images_per_second")
        return [{k: v for k, v in line.items() if k not in times} for line in read_metrics(path)]

    assert timeless(parts / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    for name in ("last.pt", "best.pt"):
        model, expected = (read_checkpoint(folder / name)["model"] for folder in (parts, whole))
        assert all(model[key].equal(expected[key]) for key in expected)


def test_a_signal_to_the_process_group_spares_the_decoding_workers(tmp_path: Path) -> None:
    # As a cluster's scheduler sends it; on a terminal Ctrl-C does so with SIGINT.
    for folder, count in (("train", 400), ("val", 4)):
        for name in ("ant", "bee"):
            (tmp_path / folder / name).mkdir(parents=True)
            for index in range(count // 2):
                Image.new("RGB", (8, 8)).save(tmp_path / folder / name / f"{index}.png")
    data = replace(CONFIG.data, name="imagefolder", root=str(tmp_path), resize=8, workers=2)
    path, output = tmp_path / "folder.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(replace(CONFIG, data=data, train=replace(CONFIG.train, epochs=1000)).to_dict()))
    process = start(path, output, "--train.batch_size", "4", start_new_session=True)
    wait_for_epoch(process, output, 1)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "stopped by SIGTERM" in stderr.splitlines()[-1]
    assert read_checkpoint(output / "last.pt")["step"] > 0


def test_bad_input_is_status_2_and_one_line(config_file: Path, tmp_path: Path) -> None:
    process = start(config_file, tmp_path / "run", "--model.name", "gac_resnet18")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert stderr.startswith("error: unknown network 'gac_resnet18', expected one of: gac_msresnet18_cifar")
    assert not (tmp_path / "run").exists()
