"""The training loop on small real runs."""

import gc
import logging
import math
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gac.checkpoint import load_checkpoint, read_checkpoint
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError
from gac.execution.cuda_graph import CaptureOnDevice
from gac.models import create_model
from gac.models.ms_resnet import MSResNet
from gac.ops import c_kernels
from gac.training import checkpoints, engine, step
from gac.training.checkpoints import Checkpoints
from gac.training.engine import Trainer, train
from gac.training.mixing import Mixing
from gac.training.optim import make_optimizer
from gac.training.run_folder import RunFolder, read_metrics
from gac.training.signals import Interrupted, Interruption
from gac.training.totals import Readback, TrainingDiverged
from image_tree import write_split
from run_results import TIMES, assert_same, result_of, stop_at

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=40, synthetic_classes=3, crop_padding=1),
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1]),
    train=TrainConfig(epochs=3, batch_size=16, learning_rate=0.05, cutmix="epoch"),
    device="cpu",
)
BATCHES = 3
CPU = torch.device("cpu")
# Random numbers in every place that draws some: the encoder, in evaluation too, and CutMix.
RANDOM = replace(TINY, model=replace(TINY.model, coding="rate"), train=replace(TINY.train, cutmix="batch", loss="tet"))
# All that the configuration can add to a step.
EVERYTHING = replace(
    RANDOM,
    data=replace(RANDOM.data, augment="randaugment", augment_group=3, cutout=3, random_erasing=0.5),
    train=replace(
        RANDOM.train,
        nesterov=True,
        weight_decay_on="weights",
        stem_weight_decay=1e-6,
        gradient_clip_norm=0.5,
        mixup_alpha=0.4,
        ema_decay=0.8,
        checkpoint_activations=True,
        self_distillation=0.5,
    ),
)


ADAMW = replace(
    TINY,
    train=replace(TINY.train, optimizer="adamw", learning_rate=1e-3, freeze="stages.0.*", freeze_batch_norm=True),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(TINY, folder)
    return folder


def test_a_run_leaves_everything_it_promises(finished: Path) -> None:
    metrics = read_metrics(finished / "metrics.jsonl")
    assert [line["epoch"] for line in metrics] == [1, 2, 3]
    assert [line["step"] for line in metrics] == [BATCHES, 2 * BATCHES, 3 * BATCHES]
    cosine = [0.05 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    assert [line["learning_rate"] for line in metrics] == pytest.approx(cosine)
    for line in metrics:
        assert set(line) == TIMES | {
            "epoch", "step", "train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "learning_rate",
            "skipped_steps", "skipped_images", "test_skipped_images", "backend", "cuda_graph",
        }  # fmt: skip
        assert line["backend"] == ("c" if c_kernels.status().ok else "torch")
        assert line["cuda_graph"] is False
        assert line["images_per_second"] == pytest.approx(40 / line["seconds"])
    last = read_checkpoint(finished / "last.pt")
    assert (last["epoch"], last["step"], last["num_classes"], last["in_channels"]) == (3, 9, 3, 3)
    assert last["metrics"] == metrics[-1]
    assert Config.from_dict(last["config"]) == TINY.with_neuron()
    assert last["versions"]["torch"] == torch.__version__
    expected = ("c" if c_kernels.status().ok else "torch"), c_kernels.status().reason
    for name in ("last.pt", "best.pt"):
        payload = read_checkpoint(finished / name)
        assert (payload["backend"], payload["backend_reason"]) == expected
    assert not list(finished.glob(".*"))


def test_best_is_the_first_epoch_with_the_highest_accuracy(finished: Path) -> None:
    metrics = read_metrics(finished / "metrics.jsonl")
    best = read_checkpoint(finished / "best.pt")
    assert best["metrics"] == max(metrics, key=lambda line: line["test_top1"])
    assert "training" not in best
    assert load_checkpoint(finished / "best.pt").T == 2


def test_tensorboard_shows_the_metrics(finished: Path) -> None:
    events = EventAccumulator(str(finished)).Reload()
    metrics = read_metrics(finished / "metrics.jsonl")
    names = set(metrics[0]) - {"epoch", "backend", "cuda_graph"}
    for name in names:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in metrics])
    layers = ["coding.lif", "lif", *(f"stages.{stage}.0.lif{n}" for stage in range(3) for n in (1, 2))]
    assert set(events.Tags()["scalars"]) - names == {f"firing_rate/{layer}" for layer in layers} | {
        f"gate/coding.gate/t{step}" for step in (1, 2)
    }
    for name in [*(f"firing_rate/{layer}" for layer in layers), "gate/coding.gate/t1", "gate/coding.gate/t2"]:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert all(0 <= scalar.value <= 1 for scalar in scalars)


