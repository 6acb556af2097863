"""A checkpoint to resume from is input: what is wrong with it is one line, and leaves no folder behind."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError
from gac.evaluation.report import evaluate_checkpoint, format_report
from gac.options import parse_eval
from gac.training.engine import train
from gac.training.run_folder import read_metrics
from gac.training.totals import TrainingDiverged
from hostile import LONG, Edited, assert_one_line, edited, fuzz, saved, wide

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=32, synthetic_classes=3, crop_padding=1),
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1]),
    train=TrainConfig(epochs=2, batch_size=16, learning_rate=0.05, ema_decay=0.5),
    device="cpu",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of last.pt after the first of two epochs."""
    folder = tmp_path_factory.mktemp("resumed")
    train(TINY, folder / "run")
    return read_checkpoint(folder / "run" / "last-1.pt")


def entry(*path: Any, value: Any) -> Callable[[dict], None]:
    """Return a change of one entry."""

    def change(payload: dict) -> None:
        for key in path[:-1]:
            payload = payload[key]
        payload[path[-1]] = value

    return change


def without(*path: Any) -> Callable[[dict], None]:
    def change(payload: dict) -> None:
        for key in path[:-1]:
            payload = payload[key]
        del payload[path[-1]]

    return change


def sizes_of_older_files(images: object) -> Callable[[dict], None]:
    def change(payload: dict) -> None:
        del payload["data"]
        payload["training"]["data"] = {"training images": images, "test images": 32, "classes": 3}

    return change


def python_state(*words: int) -> tuple:
    return (3, (*words, *[0] * (625 - len(words))), None)


DAMAGE = {
    "training": (entry("training", value=[]), "its entry training is damaged"),
    "config": (entry("config", value=[]), "its entry config is missing or damaged"),
    "config section": (entry("config", "train", value=3), "config"),
    "config type": (entry("config", "train", "momentum", value="x"), "train.momentum must be a number"),
    "no model": (without("model"), "holds no state dict"),
    "model is a list": (entry("model", value=[1]), "holds no state dict"),
    "weight shape": (entry("model", "head.bias", value=torch.zeros(7)), "wrong shapes: head.bias"),
    "weight is nan": (entry("model", "head.bias", value=torch.full((3,), torch.nan)), "head.bias"),
    "weight is complex": (entry("model", "head.bias", value=torch.zeros(3, dtype=torch.cfloat)), "head.bias"),
    "no position": (without("training", "position"), "training.position is missing"),
    "position is a list": (entry("training", "position", value=[]), "training.position is damaged"),
    "negative": (entry("training", "position", "batch", value=-1), "training.position.batch is damaged"),
    "text": (entry("training", "position", "epoch", value="1"), "training.position.epoch is damaged"),
    "extra": (entry("training", "position", "other", value=1), "training.position.other is damaged"),
    "too far": (entry("training", "position", "epoch", value=10**6), "training.position is damaged: epoch 1000000"),
    "seconds": (entry("training", "position", "seconds", value=float("nan")), "training.position.seconds is damaged"),
    "history": (entry("training", "history", value={"epoch": 1}), "training.history is damaged"),
    "history is short": (entry("training", "history", value=[]), "training.history is damaged: 0 lines after 1"),
    "history of tensors": (
        entry("training", "history", value=[{"epoch": torch.tensor(1.0)}]),
        "training.history is damaged: expected numbers",
    ),
    "history of texts": (entry("training", "history", value=["x"]), "training.history.0 is damaged"),
    "totals": (entry("training", "totals", value=torch.zeros(3)), "training.totals is damaged"),
    "totals are nan": (entry("training", "totals", value=torch.full((8,), torch.nan).double()), "training.totals is"),
    "totals without numbers": (
        entry("training", "totals", value=torch.empty(8, dtype=torch.float64, device="meta")),
        "training.totals is damaged: it holds a tensor that is not plain",
    ),
    "sparse totals": (
        entry("training", "totals", value=torch.zeros(8, dtype=torch.float64).to_sparse()),
        "training.totals is damaged: it holds a tensor that is not plain",
    ),
    "scaler": (entry("training", "scaler", value={"scale": 1.0}), "training.scaler is damaged"),
    "optimizer": (entry("training", "optimizer", value=3), "training.optimizer is damaged"),
    "optimizer lacks": (
        without("training", "optimizer", "state", 0),
        "training.optimizer is damaged: it has the state",
    ),
    "buffer shape": (
        entry("training", "optimizer", "state", 0, "momentum_buffer", value=torch.zeros(2)),
        "training.optimizer is damaged: momentum_buffer of parameter 0",
    ),
    "buffer name": (
        entry("training", "optimizer", "state", 0, value={"exp_avg": torch.zeros(2)}),
        "training.optimizer is damaged: parameter 0 has",
    ),
    "python": (entry("training", "random_state", "python", value=(2, (), None)), "training.random_state.python"),
    "python words": (
        entry("training", "random_state", "python", value=python_state(-1)),
        "training.random_state.python.1.0 is damaged",
    ),
    "numpy": (
        entry("training", "random_state", "numpy", value=("PCG64", [0] * 624, 0, 0, 0.0)),
        "training.random_state is damaged: it is the state of other generators",
    ),
    "numpy place": (
        entry("training", "random_state", "numpy", value=("MT19937", [0] * 624, 625, 0, 0.0)),
        "training.random_state.numpy.2 is damaged",
    ),
    "torch": (
        entry("training", "random_state", "torch", value=torch.zeros(16, dtype=torch.uint8)),
        "training.random_state.torch is damaged",
    ),
    "torch content": (
        entry("training", "random_state", "torch", value=torch.full((5056,), 255, dtype=torch.uint8)),
        "training.random_state.torch is damaged",
    ),
    "average": (entry("training", "average", value={"model": {}}), "training.average.updates is damaged"),
    "average model": (without("training", "average", "model", "head.bias"), "missing keys: head.bias"),
    "updates": (
        entry("training", "average", "updates", value=torch.tensor(-1.0).double()),
        "training.average.updates is damaged",
    ),
    "data": (entry("data", value=[]), "its entry data"),
    "sizes": (sizes_of_older_files(torch.zeros(2)), "its entry training.data is damaged"),
    "ranks": (entry("training", "ranks", value=torch.ones(2)), "training.ranks is damaged"),
    "text without an end": (entry("config", "model", "T", value=wide()), "model.T must be a whole number; got a list"),
    "number without an end": (
        entry("config", "model", "T", value=-(10**500)),
        "model.T must be at least 1 and at most 10000; got a number of 1661 bits",
    ),
}


