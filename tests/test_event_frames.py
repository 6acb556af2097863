"""Event frames of an npz file, one for each time step, from training to evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gac import load_checkpoint
from gac.cli import eval_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError
from gac.execution.distributed import SINGLE_PROCESS
from gac.training.engine import train
from gac.training.run_folder import read_metrics
from gac.training.setup import check_memory, open_data
from gac.training.signals import Interrupted
from run_results import assert_same, result_of, stop_at

T = 3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames whose classes differ only in their order, which no network that repeats one of them could tell."""
    random = np.random.default_rng(0)
    frames = random.integers(0, 40, (60, T, 2, 8, 8), dtype=np.uint8)
    labels = np.arange(60) % 2
    for sample, label in zip(frames, labels, strict=True):
        sample[0 if label else T - 1] += 200
    path = tmp_path_factory.mktemp("frames") / "frames.npz"
    np.savez(path, x_train=frames[:40], y_train=labels[:40], x_test=frames[40:], y_test=labels[40:])
    return path


def config_of(file: Path, **train: object) -> Config:
    return Config(
        data=DataConfig(name="npz", root=str(file), crop_padding=1),
        model=ModelConfig(T=T, width=8, depth=[1, 1, 1], temporal_init="alive"),
        train=TrainConfig(**{"epochs": 2, "batch_size": 8, "cutmix": "batch", "mixup_alpha": 1.0} | train),
        device="cpu",
    )


def test_the_order_of_the_frames_is_learnt(file: Path, tmp_path: Path) -> None:
    train(config_of(file, epochs=8, cutmix="off", mixup_alpha=0.0, learning_rate=0.02), tmp_path)
    assert max(line["test_top1"] for line in read_metrics(tmp_path / "metrics.jsonl")) > 95
    network = load_checkpoint(tmp_path / "best.pt")
    seen = []
    network.stem.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with np.load(file) as arrays:
        frames, labels = torch.from_numpy(arrays["x_test"]), torch.from_numpy(arrays["y_test"])
    sequence = ((frames / 255 - 0.3) / 0.3).transpose(0, 1)
    network(sequence)
    assert seen[0].shape == (T, 20, 2, 8, 8)
    # Each class is taken for the other when time runs backwards.
    backwards = network(sequence.flip(0)).mean(0).argmax(-1)
    assert (backwards == 1 - labels).float().mean() > 0.8


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("train_options", [{}, {"accumulate_steps": 3, "ema_decay": 0.5}], ids=["plain", "micro"])
def test_stopped_and_resumed_it_ends_as_if_nothing_had_happened(
    train_options: dict, file: Path, tmp_path: Path
) -> None:
    config = config_of(file, **train_options)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", after_step=stop_at(7))
    train(config, tmp_path / "parts", resume="auto")
    assert_same(result_of(tmp_path / "parts"), result_of(tmp_path / "whole"))


def test_evaluation_gives_the_scores_of_training(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    scores = tmp_path / "scores.json"

    def evaluate(*options: str) -> dict:
        arguments = ["--checkpoint", str(tmp_path / "best.pt"), "--json", str(scores), "--train.eval_batch_size=7"]
        assert eval_main([*arguments, *options]) == 0
        return json.loads(scores.read_text())["scores"]

    config = config_of(file, epochs=1)
    train(replace(config, model=replace(config.model, coding="direct")), tmp_path)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    whole = evaluate("--energy")
    energy = json.loads(scores.read_text())["energy"]
    assert (energy["images"], energy["layers"][0]["layer"]) == (20, "stem.conv")
    assert energy["layers"][0]["macs"] == 20 * T * (8 * 8 * 8) * (2 * 3 * 3)
    assert whole["loss"] == pytest.approx(line["test_loss"], rel=1e-5)
    # The network sees all frames, and its first outputs depend on no later one.
    first = evaluate("--model.T=2")
    assert first["top1_by_time"] == whole["top1_by_time"][:2]
    assert "running all 3 time steps and scoring the first 2" in caplog.text

    capsys.readouterr()
    with np.load(file) as arrays:
        other = {name: each[:, :2] if name.startswith("x") else each for name, each in arrays.items()}
        still = {name: each[:, 0] if name.startswith("x") else each for name, each in arrays.items()}
    np.savez(tmp_path / "other.npz", **other)
    arguments = ["--checkpoint", str(tmp_path / "best.pt"), "--data.root"]
    assert eval_main([*arguments, str(tmp_path / "other.npz")]) == 2
    assert "is for 3 time steps, data set npz has 2" in capsys.readouterr().err
    still = {name: each.transpose(0, 2, 3, 1) if name.startswith("x") else each for name, each in still.items()}
    np.savez(tmp_path / "still.npz", **still)
    assert eval_main([*arguments, str(tmp_path / "still.npz")]) == 0
    assert "the images of npz have 8 x 8 pixels, those of training had 3 frames of 8 x 8" in caplog.text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"T": 4}, "has 3 event frames in a sample, .* and model.T is 4: set model.T to 3"),
        ({"coding": "rate"}, "rate coding makes time steps of its own from images: set model.coding to gac or direct"),
    ],
)
def test_a_network_for_other_time_steps_is_refused(model: dict, message: str, file: Path, tmp_path: Path) -> None:
    config = config_of(file)
    with pytest.raises(InputError, match=message):
        train(replace(config, model=replace(config.model, **model)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_stem_counts_every_frame_in_the_memory_that_is_needed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    monkeypatch.setattr("gac.training.setup.check_fits", lambda what, size, remedy: needed.append(size))
    config = config_of(file)
    data = open_data(config, torch.device("cpu"), None, SINGLE_PROCESS)
    for each in (data, replace(data, info=replace(data.info, frames=None))):
        check_memory(config, each, torch.device("cpu"), SINGLE_PROCESS)
    (_, frames), (_, images) = needed[:2], needed[2:]
    assert frames - images == 4 * config.train.batch_size * (T - 1) * config.model.width * 8 * 8