def test_training_learns(tmp_path: Path) -> None:
    config = replace(
        TINY,
        model=replace(TINY.model, width=16),
        train=replace(TINY.train, epochs=15, cutmix="off"),
        data=replace(TINY.data, crop_padding=0),
    )
    train(config, tmp_path)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics[-1]["train_loss"] < 0.5 * metrics[0]["train_loss"]


def test_the_seed_decides_the_run(finished: Path, tmp_path: Path) -> None:
    train(TINY, tmp_path / "again")
    assert_same(result_of(tmp_path / "again"), result_of(finished))
    train(replace(TINY, train=replace(TINY.train, seed=1)), tmp_path / "other")
    assert result_of(tmp_path / "other")[1] != result_of(finished)[1]


TWO_EPOCHS = {
    name: replace(config, train=replace(config.train, epochs=2))
    for name, config in {"tiny": TINY, "random": RANDOM, "everything": EVERYTHING, "adamw": ADAMW}.items()
}


@pytest.fixture(scope="module")
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A configuration of ``TWO_EPOCHS`` and the folder of its run."""
    config, folder = TWO_EPOCHS[request.param], tmp_path_factory.mktemp(request.param)
    train(config, folder)
    return config, folder


@pytest.mark.parametrize("stop_after", [1, BATCHES, BATCHES + 2], ids=["first epoch", "epoch's end", "second epoch"])
@pytest.mark.parametrize("uninterrupted", TWO_EPOCHS, indirect=True)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    uninterrupted: tuple[Config, Path], stop_after: int, tmp_path: Path
) -> None:
    config, whole = uninterrupted
    with pytest.raises(Interrupted):
        train(config, tmp_path, after_step=stop_at(stop_after))
    assert read_checkpoint(tmp_path / "last.pt")["step"] == stop_after
    train(config, tmp_path, resume="auto")
    assert_same(result_of(tmp_path), result_of(whole))


@pytest.mark.c_compiler
def test_what_runs_the_network_may_change_when_a_run_resumes(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(TINY, tmp_path, after_step=stop_at(BATCHES + 1))
    train(replace(TINY, model=replace(TINY.model, backend="torch")), tmp_path, resume="auto")
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["backend"] for line in metrics] == ["c", "torch", "torch"]
    last = read_checkpoint(tmp_path / "last.pt")
    assert (last["backend"], last["backend_reason"]) == ("torch", "as asked for")


@pytest.mark.parametrize(
    ("stop_at", "options"),
    # The second batch of five in the second epoch: of the evaluation, and of that of the averaged weights.
    [(7, {}), (17, {"ema_decay": 0.8})],
    ids=["raw", "ema"],
)
def test_an_evaluation_cut_short_is_done_again(
    stop_at: int, options: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small batches, so that some are evaluated before the signal counts.
    config = replace(RANDOM, train=replace(RANDOM.train, epochs=2, eval_batch_size=2, **options))
    train(config, tmp_path / "whole")
    forward = MSResNet.forward
    evaluated = []

    def forward_and_signal(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        if not network.training:
            evaluated.append(len(images))
            if len(evaluated) == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
        return forward(network, images)

    with monkeypatch.context() as patch:
        patch.setattr(MSResNet, "forward", forward_and_signal)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "parts")
    assert len(evaluated) == stop_at
    position = read_checkpoint(tmp_path / "parts" / "last.pt")["training"]["position"]
    assert (position["epoch"], position["batch"]) == (1, BATCHES)
    train(config, tmp_path / "parts", resume="auto")
    assert_same(result_of(tmp_path / "parts"), result_of(tmp_path / "whole"))


def test_resuming_after_a_crash_repeats_no_epoch(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "crashed"
    # A crash between metrics.jsonl and last.pt of epoch 3: the file is an epoch ahead of the checkpoint.
    written = []
    write = Checkpoints.write

    def crash_at_the_third(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "write", crash_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, folder)
    assert [line["epoch"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]
    train(TINY, folder, resume="auto")
    assert_same(result_of(folder), result_of(finished))
    scalars = EventAccumulator(str(folder)).Reload().Scalars("test_loss")
    assert [scalar.step for scalar in scalars] == [1, 2, 3]


def test_a_finished_run_has_nothing_to_resume(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (finished / "last.pt").read_bytes()
    with caplog.at_level(logging.INFO, "gac"):
        train(TINY, finished, resume="auto")
    assert "all 3 epochs are done" in caplog.text
    assert (finished / "last.pt").read_bytes() == before
    assert len(read_metrics(finished / "metrics.jsonl")) == 3


def test_auto_in_a_fresh_folder_says_that_it_starts_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gac"):
        train(replace(TINY, train=replace(TINY.train, epochs=1)), tmp_path, resume="auto")
    assert "starting afresh" in caplog.text


def test_a_run_can_continue_in_another_folder(tmp_path: Path) -> None:
    config = replace(TINY, train=replace(TINY.train, epochs=2))
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "first", after_step=stop_at(BATCHES + 1))
    train(config, tmp_path / "second", resume=str(tmp_path / "first" / "last.pt"))
    second, whole = result_of(tmp_path / "second"), result_of(tmp_path / "whole")
    assert_same(second[0]["model"], whole[0]["model"])
    assert second[1] == whole[1]
    assert read_checkpoint(tmp_path / "second" / "best.pt")["epoch"] == 2


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The test accuracies of the epochs to come."""
    scores: list[float] = []
    evaluate = engine.evaluate
    monkeypatch.setattr(engine, "evaluate", lambda *arguments: replace(evaluate(*arguments), top1=scores.pop(0)))
    return scores


