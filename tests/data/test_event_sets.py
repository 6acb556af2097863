"""Sets of events in SpikingJelly's file format, from the files to training and evaluation."""

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gac.checkpoint import load_checkpoint, read_checkpoint
from gac.cli import eval_main, train_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data import DataInfo, build_data
from gac.data.event_sets import choose_test, split_digest
from gac.errors import InputError
from gac.training.engine import train
from gac.training.run_folder import read_metrics
from gac.training.signals import Interrupted
from run_results import assert_same, result_of, stop_at

T = 4
POOL = 8
CLASSES = ("left", "right", "up")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

pytestmark = pytest.mark.usefixtures("one_thread")


def write_events(folder: Path, samples: int, events: int = 402) -> None:
    """Write files of events of a dot that moves to the left, to the right or up, as the name of the class says."""
    random = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(samples):
            along = np.linspace(20, 100, events) + random.normal(0, 4, events)
            across = random.integers(40, 80) + random.normal(0, 4, events)
            x, y = {"left": (120 - along, across), "right": (along, across), "up": (across, 120 - along)}[name]
            t = np.sort(random.integers(0, 100_000, events)).astype(np.uint32)
            p = random.integers(0, 2, events).astype(bool)
            np.savez(folder / name / f"dot_{number}.npz", t=t, x=x.astype(np.uint16), y=y.astype(np.uint16), p=p)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    write_events(root / "events_np", 20)
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "events")


def build(root: Path, frames: int | None = T, name: str = "cifar10dvs", **options):
    data = {"event_pool": POOL, "crop_padding": 0, "horizontal_flip": False} | {
        key: options.pop(key) for key in list(options) if key in DataConfig.__dataclass_fields__
    }
    config = DataConfig(name=name, root=str(root), **data)
    return build_data(config, device="cpu", batch_size=54, eval_batch_size=6, seed=1, frames=frames, **options)


