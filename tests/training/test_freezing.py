"""Beginning with other weights, and leaving some of them as they are."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gac.checkpoint import read_checkpoint
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError
from gac.options import parse_train
from gac.training.engine import train
from gac.training.run_folder import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=32, synthetic_classes=3, crop_padding=1),
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1]),
    train=TrainConfig(epochs=1, batch_size=16, learning_rate=0.05),
    device="cpu",
)


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("freezing") / "run"
    train(TINY, folder)
    return folder / "best.pt"


def weights_after(config: Config, folder: Path, **options: object) -> dict[str, torch.Tensor]:
    train(replace(config, train=replace(config.train, **options)), folder)
    return read_checkpoint(folder / "last.pt")["model"]


def test_what_is_frozen_stays_and_the_rest_moves(three_classes: Path, tmp_path: Path) -> None:
    before = read_checkpoint(three_classes)["model"]
    options = {"init": str(three_classes), "freeze": "stem.*, stages.0.*", "freeze_batch_norm": True}
    after = weights_after(TINY, tmp_path / "run", **options)
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    norms = {name for name in before if ".norm." in name}
    assert not any(name.startswith(("stem.", "stages.0.")) for name in moved)
    assert not moved & norms
    assert {"head.weight", "stages.1.0.conv1.conv.weight"} <= moved
    assert read_checkpoint(tmp_path / "run" / "best.pt")["config"]["train"].items() >= options.items()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze": "stem.* heads.*"}, r"train\.freeze: heads\.\* names no parameter; there are stem\.conv\.weight, "),
        ({"freeze": "*"}, r"train\.freeze \* leaves nothing to train"),
        ({"init": "missing.pt"}, "missing.pt: no such file"),
    ],
)
def test_what_cannot_be_frozen_or_begun_with_leaves_no_folder(options: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        weights_after(TINY, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_other_classes_and_another_T_begin_anew_and_nothing_else_may(
    three_classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = replace(TINY, data=replace(TINY.data, synthetic_classes=5), model=replace(TINY.model, T=3))
    frozen = {"init": str(three_classes), "freeze": "stem.* stages.* coding.gate.spatial_channel.*"}
    with caplog.at_level(logging.INFO, "gac"):
        after = weights_after(other, tmp_path / "run", freeze_batch_norm=True, **frozen)
    assert f"began with the weights of {three_classes}; new: the head and the temporal attention" in caplog.messages
    before = read_checkpoint(three_classes)["model"]
    assert after["head.weight"].shape == (5, 32)
    assert all(after[name].equal(before[name]) for name in before if name.startswith(("stem.", "stages.")))
    wider = replace(TINY, model=replace(TINY.model, width=8))
    with pytest.raises(InputError, match=r"wrong shapes: .* and \d+ more"):
        weights_after(wider, tmp_path / "wider", init=str(three_classes))


def test_a_run_with_init_resumes_without_reading_it(three_classes: Path, tmp_path: Path) -> None:
    copy = tmp_path / "init.pt"
    copy.write_bytes(three_classes.read_bytes())
    train(replace(TINY, train=replace(TINY.train, init=str(copy))), tmp_path / "run")
    copy.unlink()
    train(replace(TINY, train=replace(TINY.train, init=str(copy), epochs=2)), tmp_path / "run", resume="auto")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


def test_weights_of_other_neurons_are_taken_with_a_warning(
    three_classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for model, said in (
        (replace(TINY.model, tau=2.0), False),
        (replace(TINY.model, neuron="imagenet", v_threshold=1.0, detach_reset=False), True),
    ):
        caplog.clear()
        run = replace(TINY, model=model, train=replace(TINY.train, init=str(three_classes)))
        train(run, tmp_path / str(said))
        warning = f"train.init {three_classes} was trained with neurons of tau 2.0, surrogate triangle"
        assert (warning in caplog.messages) is said
        assert ("was trained with" in caplog.text) is said


def test_the_short_spelling(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {name: digits}\n")
    parsed = parse_train(["--config", str(tmp_path / "c.yaml"), "--init", "best.pt"])
    assert parsed.config.train.init == "best.pt"


def half_of_the_digits(path: Path, first: int) -> DataConfig:
    """Write the images of five digits, numbered from 0, and return the data set."""
    images, labels = load_digits(return_X_y=True)
    chosen = (labels >= first) & (labels < first + 5)
    x = (images[chosen].reshape(-1, 8, 8, 1) * 15.9).astype(np.uint8)
    y = labels[chosen] - first
    np.savez(path, x_train=x[:600], y_train=y[:600], x_test=x[600:], y_test=y[600:])
    return DataConfig(name="npz", root=str(path), crop_padding=1, horizontal_flip=False)


def test_what_one_half_of_the_digits_taught_helps_with_the_other(tmp_path: Path) -> None:
    config = replace(TINY, model=replace(TINY.model, width=8), train=TrainConfig(epochs=4, batch_size=32, cutmix="off"))
    train(replace(config, data=half_of_the_digits(tmp_path / "a.npz", 0)), tmp_path / "a")
    top1 = {}
    for name, init in (("from a", str(tmp_path / "a" / "best.pt")), ("afresh", None)):
        short = replace(config.train, epochs=1, learning_rate=0.02, init=init, freeze="stages.0.*")
        train(replace(config, data=half_of_the_digits(tmp_path / "b.npz", 5), train=short), tmp_path / name)
        top1[name] = read_metrics(tmp_path / name / "metrics.jsonl")[-1]["test_top1"]
    assert top1["from a"] > top1["afresh"] + 10, top1
