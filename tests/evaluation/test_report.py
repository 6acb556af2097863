"""A network is evaluated on images as it was trained on them, and its classes are compared by name."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.cli import eval_main, train_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data.interface import DataInfo
from gac.errors import InputError
from gac.training.engine import train

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("blue", "red")
Save = Callable[..., Path]


def colored(images: int, seed: int, brightness: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return images of which half are bluish (0) and half reddish (1), and their labels."""
    pixels = np.random.default_rng(seed).integers(0, 120, (images, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(images) % 2
    for label, channel in ((0, 2), (1, 0)):
        pixels[labels == label, :, :, channel] += 60
    return pixels + np.uint8(brightness), labels


def save(path: Path, names: tuple[str, ...] | None = NAMES, brightness: int = 0, order: tuple = (0, 1)) -> Path:
    """Write a set whose test images are always the same; ``brightness`` is that of the training images."""
    arrays = {} if names is None else {"classes": np.array(names)}
    for split, seed, bright in (("train", 0, brightness), ("test", 1, 0)):
        pixels, labels = colored(40, seed, bright)
        arrays |= {f"x_{split}": pixels, f"y_{split}": np.array(order)[labels]}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last.pt of a network that tells the colours apart."""
    folder = tmp_path_factory.mktemp("colors")
    config = Config(
        data=DataConfig(name="npz", root=str(save(folder / "set.npz"))),
        model=ModelConfig(T=2, width=8, depth=[1, 1, 1]),
        train=TrainConfig(epochs=6, batch_size=10, learning_rate=0.05),
        device="cpu",
    )
    train(config, folder / "run")
    assert json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["test_top1"] > 90
    return folder / "run" / "last.pt"


@pytest.fixture
def evaluated(trained: Path, tmp_path: Path) -> Callable[[Path], dict]:
    def evaluate(root: Path, *options: str, checkpoint: Path = trained) -> dict:
        arguments = ["--checkpoint", str(checkpoint), "--data.root", str(root), "--json", str(tmp_path / "out.json")]
        arguments += ["--predictions", str(tmp_path / "out.csv")]
        assert eval_main([*arguments, *options]) == 0
        return json.loads((tmp_path / "out.json").read_text())["scores"]

    return evaluate


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, main: Callable = eval_main) -> str:
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def without_speed(scores: dict) -> dict:
    return {name: value for name, value in scores.items() if name != "images_per_second"}


def test_images_are_normalised_as_in_training(trained, evaluated, tmp_path) -> None:
    expected = evaluated(trained.parents[1] / "set.npz")
    # The same test images beside other training images, and by themselves.
    found = evaluated(save(tmp_path / "brighter.npz", brightness=70))
    assert without_speed(found) == without_speed(expected)
    with np.load(tmp_path / "brighter.npz") as arrays:
        np.savez(tmp_path / "test_only.npz", x_test=arrays["x_test"], y_test=arrays["y_test"])
    assert without_speed(evaluated(tmp_path / "test_only.npz")) == without_speed(expected)


def test_classes_in_another_order_are_taken_by_name(trained, evaluated, tmp_path, caplog) -> None:
    expected = evaluated(trained.parents[1] / "set.npz")
    predictions = (tmp_path / "out.csv").read_text()
    assert "another order" not in caplog.text
    found = evaluated(save(tmp_path / "swapped.npz", names=("red", "blue"), order=(1, 0)))
    assert without_speed(found) == without_speed(expected)
    # In the names and the order of the checkpoint.
    assert (tmp_path / "out.csv").read_text() == predictions
    assert {line.split(",")[1] for line in predictions.splitlines()[1:]} == set(NAMES)
    assert "the classes of npz are in another order than in training: taken by name" in caplog.text


def test_other_classes_are_refused(trained, tmp_path, capsys) -> None:
    root = str(save(tmp_path / "other.npz", names=("blue", "Red")))
    error = refused(capsys, "--checkpoint", str(trained), "--data.root", root)
    assert "2 classes ('red' only here), not 2 classes ('Red' only here)" in error
    np.savez(tmp_path / "three.npz", **dict(np.load(root)) | {"classes": np.array(["blue", "red", "green"])})
    error = refused(capsys, "--checkpoint", str(trained), "--data.root", str(tmp_path / "three.npz"))
    assert "is for 2 classes" in error


def test_resuming_compares_the_classes_too(trained, tmp_path, capsys) -> None:
    config = tmp_path / "config.yaml"
    config.write_text((trained.parent / "config.yaml").read_text())
    for names, order in ((("blue", "Red"), (0, 1)), (("red", "blue"), (1, 0))):
        root = str(save(tmp_path / "other.npz", names=names, order=order))
        arguments = ["--config", str(config), "--data.root", root, "--output", str(tmp_path / "run")]
        error = refused(capsys, *arguments, "--resume", str(trained), main=train_main)
        assert f"with other data (it had class names ('blue', 'red'), now {names}" in error


def test_folders_with_only_test_images_are_evaluated_by_name(trained, evaluated, tmp_path) -> None:
    pixels, labels = colored(40, 1)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = tmp_path / "images" / "val" / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:02}.png")
    size = ("--data.name", "imagefolder", "--data.image_size", "8", "--data.resize", "8", "--data.workers", "0")
    scores = evaluated(tmp_path / "images", *size)
    assert scores["top1"] == evaluated(trained.parents[1] / "set.npz")["top1"]


def test_an_older_checkpoint_says_what_it_does_not_know(trained, evaluated, tmp_path, caplog) -> None:
    payload = read_checkpoint(trained)
    del payload["data"]
    write_checkpoint(tmp_path / "old.pt", payload)
    # As before, it is the evaluated set that says them.
    root = trained.parents[1] / "set.npz"
    assert without_speed(evaluated(root, checkpoint=tmp_path / "old.pt")) == without_speed(evaluated(root))
    assert len(re.findall("does not say its classes and normalisation", caplog.text)) == 1


INFO = DataInfo("npz", 2, 1, 8, 8, ("a", "b"), 90, 10, (0.5,), (0.25,), "0" * 64)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ([], "its entry data is damaged"),
        ({"name": "npz"}, "its entry data.num_classes is damaged: Field required"),
        (INFO.to_dict() | {"class_names": ["a"]}, "1 names of 2 classes"),
        (INFO.to_dict() | {"std": (0.0,)}, "mean (0.5,) and std (0.0,)"),
        (INFO.to_dict() | {"height": -1}, "its entry data is damaged: images of -1 x"),
        (INFO.to_dict() | {"frames": 0}, "its entry data is damaged: images of"),
        (INFO.to_dict() | {"mean": (0.5, 0.5)}, "mean (0.5, 0.5)"),
        (INFO.to_dict() | {"mean": (float("nan"),)}, "mean (nan,)"),
    ],
)
def test_a_damaged_entry_is_named(entry: object, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        DataInfo.from_dict(entry)


def test_an_entry_is_read_as_it_was_written(trained: Path) -> None:
    info = DataInfo.from_dict(read_checkpoint(trained)["data"])
    assert (info.class_names, info.channels, info.height, info.train_size) == (NAMES, 3, 8, 40)
    assert DataInfo.from_dict(info.to_dict()) == info
    assert replace(info, class_names=None).labels_of(info) is None


def test_many_classes_are_shortened() -> None:
    names = [tuple(f"{kind}{i}" for i in range(100)) for kind in "ab"]
    infos = [replace(INFO, num_classes=100, class_names=each) for each in names]
    with pytest.raises(InputError, match=r"100 classes \('a0', 'a1', 'a2' and 97 more only here\), not 100 classes"):
        infos[0].labels_of(infos[1])
    backwards = replace(infos[0], class_names=names[0][::-1])
    assert infos[0].labels_of(backwards) == [*range(99, -1, -1)]


def test_an_order_that_names_do_not_tell_is_refused() -> None:
    twice = replace(INFO, num_classes=3, class_names=("a", "a", "b"))
    assert twice.labels_of(twice) is None
    with pytest.raises(InputError, match="several of them are called 'a', so that their order cannot be told by name"):
        twice.labels_of(replace(twice, class_names=("a", "b", "a")))