@pytest.mark.parametrize("left", [None, b"PK"], ids=["lost", "damaged"])
def test_a_best_network_that_is_lost_is_not_waited_for(
    left: bytes | None, scores: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores += [60.0, 50.0, 40.0]
    train(replace(TINY, train=replace(TINY.train, epochs=1)), tmp_path / "first")
    # Somebody takes along only what a run resumes from.
    (tmp_path / "second").mkdir()
    os.rename(tmp_path / "first" / "last.pt", tmp_path / "second" / "last.pt")
    best = tmp_path / "second" / "best.pt"
    if left is not None:
        best.write_bytes(left)
    train(replace(TINY, train=replace(TINY.train, epochs=3)), tmp_path / "second", resume="auto")
    assert f"{best} is missing or damaged: it will be the best of the epochs that follow" in caplog.text
    assert read_checkpoint(best)["epoch"] == 2
    assert read_checkpoint(tmp_path / "second" / "last.pt")["training"]["position"]["best_top1"] == 50


def test_a_best_network_of_an_epoch_that_comes_again_is_replaced(
    scores: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores += [60.0, 70.0, 50.0]
    config = replace(TINY, train=replace(TINY.train, epochs=2))
    train(config, tmp_path)
    train(config, tmp_path, resume=str(tmp_path / "last-1.pt"))
    # The network of the first epoch is gone, and that of 70 % is of no epoch in metrics.jsonl.
    best = tmp_path / "best.pt"
    assert f"{best} is of epoch 2, which comes again: it will be the best of the epochs that follow" in caplog.text
    assert [line["test_top1"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [60, 50]
    assert read_checkpoint(best)["metrics"]["test_top1"] == 50


def test_another_run_is_not_resumed(finished: Path, tmp_path: Path) -> None:
    shorter = replace(TINY, train=replace(TINY.train, epochs=2))
    with pytest.raises(InputError, match=r"train\.epochs 3 -> 2"):
        train(shorter, tmp_path / "new", resume=str(finished / "last.pt"))
    with pytest.raises(InputError, match=r"use the run's last\.pt"):
        train(TINY, tmp_path / "new", resume=str(finished / "best.pt"))
    with pytest.raises(InputError, match="no such file"):
        train(TINY, tmp_path / "new", resume=str(tmp_path / "missing.pt"))
    assert not (tmp_path / "new").exists()


def break_weight(trainer: Trainer) -> None:
    *_, weight = trainer.network.parameters()
    weight.data.view(-1)[0] = math.nan


def break_gradients(trainer: Trainer) -> None:
    *_, weight = trainer.network.parameters()
    weight.register_hook(lambda gradient: gradient * math.inf)


def break_at(step: int, broken: str) -> Callable[[Trainer], None]:
    """Return an ``after_step`` that makes a weight, or its gradient from a step (from 2) on, not finite."""

    def break_it(trainer: Trainer) -> None:
        if broken == "weight" and trainer.position.step == step:
            break_weight(trainer)
        if broken == "gradient" and trainer.position.step == step - 1:
            break_gradients(trainer)

    return break_it


@pytest.mark.parametrize(
    ("checkpoint_steps", "broken", "step", "message"),
    [
        # The weight shows in the loss of the step after.
        (0, "weight", 4, "the loss is not finite at step 5 (epoch 2, batch 2 of 3, learning rate 0.0375): lower"),
        (0, "weight", 6, "a weight is not finite at step 6 (epoch 2, batch 3 of 3, learning rate 0.0375): lower"),
        (0, "gradient", 5, "a gradient is not finite at step 5 (epoch 2, batch 2 of 3, learning rate 0.0375): lower"),
        # The check before a checkpoint finds it in the same step.
        (1, "weight", 5, "a weight is not finite at step 5 (epoch 2, batch 2 of 3, learning rate 0.0375): lower"),
    ],
)
def test_divergence_names_the_step_and_spares_the_checkpoints(
    checkpoint_steps: int, broken: str, step: int, message: str, tmp_path: Path
) -> None:
    config = replace(TINY, train=replace(TINY.train, checkpoint_steps=checkpoint_steps))
    with pytest.raises(TrainingDiverged) as error:
        train(config, tmp_path, after_step=break_at(step, broken))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    for path in tmp_path.glob("*.pt"):
        assert all(tensor.isfinite().all() for tensor in read_checkpoint(path)["model"].values())
    assert read_checkpoint(tmp_path / "last.pt")["step"] == (step - 1 if checkpoint_steps else BATCHES)


def test_divergence_stops_the_run_within_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Readback, "SECONDS", 0.0)
    with Interruption() as interruption:
        trainer = Trainer(TINY, RunFolder(tmp_path), None, interruption)
        break_gradients(trainer)
        with pytest.raises(TrainingDiverged, match="at step 1 "):
            trainer.run()
    assert trainer.position.step == 1


def test_a_learning_rate_out_of_reach_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"at step 2 \(epoch 1, batch 2 of 3, learning rate 1e\+30\)"):
        train(replace(TINY, train=replace(TINY.train, learning_rate=1e30)), tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_an_interruption_never_saves_weights_that_are_not_finite(tmp_path: Path) -> None:
    def break_and_signal(trainer: Trainer) -> None:
        break_weight(trainer)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingDiverged, match="a weight is not finite at step 1 "):
        train(TINY, tmp_path, after_step=break_and_signal)
    assert not list(tmp_path.glob("last*"))


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        ({"checkpoint_minutes": 0}, [3, 6, 9]),
        ({"checkpoint_minutes": 0, "checkpoint_steps": 2}, [2, 3, 4, 6, 6, 8, 9]),
        ({"checkpoint_minutes": 2}, [2, 3, 5, 6, 8, 9]),
        ({}, [3, 6, 9]),
    ],
    ids=["epochs", "steps", "minutes", "default"],
)
def test_checkpoints_are_written_when_they_are_due(
    interval: dict[str, float], steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write = Checkpoints.write

    def record(kept: Checkpoints, payload: dict[str, Any], keep: int) -> None:
        written.append(payload["step"])
        write(kept, payload, keep)

    def wait_a_minute(trainer: Trainer) -> None:
        clock.monotonic.return_value += 60

    clock = Mock(monotonic=Mock(return_value=0.0))
    monkeypatch.setattr(checkpoints, "time", clock)
    monkeypatch.setattr(Checkpoints, "write", record)
    config = replace(TINY, train=replace(TINY.train, keep_checkpoints=3, **interval))
    train(config, tmp_path, after_step=wait_a_minute)
    assert written == steps
    kept = [read_checkpoint(tmp_path / name)["step"] for name in ("last.pt", "last-1.pt", "last-2.pt")]
    assert kept == steps[:-4:-1]
    assert len(list(tmp_path.glob("last*"))) == 3


def test_a_training_step_reads_nothing(tmp_path: Path) -> None:
    config = replace(TINY, train=replace(TINY.train, cutmix="off", gradient_clip_norm=1.0))
    with Interruption() as interruption:
        trainer = Trainer(config, RunFolder(tmp_path), None, interruption)
    # Fake tensors have no values: reading one raises. What the host makes itself, such as a constant, it may read.
    with FakeTensorMode():
        images, labels = torch.zeros(16, 3, 8, 8), torch.zeros(16, dtype=torch.int64)
        network = create_model(num_classes=3, **asdict(config.model)).train()
        trainer.optimizer = make_optimizer(network.parameters(), config.train, CPU)
        trainer.step = step.TrainingStep(network, trainer.optimizer, trainer.scaler, config.train, CPU)
        for _ in range(2):
            trainer.train_step(images, labels)
        assert trainer.position.step == 2
        with pytest.raises(DataDependentOutputException):
            trainer.step.totals.read()


def test_bf16_trains_on_the_cpu(tmp_path: Path) -> None:
    train(replace(TINY, train=replace(TINY.train, epochs=1, amp="bf16")), tmp_path)
    assert math.isfinite(read_metrics(tmp_path / "metrics.jsonl")[0]["test_loss"])


def test_fp16_is_refused_on_the_cpu_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16 needs a CUDA device"):
        train(replace(TINY, train=replace(TINY.train, amp="fp16")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_the_garbage_collector_sees_only_what_steps_make_until_the_run_ends(stopped: bool, tmp_path: Path) -> None:
    frozen = []

    def look(trainer: Trainer) -> None:
        frozen.append(gc.get_freeze_count())
        assert not any(each is trainer.network for each in gc.get_objects())
        if stopped:
            os.kill(os.getpid(), signal.SIGTERM)

    gc.unfreeze()
    with pytest.raises(Interrupted) if stopped else nullcontext():
        train(replace(TINY, train=replace(TINY.train, epochs=1)), tmp_path / "run", after_step=look)
    assert len(frozen) == (1 if stopped else BATCHES)
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"cutmix": "off"},
        {"cutmix": "batch"},
        {"cutmix": "off", "ema_decay": 0.9, "gradient_clip_norm": 1.0, "checkpoint_activations": True},
    ],
    ids=["plain", "cutmix", "everything"],
)
def test_replayed_steps_on_cuda_are_the_steps(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    captured: list[Callable] = []
    capture = CaptureOnDevice.__call__
    monkeypatch.setattr(
        CaptureOnDevice, "__call__", lambda self, function: captured.append(function) or capture(self, function)
    )
    losses = {}
    for replayed in (False, True):
        # Each size of batch, and with CutMix each kind of targets, is called three times before it is captured.
        tried = replace(TINY.train, epochs=8, amp="fp16", cuda_graph=replayed, **options)
        folder = tmp_path / str(replayed)
        train(replace(TINY, device="cuda", train=tried), folder)
        lines = read_metrics(folder / "metrics.jsonl")
        losses[replayed] = [line["train_loss"] for line in lines]
        assert {line["cuda_graph"] for line in lines} == {replayed}
        # The trial before the run captures two or three.
        assert (len(captured) > 3) == replayed
    # Only rounding differs, but one spike more or less changes all that follow.
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


@pytest.mark.gpu
def test_fp16_on_cuda_resumes_with_its_loss_scale(tmp_path: Path) -> None:
    config = replace(TINY, device="cuda", train=replace(TINY.train, amp="fp16"))
    scales: dict[str, list[float]] = {"whole": [], "parts": []}

    def run(name: str, stop_after: int | None, resume: str | None = None) -> None:
        def record(trainer: Trainer) -> None:
            if trainer.position.step == 1:
                # Not the scale that a new scaler begins with, and one that grows during the run.
                state = trainer.scaler.state_dict()
                trainer.scaler.load_state_dict({**state, "scale": 2.0**10, "growth_interval": 3})
            scales[name].append(trainer.scaler.get_scale())
            if trainer.position.step == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        train(config, tmp_path / name, resume, after_step=record)

    run("whole", None)
    with pytest.raises(Interrupted):
        run("parts", BATCHES + 1)
    assert read_checkpoint(tmp_path / "parts" / "last.pt")["training"]["position"]["batch"] == 1
    run("parts", None, resume="auto")
    assert scales["parts"] == scales["whole"]
    assert len(set(scales["whole"])) > 1
    parts, whole = (read_checkpoint(tmp_path / name / "last.pt") for name in ("parts", "whole"))
    assert parts["training"]["scaler"] == whole["training"]["scaler"]
    # cuDNN may sum in another order the second time.
    for key, expected in whole["model"].items():
        torch.testing.assert_close(parts["model"][key], expected, rtol=1e-2, atol=1e-3)


def test_a_single_value_for_batchnorm_is_explained_in_one_line(tmp_path: Path) -> None:
    config = replace(
        TINY,
        data=replace(TINY.data, image_size=4, synthetic_images=17),
        model=replace(TINY.model, T=1),
    )
    with pytest.raises(InputError, match=r"batch of 1 image of 4 x 4 pixels .* choose a train\.batch_size") as error:
        train(config, tmp_path)
    assert "\n" not in str(error.value)


def test_other_errors_of_the_network_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(network: torch.nn.Module, images: torch.Tensor) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(MSResNet, "forward", fail)
    with pytest.raises(ValueError, match="something else") as error:
        train(TINY, tmp_path)
    assert not isinstance(error.value, InputError)


@pytest.mark.parametrize(("probability", "mixed"), [(0.0, 0), (1.0, 3 * BATCHES)])
@pytest.mark.parametrize("per", ["epoch", "batch"])
def test_cutmix_mixes_with_its_probability(
    per: str, probability: float, mixed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = []
    loss = step.classification_loss

    def record(logits: torch.Tensor, target: torch.Tensor, *options: object) -> torch.Tensor:
        targets.append(target)
        return loss(logits, target, *options)

    monkeypatch.setattr(step, "classification_loss", record)
    train(replace(TINY, train=replace(TINY.train, cutmix=per, cutmix_probability=probability)), tmp_path)
    assert sum(target.is_floating_point() for target in targets) == mixed
    assert all(target.sum(-1).allclose(torch.ones(len(target))) for target in targets if target.dim() == 2)


def test_cutmix_is_drawn_once_an_epoch_or_once_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws, steps = [], []
    monkeypatch.setattr(Mixing, "_draw", lambda mixing: bool(draws.append(len(steps))))
    train(TINY, tmp_path / "epoch", after_step=steps.append)
    assert draws == [0, BATCHES, 2 * BATCHES]
    draws.clear()
    steps.clear()
    train(replace(TINY, train=replace(TINY.train, cutmix="batch")), tmp_path / "batch", after_step=steps.append)
    assert draws == list(range(3 * BATCHES))


@pytest.mark.parametrize(
    ("raw", "ema", "weights", "top1"),
    [
        ([50.0, 60.0], [55.0, 58.0], "raw", 60.0),
        ([50.0, 55.0], [49.0, 58.0], "ema", 58.0),
        ([50.0], [50.0], "raw", 50.0),
    ],
    ids=["raw", "averaged", "equal"],
)
def test_best_holds_the_better_of_the_weights_and_their_average(
    raw: list[float], ema: list[float], weights: str, top1: float, scores: list[float], tmp_path: Path
) -> None:
    scores += [score for pair in zip(raw, ema, strict=True) for score in pair]
    config = replace(TINY, train=replace(TINY.train, epochs=len(raw), ema_decay=0.5))
    train(config, tmp_path)
    best, last = (read_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert (best["epoch"], best["weights"], last["weights"]) == (len(raw), weights, "raw")
    assert last["training"]["position"]["best_top1"] == top1
    average = last["training"]["average"]["model"]
    assert_same(best["model"], last["model"] if weights == "raw" else average)
    assert not torch.equal(average["head.weight"], last["model"]["head.weight"])
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["test_top1"], line["test_top1_ema"]) for line in metrics] == list(zip(raw, ema, strict=True))


def test_outputs_that_are_not_finite_are_never_the_best(
    scores: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scores += [90.0, 50.0, 80.0, 90.0]
    losses, evaluate = [math.nan, 1.0, math.inf, math.nan], engine.evaluate
    monkeypatch.setattr(engine, "evaluate", lambda *arguments: replace(evaluate(*arguments), loss=losses.pop(0)))
    train(replace(TINY, train=replace(TINY.train, epochs=2, ema_decay=0.5)), tmp_path)
    best = read_checkpoint(tmp_path / "best.pt")
    assert (best["epoch"], best["weights"]) == (1, "ema")
    assert read_checkpoint(tmp_path / "last.pt")["training"]["position"]["best_top1"] == 50
    warnings = [each.getMessage() for each in caplog.records if "are not finite" in each.getMessage()]
    assert [warning.partition(":")[0] for warning in warnings] == ["epoch 1", "epoch 2"]


def test_the_averaged_weights_are_scored_and_do_not_change_the_training(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gac"):
        train(replace(TINY, train=replace(TINY.train, ema_decay=0.5)), tmp_path)
    assert_same(read_checkpoint(tmp_path / "last.pt")["model"], read_checkpoint(finished / "last.pt")["model"])
    plain = read_metrics(finished / "metrics.jsonl")
    for line, other in zip(read_metrics(tmp_path / "metrics.jsonl"), plain, strict=True):
        assert set(line) == set(other) | {"test_loss_ema", "test_top1_ema"}
        assert line["test_loss"] == other["test_loss"]
        assert line["test_loss_ema"] != line["test_loss"]
        assert f"top-1 {line['test_top1']:.2f} %, of the averaged weights {line['test_top1_ema']:.2f} %" in caplog.text


def test_activations_computed_again_change_no_number(finished: Path, tmp_path: Path) -> None:
    config = replace(TINY, train=replace(TINY.train, checkpoint_activations=True))
    train(config, tmp_path)
    assert_same(result_of(tmp_path), result_of(finished))


def test_images_that_cannot_be_read_are_counted_over_an_interruption(tmp_path: Path) -> None:
    write_split(tmp_path / "images" / "train", images=100, damaged=("truncated.JPEG",))
    write_split(tmp_path / "images" / "val", images=100, damaged=("zero_bytes.JPEG",))
    data = DataConfig(name="imagefolder", root=str(tmp_path / "images"), image_size=8, resize=8, workers=0)
    config = replace(TINY, data=data, train=replace(TINY.train, epochs=1, batch_size=10))
    watch = []

    def signal_after_the_first(trainer: Trainer) -> None:
        watch.append(trainer.data.train.skipped)
        if trainer.data.train.skipped == 1 and 1 not in watch[:-1]:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", after_step=signal_after_the_first)
    assert read_checkpoint(tmp_path / "run" / "last.pt")["training"]["position"]["skipped_images"] == 1
    train(config, tmp_path / "run", resume="auto", after_step=signal_after_the_first)
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (line["skipped_images"], line["test_skipped_images"]) == (1, 1)
    assert sum(watch) < len(watch) == 10
