"""--dry-run: everything happens once, and nothing stays."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from gac.cli import train_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.training.engine import Trainer

TINY = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=300, synthetic_classes=3, crop_padding=1),
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1]),
    train=TrainConfig(epochs=100, batch_size=10, eval_batch_size=20, warmup_epochs=50, checkpoint_steps=50),
    device="cpu",
)


def dry_run(config: Config, folder: Path, output: Path) -> int:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return train_main(["--config", str(folder / "tiny.yaml"), "--output", str(output), "--dry-run"])


def test_everything_happens_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    steps, evaluated = [], []
    train_step, evaluate = Trainer._train_step, Trainer._evaluate

    def record_step(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> None:
        train_step(trainer, images, labels)
        steps.append((trainer.position.step, len(labels), trainer.step.totals.read().loss))

    def record_evaluation(trainer: Trainer) -> tuple:
        scores = evaluate(trainer)
        evaluated.append(scores[0].images)
        return scores

    monkeypatch.setattr(Trainer, "_train_step", record_step)
    monkeypatch.setattr(Trainer, "_evaluate", record_evaluation)
    (tmp_path / "runs" / "kept").mkdir(parents=True)
    with caplog.at_level("INFO", "gac"):
        assert dry_run(TINY, tmp_path, tmp_path / "runs" / "kept") == 0
    # Two steps, then the second of them again from the state after the first.
    assert [step[:2] for step in steps] == [(1, 10), (2, 10), (2, 10)]
    assert steps[2] == steps[1]
    assert evaluated == [20, 20]
    assert re.search(r"resuming .*last-2\.pt after 0 epochs and 1 batches", caplog.text)
    assert capsys.readouterr().out.startswith(
        "dry run of gac_msresnet18_cifar on synthetic: trained 2 steps with batches of 10"
    )
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["kept"]
    assert not any((tmp_path / "runs" / "kept").iterdir())


def test_a_data_set_of_one_batch_is_enough(tmp_path: Path) -> None:
    assert dry_run(replace(TINY, train=replace(TINY.train, batch_size=300)), tmp_path, tmp_path / "run") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_what_would_end_the_run_ends_the_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert dry_run(replace(TINY, train=replace(TINY.train, amp="fp16")), tmp_path, tmp_path / "run") == 2
    assert "fp16 needs a CUDA device" in capsys.readouterr().err
    assert dry_run(TINY, tmp_path, tmp_path / "tiny.yaml" / "run") == 2
    assert "choose another --output" in capsys.readouterr().err.splitlines()[-1]
    assert dry_run(replace(TINY, train=replace(TINY.train, learning_rate=1e30)), tmp_path, tmp_path / "run") == 1
    assert "learning rate 1e+30" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
