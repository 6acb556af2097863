"""--overfit-one-batch: a network that works learns it, and one that cannot is told apart."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from gac.cli import train_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data import build_data
from gac.training import overfit
from gac.training.engine import Trainer

# Random pixels with random labels: what is learnt of them is learnt by heart.
TINY = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=64, augment="randaugment", random_erasing=1.0),
    model=ModelConfig(T=2, width=16, depth=[1, 1, 1]),
    train=TrainConfig(batch_size=16, cutmix="batch", cutmix_probability=1.0, mixup_alpha=1.0, mix_off_epochs=100),
    device="cpu",
)


def overfit_one_batch(config: Config, folder: Path) -> int:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config.to_dict()))
    arguments = ["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), "--overfit-one-batch"]
    status = train_main(arguments)
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]
    return status


def test_one_batch_is_learnt_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    batches = []
    train_step = Trainer._train_step

    def record(trainer: Trainer, images: object, labels: object) -> None:
        batches.append((images, labels))
        train_step(trainer, images, labels)

    monkeypatch.setattr(Trainer, "_train_step", record)
    monkeypatch.setattr(overfit, "STEPS", 120)
    assert overfit_one_batch(TINY, tmp_path) == 0
    assert "one batch, 120 steps: 100.00 % of it right, learnt" in capsys.readouterr().out
    assert len(batches) == 120
    assert all(images is batches[0][0] and labels is batches[0][1] for images, labels in batches)
    images, _ = batches[0]
    assert len(images) == 16
    plain = replace(TINY.data, crop_padding=0, horizontal_flip=False, augment="off", random_erasing=0.0)
    data = build_data(plain, device="cpu", batch_size=16, eval_batch_size=1, seed=TINY.train.seed)
    assert torch.equal(images, next(data.train.epoch(0))[0])


def test_a_network_that_does_not_learn_is_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(overfit, "STEPS", 12)
    assert overfit_one_batch(replace(TINY, train=replace(TINY.train, learning_rate=1e-9)), tmp_path) == 1
    assert "NOT learnt: look for a mistake" in capsys.readouterr().out