@pytest.mark.parametrize(("change", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_one_line_and_leaves_no_folder(
    change: Callable[[dict], None], said: str, checkpoint: dict, tmp_path: Path
) -> None:
    payload = copy.deepcopy(checkpoint)
    change(payload)
    write_checkpoint(tmp_path / "last.pt", payload)
    with pytest.raises(InputError) as error:
        train(TINY, tmp_path / "new", resume=str(tmp_path / "last.pt"))
    message = str(error.value)
    assert message.startswith(f"cannot resume {tmp_path}/last.pt: ")
    assert said in message
    assert "\n" not in message
    assert not (tmp_path / "new").exists()


def test_a_resume_that_fails_leaves_a_folder_as_it_was(checkpoint: dict, tmp_path: Path) -> None:
    payload = copy.deepcopy(checkpoint)
    next(iter(DAMAGE.values()))[0](payload)
    write_checkpoint(tmp_path / "last.pt", payload)
    for content in ([], ["notes.txt"]):
        folder = tmp_path / f"existing-{len(content)}"
        folder.mkdir()
        for name in content:
            (folder / name).touch()
        with pytest.raises(InputError, match="cannot resume"):
            train(TINY, folder, resume=str(tmp_path / "last.pt"))
        assert {path.name for path in folder.iterdir()} - {"run.lock"} == set(content)
        assert (folder / "run.lock").exists() == bool(content)


def test_the_checkpoint_itself_is_resumed(checkpoint: dict, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last.pt", checkpoint)
    train(TINY, tmp_path / "new", resume=str(tmp_path / "last.pt"))
    assert [line["epoch"] for line in read_metrics(tmp_path / "new" / "metrics.jsonl")] == [1, 2]


def test_a_finished_run_goes_on_by_the_schedule_of_the_new_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = replace(TINY, train=replace(TINY.train, ema_decay=0.0))
    longer = replace(plain, train=replace(plain.train, epochs=3))
    train(plain, tmp_path / "run")
    with caplog.at_level(logging.WARNING, "gac"):
        train(longer, tmp_path / "run", resume="auto")
    assert "was to have 2 epochs and goes on to 3: from here on the learning rate is that of a run of 3" in caplog.text
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    # Half-way through two epochs, then two thirds through three.
    assert rates == pytest.approx([0.05, 0.025, 0.0125])
    with pytest.raises(InputError, match=r"train\.epochs 3 -> 2"):
        train(plain, tmp_path / "run", resume="auto")


def write(edited: Edited, rest: dict[str, Any], path: Path) -> bool:
    """Write a checkpoint, unless torch.save cannot; the weights are not edited: they are most of the entries."""
    file = saved(rest | edited.content)
    if file is not None:
        path.write_bytes(file)
    return file is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seconds", [0, LONG])
def test_whatever_is_resumed_is_a_run_or_one_line(seconds: float, checkpoint: dict[str, Any], tmp_path: Path) -> None:
    content = copy.deepcopy(checkpoint)
    path, folder, weights = tmp_path / "last.pt", tmp_path / "new", {"model": content.pop("model")}

    def resume(edited: Edited) -> None:
        if not write(edited, weights, path):
            return
        try:
            train(TINY, folder, resume=str(path))
        except InputError as error:
            assert_one_line(error)
            assert not folder.exists()
        except TrainingDiverged:
            # A momentum may be finite and still far too large.
            pass
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    fuzz(resume, edited(content), examples=12, seconds=seconds)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seconds", [0, LONG])
def test_whatever_is_evaluated_is_a_report_or_one_line(
    seconds: float, checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    content = copy.deepcopy(checkpoint)
    path, weights = tmp_path / "best.pt", {"model": content.pop("model")}
    del content["training"]

    def score(edited: Edited) -> None:
        if not write(edited, weights, path):
            return
        try:
            parsed = parse_eval(["--checkpoint", str(path)])
            report = evaluate_checkpoint(parsed.checkpoint, parsed.payload, parsed.config, parsed.network)
        except InputError as error:
            assert_one_line(error)
        else:
            json.dumps(report.to_dict())
            format_report(report)

    fuzz(score, edited(content), examples=40, seconds=seconds)