def error_of(*arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        build(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def counted(path: Path) -> np.ndarray:
    """Return the frames [T, 2, 16, 16] of a file, counted event by event."""
    with np.load(path) as file:
        events = list(zip(*(file[key].tolist() for key in "xyp"), strict=True))
    frames = np.zeros((T, 2, 128 // POOL, 128 // POOL))
    for place, (x, y, p) in enumerate(events):
        # The last frame has the events that are left over.
        frames[min(place // (len(events) // T), T - 1), int(p), y // POOL, x // POOL] += 1
    return frames


def test_frames_are_counts_of_events_normalised_by_those_of_the_training_samples(root: Path) -> None:
    data = build(root)
    info = data.info
    assert info.class_names == CLASSES
    assert (info.frames, info.channels, info.shape) == (T, 2, "4 frames of 16 x 16")
    assert (info.train_size, info.test_size) == (54, 6)
    names = [f"{name}/dot_{number}" for name in CLASSES for number in sorted(range(20), key=str)]
    test = {each for name in CLASSES for each in choose_test([own for own in names if own.startswith(name)])}
    parts = {"train": [each for each in names if each not in test], "test": [each for each in names if each in test]}
    assert info.split == split_digest(parts)
    frames = {
        split: np.stack([counted(root / "events_np" / f"{each}.npz") for each in parts[split]]) for split in parts
    }
    mean, std = frames["train"].mean((0, 1, 3, 4)) / 255, frames["train"].std((0, 1, 3, 4)) / 255
    assert info.mean == pytest.approx(mean)
    assert info.std == pytest.approx(std)
    ((images, labels),) = data.test.epoch(0)
    expected = (frames["test"] / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(images, torch.from_numpy(expected).float())
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    # Evaluation reads no training samples.
    shutil.rmtree(root / "frames_number_4_split_by_number" / "left")
    (root / "frames_number_4_split_by_number" / "left").mkdir()
    for each in parts["train"] + parts["test"]:
        if each.startswith("left"):
            path = root / "frames_number_4_split_by_number" / f"{each}.npz"
            path.write_bytes(b"") if each in parts["train"] else np.savez(path, frames=np.ones((T, 2, 128, 128)))
    again = build(root, splits=("test",), trained_on=info)
    assert again.info == replace(info, train_size=None, train_labels=None)


def test_what_a_checkpoint_says_of_the_split_is_checked_when_it_is_read(root: Path) -> None:
    info = build(root).info
    assert DataInfo.from_dict(info.to_dict()) == info
    with pytest.raises(InputError, match=r"its entry data\.split is damaged"):
        DataInfo.from_dict(info.to_dict() | {"split": 3})


def test_the_split_is_the_same_for_ever() -> None:
    names = {name: [f"{name}/cifar10_{name}_{number}" for number in range(1000)] for name in CIFAR10}
    test = {each for of_class in names.values() for each in choose_test(of_class)}
    every = sorted(each for of_class in names.values() for each in of_class)
    parts = {"train": [each for each in every if each not in test], "test": [each for each in every if each in test]}
    assert {split: len(each) for split, each in parts.items()} == {"train": 9000, "test": 1000}
    assert choose_test(names["cat"])[:3] == ["cat/cifar10_cat_745", "cat/cifar10_cat_141", "cat/cifar10_cat_369"]
    assert split_digest(parts) == "87d2622b26b4b19867aa880251afde32741f867c4a5c49c4d0167653dd7700fa"
    # Neither the order of the names nor other classes matter, and a small class has a test sample too.
    assert set(choose_test(names["cat"][::-1])) == set(choose_test(names["cat"]))
    assert [len(choose_test(names["cat"][:size])) for size in (2, 3, 19, 20)] == [1, 1, 1, 2]


def config_of(root: Path) -> Config:
    return Config(
        data=DataConfig("cifar10dvs", str(root), event_pool=POOL, crop_padding=1, horizontal_flip=False, roll=1),
        model=ModelConfig(T=T, width=8, depth=[1, 1, 1], temporal_init="alive"),
        train=TrainConfig(epochs=2, batch_size=10, learning_rate=0.05, cutmix="batch", eval_batch_size=4),
        device="cpu",
    )


def test_stopped_resumed_and_evaluated(root: Path, tmp_path: Path, capsys, caplog) -> None:
    config = config_of(root)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", after_step=stop_at(8))
    train(config, tmp_path / "parts", resume="auto")
    assert_same(result_of(tmp_path / "parts"), result_of(tmp_path / "whole"))

    best = tmp_path / "parts" / "best.pt"
    known = DataInfo.from_dict(read_checkpoint(best)["data"])
    assert (known.name, known.class_names, known.shape) == ("cifar10dvs", CLASSES, "4 frames of 16 x 16")
    assert (known.channels, known.split) == (2, build(root).info.split)
    scores = tmp_path / "scores.json"
    # The root that the checkpoint names is not needed, and nothing but the events has to be in the other one.
    moved = tmp_path / "moved"
    shutil.copytree(root / "events_np", moved / "events_np")
    arguments = ["--checkpoint", str(best), "--json", str(scores), "--data.root", str(moved)]
    assert eval_main([*arguments]) == 0
    line = max(read_metrics(tmp_path / "parts" / "metrics.jsonl"), key=lambda line: line["test_top1"])
    whole = json.loads(scores.read_text())["scores"]
    assert (whole["images"], whole["top1"]) == (6, pytest.approx(line["test_top1"]))
    # A state dict says nothing of its data, so the training samples are read for their statistics.
    torch.save(load_checkpoint(best).state_dict(), tmp_path / "bare.pt")
    bare = ["--checkpoint", str(tmp_path / "bare.pt"), *arguments[2:], "--data.name=cifar10dvs", "--model.neuron=cifar"]
    assert eval_main([*bare, f"--data.event_pool={POOL}"]) == 0
    assert json.loads(scores.read_text())["scores"]["loss"] == pytest.approx(whole["loss"])
    assert eval_main([*arguments, "--model.T=2"]) == 0
    assert json.loads(scores.read_text())["scores"]["top1_by_time"] == whole["top1_by_time"][:2]
    assert [folder.name for folder in moved.iterdir() if folder.name.startswith("frames")] == [
        "frames_number_4_split_by_number"
    ]

    # One sample less is another split.
    (moved / "events_np" / "up" / "dot_0.npz").unlink()
    shutil.rmtree(moved / "frames_number_4_split_by_number")
    capsys.readouterr()
    assert eval_main(arguments) == 2
    assert "was trained with another split of cifar10dvs, so that test samples" in capsys.readouterr().err
    (root / "events_np" / "up" / "dot_0.npz").rename(root / "events_np" / "up" / "dot_20.npz")
    shutil.rmtree(root / "frames_number_4_split_by_number")
    with pytest.raises(InputError, match=r"cannot resume .* with other data \(it had split [0-9a-f]+, now [0-9a-f]+\)"):
        train(replace(config, train=replace(config.train, epochs=3)), tmp_path / "parts", resume="auto")


def test_a_network_without_attention_gets_the_frames_it_was_trained_on(root: Path, tmp_path: Path) -> None:
    config = config_of(root)
    train(
        replace(config, model=replace(config.model, coding="direct"), train=replace(config.train, epochs=1)), tmp_path
    )
    scores = tmp_path / "scores.json"
    arguments = ["--checkpoint", str(tmp_path / "best.pt"), "--json", str(scores)]
    assert eval_main(arguments) == 0
    whole = json.loads(scores.read_text())["scores"]["top1_by_time"]
    assert eval_main([*arguments, "--model.T=3"]) == 0
    assert json.loads(scores.read_text())["scores"]["top1_by_time"] == whole[:3]


def test_dvs128_gesture_comes_with_a_split(tmp_path: Path, caplog) -> None:
    write_events(tmp_path / "events_np" / "train", 3)
    write_events(tmp_path / "events_np" / "test", 2)
    data = build(tmp_path, name="dvs128gesture", horizontal_flip=True)
    assert (data.info.train_size, data.info.test_size, data.info.class_names) == (9, 6, CLASSES)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [each.split(":")[0] for each in said] == [
        f"dvs128gesture in {tmp_path} has 9 train samples and the complete set 1176",
        f"dvs128gesture in {tmp_path} has 6 test samples and the complete set 288",
        "data.horizontal_flip makes a gesture of the left hand one of the right hand, which is another class of"
        " dvs128gesture",
    ]
    shutil.rmtree(tmp_path / "events_np" / "test" / "up")
    shutil.rmtree(tmp_path / "frames_number_4_split_by_number")
    assert "train and test in" in error_of(tmp_path, name="dvs128gesture")
    shutil.rmtree(tmp_path / "events_np" / "test")
    message = error_of(tmp_path, name="dvs128gesture")
    assert "one folder for each class in each of train and test, of files with the arrays t, x, y and p" in message


def test_counts_that_a_byte_does_not_hold_are_clipped_and_said(root: Path, caplog) -> None:
    caplog.set_level(logging.INFO, "gac")
    path = root / "events_np" / "up" / "dot_0.npz"
    with np.load(path) as file:
        events = {name: file[name].repeat(20) for name in file.files}
        np.savez(path, **events | {"x": np.full(8040, 7, np.uint16), "y": np.full(8040, 9, np.uint16)})
    data = build(root, frames=1)
    images = torch.cat([images for loader in (data.train, data.test) for images, _ in loader.epoch(0)])
    white = [(1 - mean) / std for mean, std in zip(data.info.mean, data.info.std, strict=True)]
    assert images.amax((0, 1, 3, 4)).tolist() == pytest.approx(white, rel=1e-5)
    assert [each for each in caplog.messages if each.endswith("taken for it")] == [
        "cifar10dvs: 2 of 27648 counts of events are above 255 and taken for it"
    ]


BY_HAND = {
    "cifar10dvs": r"or give --data\.download true; missing .*: airplane\.zip from https://ndownloader\.figshare\.com/",
    "dvs128gesture": r"\(SpikingJelly cannot download them\); missing .*: DvsGesture\.tar\.gz, .* from https://ibm\.ent\.box\.com/\S+$",
    "ncaltech101": r"missing .*: Caltech101\.zip, .* from https://www\.garrickorchard\.com/datasets/n-caltech101$",
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_set_that_is_not_there_is_one_line_with_its_address(name: str, tmp_path: Path, capsys) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {T: 4}")
    for root in (tmp_path / "nowhere", tmp_path):
        options = [f"--data.name={name}", f"--data.root={root}", f"--output={tmp_path / 'run'}", "--device=cpu"]
        if name != "cifar10dvs":
            options.append("--data.download=true")
        assert train_main(["--config", str(config), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"error: data set {name} is not in {root}: name the folder that holds its events_np with"
        )
        assert re.search(BY_HAND[name], line)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_download_that_fails_can_be_repeated(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def download(url: str, root: Path, filename: str, md5: str) -> None:
        asked.append(filename)
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("spikingjelly.datasets.base.download_url", download)
    for _ in range(2):
        message = error_of(tmp_path / "new", download=True)
        assert "Temporary failure in name resolution>; start again, or put by hand into" in message
        assert "airplane.zip from https://ndownloader.figshare.com/files/7712788" in message
    assert asked == ["airplane.zip"] * 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["download"]


def test_archives_put_there_by_hand_become_frames(tmp_path: Path, monkeypatch) -> None:
    # The archives here are not the ones that SpikingJelly knows by their checksums.
    monkeypatch.setattr("gac.data.event_sets.check_integrity", lambda path, md5: True)
    monkeypatch.setattr("spikingjelly.datasets.base.check_integrity", lambda fpath, md5: True)
    (tmp_path / "download").mkdir()
    for name in ("cat", "dog"):
        with zipfile.ZipFile(tmp_path / "download" / f"{name}.zip", "w") as archive:
            for number in range(2):
                # The camera's words of an event: its address, with y, x and the polarity, and its time.
                words = [word for t in range(8) for word in (((t + 1) << 8) | (3 << 1) | (t % 2), t + 200)]
                recorded = b"#!AER-DAT2.0\r\n" + np.array(words, dtype=">u4").tobytes()
                archive.writestr(f"{name}/cifar10_{name}_{number}.aedat", recorded)
    data = build(tmp_path, event_pool=1)
    assert (data.info.class_names, data.info.train_size, data.info.test_size) == (("cat", "dog"), 2, 2)
    mean, std = (torch.tensor(each).view(2, 1, 1) for each in (data.info.mean, data.info.std))
    counts = (next(iter(data.test.epoch(0)))[0] * std + mean) * 255
    assert counts.sum((-2, -1)).round().tolist() == [[[1.0, 1.0]] * T] * 2
    assert not list(tmp_path.glob("*.building"))


def test_a_conversion_that_fails_names_what_has_to_go(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gac.data.event_sets.check_integrity", lambda path, md5: True)
    monkeypatch.setattr("spikingjelly.datasets.base.check_integrity", lambda fpath, md5: True)
    (tmp_path / "download").mkdir()
    (tmp_path / "download" / "airplane.zip").write_bytes(b"no archive")
    message = error_of(tmp_path)
    assert (
        f"could not be made in {tmp_path}: File is not a zip file; delete {tmp_path / 'events_np'}.building" in message
    )
    message = error_of(tmp_path)
    assert message.startswith(
        f"{tmp_path / 'events_np'} was not finished, or another process is making it: unless one is"
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "events_np" / "up" / "dot_3.npz").write_bytes(b"PK"),
            r"up/dot_3\.npz cannot be cut into",
        ),
        (
            lambda root: np.savez(root / "events_np" / "up" / "dot_3.npz", t=np.arange(9), x=np.arange(9)),
            r"up/dot_3\.npz cannot be cut into frames: 'y.*files of events have arrays t, x, y and p",
        ),
        (lambda root: (root / "events_np" / "down").mkdir(), "Found no valid file for the classes down"),
        (
            lambda root: [path.unlink() for path in (root / "events_np" / "up").glob("*[1-9]*.npz")],
            "class up .* needs two",
        ),
        (
            lambda root: (root / "frames_number_4_split_by_number.building").touch(),
            r"frames_number_4_split_by_number was not finished, .* delete .*\.building and what there is of",
        ),
    ],
    ids=["damaged", "incomplete", "empty class", "one sample", "unfinished frames"],
)
def test_files_that_are_no_set_of_events(spoil: Callable, message: str, root: Path) -> None:
    spoil(root)
    before = sorted(root.rglob("*.building"))
    assert re.search(message, error_of(root))
    # What SpikingJelly began is taken away.
    assert sorted(root.rglob("*.building")) == before
    assert not (root / "frames_number_4_split_by_number").exists()


@pytest.mark.parametrize("made", ["events_np", "frames_number_4_split_by_number"])
def test_what_another_process_makes_is_left_alone(made: str, root: Path, monkeypatch) -> None:
    monkeypatch.setattr("gac.data.event_sets._check_finished", lambda *folders: None)
    monkeypatch.setattr("gac.data.event_sets.check_integrity", lambda path, md5: True)
    if made == "events_np":
        shutil.rmtree(root / made)
    else:
        (root / made).mkdir()
    marker = root / f"{made}.building"
    marker.touch()
    assert error_of(root) == f"another process has begun to make {root / made}: wait until it has ended"
    assert marker.exists()
    assert (root / made).exists() == (made != "events_np")


def test_frames_that_do_not_belong_to_the_events(root: Path) -> None:
    build(root)
    frames = root / "frames_number_4_split_by_number"
    np.savez(frames / "up" / "dot_7.npz", frames=np.zeros((3, 2, 128, 128)))
    assert "has frames of shape [3, 2, 128, 128], not [4, 2, 128, 128]: delete its frames_number" in error_of(root)
    (frames / "up" / "dot_7.npz").write_bytes(b"PK")
    assert "dot_7.npz cannot be read" in error_of(root)
    (frames / "up" / "dot_7.npz").unlink()
    assert f"{frames} was made of other files than those in {root / 'events_np'}: delete it" in error_of(root)
    shutil.rmtree(frames / "up")
    (frames / "up").mkdir()
    assert re.search(r"frames_number_4_split_by_number: Found no valid file .*; delete it", error_of(root))


def test_what_does_not_fit_the_sensor_or_the_memory(root: Path, monkeypatch) -> None:
    assert (
        "event_pool 3 does not divide the 128 x 128 pixels of cifar10dvs: take one of 1, 2, 4, 8, 16, 32"
        in error_of(root, event_pool=3)
    )
    assert "take one of 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60" in error_of(root, name="ncaltech101", event_pool=7)
    assert "say how many there are" in error_of(root, frames=None)
    assert "cutting samples of cifar10dvs into 1000000000 frames of 128 x 128 needs" in error_of(root, frames=10**9)
    monkeypatch.setattr("gac.data.event_sets._prepared", lambda *arguments: (CLASSES, {"train": range(10**9)}))
    message = error_of(root, splits=("train",))
    assert message.startswith("data set cifar10dvs, 1000000000 samples of 4 frames of 16 x 16 needs")
    assert message.endswith("choose a larger data.event_pool or a smaller model.T")
