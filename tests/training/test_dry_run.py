"""--dry-run and --overfit-one-batch: everything happens, and nothing stays."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from gac.cli import train_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data import build_data
from gac.errors import InputError
from gac.evaluation.evaluate import Evaluation
from gac.training import dry_run as module
from gac.training import engine
from gac.training.dry_run import scratch_folder
from gac.training.engine import Trainer, train
from gac.training.step import TrainingStep

TINY = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=300, synthetic_classes=3, crop_padding=1),
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1]),
    train=TrainConfig(epochs=100, batch_size=10, eval_batch_size=20, warmup_epochs=50, checkpoint_steps=50),
    device="cpu",
)
# Random pixels with random labels can only be learnt by heart.
MEMORIZABLE = Config(
    data=DataConfig(
        name="synthetic", image_size=8, synthetic_images=64, augment="randaugment", cutout=4, random_erasing=1.0
    ),
    model=ModelConfig(T=2, width=16, depth=[1, 1, 1]),
    train=TrainConfig(batch_size=16, cutmix="batch", cutmix_probability=1.0, mixup_alpha=1.0, mix_off_epochs=100),
    device="cpu",
)


def dry_run(config: Config, folder: Path, output: Path) -> int:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return train_main(["--config", str(folder / "tiny.yaml"), "--output", str(output), "--dry-run"])


def test_everything_happens_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    steps, evaluated = [], []
    evaluate = engine.evaluate

    def record_step(trainer: Trainer) -> None:
        totals = trainer.step.totals.read()
        steps.append((trainer.position.step, totals.images, totals.loss))

    def record_evaluation(*arguments: object) -> Evaluation:
        scores = evaluate(*arguments)
        evaluated.append(scores.images)
        return scores

    monkeypatch.setattr(module, "train", partial(train, after_step=record_step))
    monkeypatch.setattr(engine, "evaluate", record_evaluation)
    (tmp_path / "runs" / "kept").mkdir(parents=True)
    with caplog.at_level("INFO", "gac"):
        assert dry_run(TINY, tmp_path, tmp_path / "runs" / "kept") == 0
    # Two steps, then the second of them again from the state after the first.
    assert [step[:2] for step in steps] == [(1, 10), (2, 20), (2, 20)]
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
    step = TrainingStep.__call__

    def record(training_step: TrainingStep, images: Tensor, targets: Tensor, labels: Tensor) -> None:
        batches.append((images, labels))
        step(training_step, images, targets, labels)

    monkeypatch.setattr(TrainingStep, "__call__", record)
    monkeypatch.setattr(module, "STEPS", 120)
    assert overfit_one_batch(MEMORIZABLE, tmp_path) == 0
    assert "one batch, 120 steps: 100.00 % of it right, learnt" in capsys.readouterr().out
    assert len(batches) == 120
    assert all(images is batches[0][0] and labels is batches[0][1] for images, labels in batches)
    images, _ = batches[0]
    assert len(images) == 16
    plain = replace(
        MEMORIZABLE.data, crop_padding=0, horizontal_flip=False, augment="off", cutout=0, random_erasing=0.0
    )
    data = build_data(plain, device="cpu", batch_size=16, eval_batch_size=1, seed=MEMORIZABLE.train.seed)
    assert torch.equal(images, next(data.train.epoch(0))[0])


def test_a_network_that_does_not_learn_is_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(module, "STEPS", 12)
    assert overfit_one_batch(replace(MEMORIZABLE, train=replace(MEMORIZABLE.train, learning_rate=1e-9)), tmp_path) == 1
    assert "NOT learnt: look for a mistake" in capsys.readouterr().out


def test_the_scratch_folder_is_next_to_the_output_and_always_removed(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "mine"
    with scratch_folder(output) as folder:
        assert folder.parent == output.parent
        (folder / "file").write_text("")
    assert list(output.parent.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), scratch_folder(output) as folder:
        raise KeyboardInterrupt
    assert list(output.parent.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write next to .*file/run: .*; choose another --output"),
        scratch_folder(tmp_path / "file" / "run"),
    ):
        pass
