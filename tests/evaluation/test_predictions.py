"""What eval.py writes of each image and each class, against what it reports, and folders of images without labels."""

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gac import create_model, load_checkpoint
from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.cli import eval_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data import build_data
from gac.evaluation.predictions import Predictions, gather
from gac.evaluation.report import Report
from gac.training.engine import train
from image_tree import write_split

pytestmark = pytest.mark.usefixtures("one_thread")
# Three classes as folders are called at worst, and their images.
HARD_NAMES = ('a, "b"\nc', "=1;2\t'", os.fsdecode(b"\xff\xfe,"))
MODEL = ModelConfig(T=2, width=8, depth=[1, 1, 1], neuron="imagenet", temporal_init="alive")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network that knows some digits and confuses others."""
    folder = tmp_path_factory.mktemp("digits")
    data = DataConfig(name="digits", crop_padding=0, horizontal_flip=False)
    train(Config(data, MODEL, TrainConfig(epochs=2, learning_rate=0.05, cutmix="off"), device="cpu"), folder)
    assert 50 < json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["test_top1"] < 99
    return folder / "last.pt"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with hard names; one image of 102 cannot be read."""
    root = tmp_path_factory.mktemp("tree")
    write_split(root / "val", 102, damaged=("zero_bytes.JPEG",))
    china, flower = ((root / "val" / name) for name in ("china", "flower"))
    (root / "val" / HARD_NAMES[2]).mkdir()
    for number, path in enumerate(sorted(china.iterdir())[:5]):
        path.rename(root / "val" / HARD_NAMES[2] / f"{number}{HARD_NAMES[number % 3]}.jpg")
    china.rename(root / "val" / HARD_NAMES[0])
    flower.rename(root / "val" / HARD_NAMES[1])
    shutil.copytree(root / "val", root / "train", ignore=lambda *_: ["zero_bytes.JPEG"])
    return root


@pytest.fixture(scope="module")
def photographs(tree: Path) -> Path:
    """A checkpoint of a network that was trained on them."""
    data = DataConfig(name="imagefolder", root=str(tree), image_size=16, resize=18, workers=0)
    train(Config(data, MODEL, TrainConfig(epochs=1, batch_size=32), device="cpu"), tree.parent / "photographs")
    return tree.parent / "photographs" / "last.pt"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[dict, list[dict[str, str]]]]:
    def run(checkpoint: Path, *options: str) -> tuple[dict, list[dict[str, str]]]:
        """Return what eval.py writes to its two files."""
        files = ["--json", str(tmp_path / "out.json"), "--predictions", str(tmp_path / "out.csv")]
        assert eval_main(["--checkpoint", str(checkpoint), *files, *options]) == 0
        text = (tmp_path / "out.json").read_text()
        assert "NaN" not in text
        with (tmp_path / "out.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            return json.loads(text), list(csv.DictReader(file))

    return run


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert eval_main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def check_scores(report: dict, rows: list[dict[str, str]]) -> None:
    """Compare all scores in a report with those of the single predictions."""
    scores, names = report["scores"], [each["name"] for each in report["classes"]]
    places = [name for name in rows[0] if name.startswith("prediction")]
    assert len(rows) == scores["images"]
    right = [row["label"] == row["prediction"] for row in rows]
    assert sum(right) == scores["correct"]
    assert 100 * sum(right) / len(rows) == scores["top1"] == scores["top1_by_time"][-1]
    assert 100 * sum(row["label"] in [row[place] for place in places] for row in rows) / len(rows) == scores["top5"]
    for each in report["classes"]:
        mine = [hit for row, hit in zip(rows, right, strict=True) if row["label"] == each["name"]]
        assert (each["images"], each["correct"]) == (len(mine), sum(mine))
        assert each["top1"] == (100 * sum(mine) / len(mine) if mine else None)
    matrix = np.zeros((len(names), len(names)), int)
    for row in rows:
        matrix[names.index(row["label"]), names.index(row["prediction"])] += 1
    assert report["confusion"] == [[*pair, matrix[tuple(pair)]] for pair in np.argwhere(matrix).tolist()]
    assert matrix.sum() == scores["images"]


def test_scores_are_those_of_the_single_predictions(digits, run) -> None:
    report, rows = run(digits)
    check_scores(report, rows)
    assert list(rows[0]) == [
        "image", "label", "prediction", "probability", "prediction2", "probability2",
        "prediction3", "probability3", "prediction4", "probability4", "prediction5", "probability5",
    ]  # fmt: skip
    assert [row["image"] for row in rows] == [str(number) for number in range(360)]
    # The network by itself.
    config = Config.from_dict(report["config"])
    data = build_data(config.data, device="cpu", batch_size=1, eval_batch_size=360, seed=0, splits=("test",))
    ((images, labels),) = data.test.epoch(0)
    with torch.no_grad():
        expected = load_checkpoint(digits).eval()(images).mean(0).softmax(-1)
    assert [int(row["label"]) for row in rows] == labels.tolist()
    values, places = expected.topk(5)
    assert [[int(row[f"prediction{k}"]) for k in ("", 2, 3, 4, 5)] for row in rows] == places.tolist()
    found = np.array([[float(row[f"probability{k}"]) for k in ("", 2, 3, 4, 5)] for row in rows])
    assert np.allclose(found, values, rtol=1e-4, atol=0)


def test_names_are_written_as_they_are_and_unreadable_images_left_out(photographs, tree, run, tmp_path) -> None:
    report, rows = run(photographs, "--train.eval_batch_size", "9")
    check_scores(report, rows)
    assert [each["name"] for each in report["classes"]] == sorted(HARD_NAMES)
    files = {path.relative_to(tree).as_posix(): path.parent.name for path in (tree / "val").glob("*/*")}
    del files[next(name for name in files if name.endswith("zero_bytes.JPEG"))]
    assert {row["image"]: row["label"] for row in rows} == files
    assert len(rows) == 101
    # Byte for byte.
    assert b"\xff\xfe" in (tmp_path / "out.csv").read_bytes()
    # As many as there are classes.
    assert list(rows[0])[-1] == "probability3"
    assert all(sum(float(row[f"probability{k}"]) for k in ("", 2, 3)) == pytest.approx(1) for row in rows)


def test_a_class_without_images_has_no_accuracy(digits, run, tmp_path) -> None:
    payload = read_checkpoint(digits)
    payload["data"]["class_names"] = None
    write_checkpoint(tmp_path / "nameless.pt", payload)
    data = build_data(DataConfig(name="digits"), device="cpu", batch_size=1, eval_batch_size=1, seed=0).test
    chosen = data.labels % 2 == 0
    images = data.images[chosen].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "even.npz", x_test=images, y_test=data.labels[chosen].numpy())
    report, rows = run(tmp_path / "nameless.pt", "--data.name=npz", "--data.root", str(tmp_path / "even.npz"))
    check_scores(report, rows)
    assert [each["images"] > 0 for each in report["classes"]] == [True, False] * 5
    assert [each["top1"] for each in report["classes"]][1::2] == [None] * 5


def test_images_without_labels_are_classified_and_not_scored(photographs, tree, run, tmp_path, capsys, caplog) -> None:
    caplog.set_level("INFO")
    _, labelled = run(photographs)
    folder = tmp_path / "flat"
    (folder / ".thumbnails").mkdir(parents=True)
    (folder / "notes.txt").touch()
    for path in (tree / "val" / HARD_NAMES[0]).iterdir():
        shutil.copy(path, folder)
    capsys.readouterr()
    report, rows = run(photographs, "--data.root", str(folder))
    assert f"{folder}: {len(rows)} images without labels, to be classified and not scored" in caplog.messages
    assert "top-1" not in (printed := capsys.readouterr().out)
    assert f"{len(rows)} images without labels" in printed
    assert report["scores"] == {"images": len(rows), "images_per_second": report["scores"]["images_per_second"]}
    assert [report[name] for name in ("classes", "confusion", "published")] == [None] * 3
    # The same as of the images with labels.
    expected = [row for row in labelled if row["label"] == HARD_NAMES[0]]
    for row in expected:
        del row["label"]
        row["image"] = Path(row["image"]).name
    assert rows == expected
    # A network that does not know the names of its classes.
    torch.save(read_checkpoint(photographs)["model"], tmp_path / "bare.pt")
    size = ("--data.image_size=16", "--data.resize=18", "--data.workers=0", "--device=cpu", "--model.neuron=imagenet")
    _, rows = run(tmp_path / "bare.pt", "--data.name=imagefolder", "--data.root", str(folder), *size)
    assert {row["prediction2"] for row in rows} <= {"0", "1", "2"}


def test_a_folder_is_never_taken_for_another_kind(photographs, digits, tree, tmp_path, capsys) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    predictions = ["--predictions", str(tmp_path / "out.csv")]
    command = ["--checkpoint", str(photographs), "--data.root", str(folder)]
    needs_val = f"there is no folder {folder}/val; imagefolder needs"
    assert needs_val in error_of(capsys, *command, *predictions)
    shutil.copy(next((tree / "train" / HARD_NAMES[1]).iterdir()), folder)
    assert "--predictions FILE.csv" in (refused := error_of(capsys, *command))
    assert f"{folder} holds images and no folders" in refused
    assert refused.count("\n") == 1
    (folder / "more").mkdir()
    assert needs_val in (refused := error_of(capsys, *command, *predictions))
    assert "also takes a folder with images and no folders in it" in refused
    # Class folders that are not in val.
    assert "/train/val; imagefolder" in error_of(capsys, *command[:3], str(tree / "train"), *predictions)
    # Another data set would be classified instead.
    for output in (predictions, ["--saliency", str(tmp_path / "out.png")], []):
        refused = error_of(capsys, "--checkpoint", str(digits), "--data.root", str(folder), *output)
        assert "is not read, as data.name is digits: add --data.name imagefolder" in refused
    assert not (tmp_path / "out.csv").exists()


def test_the_precision_asked_for_is_computed_in_and_stated(digits, run, tmp_path, capsys) -> None:
    plain, expected = run(digits)
    assert plain["precision"] == "float32"
    capsys.readouterr()
    report, rows = run(digits, "--train.amp", "bf16")
    assert "bf16 on cpu" in capsys.readouterr().out
    assert (report["precision"], report["config"]["train"]["amp"]) == ("bf16", "bf16")
    check_scores(report, rows)
    assert rows != expected
    # Training's own evaluation in this precision.
    payload = read_checkpoint(digits)
    payload["config"]["train"]["amp"] = "bf16"
    write_checkpoint(tmp_path / "bf16.pt", payload)
    assert run(tmp_path / "bf16.pt")[1] == rows
    assert run(tmp_path / "bf16.pt", "--train.amp=off")[1] == expected
    payload["config"]["train"]["amp"] = "fp16"
    write_checkpoint(tmp_path / "fp16.pt", payload)
    assert run(tmp_path / "fp16.pt")[0]["precision"] == "float32"
    # What was asked for is not replaced by anything.
    capsys.readouterr()
    assert "needs a CUDA device" in error_of(capsys, "--checkpoint", str(digits), "--train.amp=fp16")
    torch.save(payload["model"], tmp_path / "bare.pt")
    bare = run(tmp_path / "bare.pt", "--data.name=digits", "--model.neuron=imagenet", "--train.amp=bf16")
    assert bare[0]["precision"] == "bf16"


def test_outputs_that_are_not_finite_are_refused(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    network = create_model("msresnet18_cifar", 10, 2, width=4, depth=[1, 1, 1])
    with torch.no_grad():
        network.head.bias[3] = 3e38
        network.head.weight[3] = 3e38
    torch.save(network.state_dict(), tmp_path / "large.pt")
    data = (
        "--data.name=synthetic",
        "--data.image_size=8",
        "--model.coding=direct",
        "--model.neuron=cifar",
        "--device=cpu",
    )
    command = ("--checkpoint", str(tmp_path / "large.pt"), *data, "--json", str(tmp_path / "out.json"))
    error = error_of(capsys, *command)
    assert "the outputs for 128 of 128 images are not finite in float32, 0 the first of them" in error
    assert not (tmp_path / "out.json").exists()


def test_files_of_the_command_line_are_not_overwritten(digits, tmp_path, capsys) -> None:
    (tmp_path / "link.pt").symlink_to(digits)
    for name in ("--json", "--predictions"):
        error = error_of(capsys, "--checkpoint", str(tmp_path / "link.pt"), name, str(digits))
        assert f"{name} {digits} is the file of --checkpoint too" in error
    np.savez(tmp_path / "set.npz", x_test=np.zeros((1, 8, 8), np.uint8), y_test=[0])
    data = ("--data.name=npz", "--data.root", str(tmp_path / "set.npz"))
    error = error_of(capsys, "--checkpoint", str(digits), *data, "--predictions", str(tmp_path / "set.npz"))
    assert "is the file of data.root too" in error
    out = str(tmp_path / "out")
    assert "is the file of --json too" in error_of(
        capsys, "--checkpoint", str(digits), "--predictions", out, "--json", out
    )
    assert "--predictions" in error_of(capsys, "--checkpoint", str(digits), "--predictions", str(tmp_path / "no" / "x"))


def test_a_file_that_cannot_be_written_costs_no_other_result(digits, tmp_path, capsys, monkeypatch) -> None:
    def full(report: Report, file: io.BufferedIOBase) -> None:
        file.write(b"image,")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Report, "write_predictions", full)
    files = ("--json", str(tmp_path / "out.json"), "--predictions", str(tmp_path / "out.csv"))
    assert eval_main(["--checkpoint", str(digits), *files]) == 1
    captured = capsys.readouterr()
    assert captured.err.endswith(f"error: cannot write {tmp_path}/out.csv: No space left on device\n")
    assert "top-1" in captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_checkpoint_whose_data_have_other_classes_is_refused(photographs, tree, tmp_path, capsys) -> None:
    payload = read_checkpoint(photographs)
    payload["data"] |= {"num_classes": 2, "class_names": ("a", "b")}
    write_checkpoint(tmp_path / "other.pt", payload)
    assert "says 2 classes, and its weights are of 3" in error_of(capsys, "--checkpoint", str(tmp_path / "other.pt"))


def test_classes_of_one_name_are_told_apart(digits, run, tmp_path, caplog) -> None:
    payload = read_checkpoint(digits)
    payload["data"]["class_names"] = ("x",) * 10
    write_checkpoint(tmp_path / "same.pt", payload)
    data = build_data(DataConfig(name="digits"), device="cpu", batch_size=1, eval_batch_size=1, seed=0).test
    arrays = {"x_test": data.images.permute(0, 2, 3, 1).numpy(), "y_test": data.labels.numpy()}
    np.savez(tmp_path / "set.npz", **arrays)
    report, rows = run(tmp_path / "same.pt", "--data.name=npz", "--data.root", str(tmp_path / "set.npz"))
    check_scores(report, rows)
    assert "several classes are called 'x': classes are named by their numbers" in caplog.messages
    assert rows == run(digits)[1]


def test_every_image_stands_in_its_place_whichever_rank_had_it() -> None:
    """The ranks' collective by hand; test_distributed.py has the real one."""
    labels, ranked = torch.arange(4), torch.arange(4)[:, None] % 2
    parts = [((3, "d"), (0, "a")), ((1, "b"), (2, "c")), ()]

    def part(images: tuple) -> tuple:
        chosen = torch.tensor([number for number, _ in images])
        return list(images), [each[chosen].numpy() for each in (labels, ranked, ranked / 2)] if images else []

    class Three:
        def gather(self, mine: object) -> list:
            return [part(images) for images in parts]

    found = gather([], [], Three())
    assert found.images == ["a", "b", "c", "d"]
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert found.ranked.tolist() == [[0], [1], [0], [1]]
    with pytest.raises(AssertionError, match="3 predictions do not belong to 4 images"):
        gather([(0, "a"), (1, "b"), (2, "c"), (3, "d")], [(labels[:3], ranked[:3], ranked[:3] / 2)])


def test_a_name_that_no_bytes_spell_is_escaped() -> None:
    found = Predictions(["\ud800"], np.array([0]), np.array([[1, 0]]), np.array([[0.75, 0.25]], np.float32))
    found.write_csv(file := io.BytesIO(), ["a\ud800", "b\udcff"], labelled=True)
    assert file.getvalue().splitlines()[1] == rb"\ud800,a\ud800,b" + b"\xff,0.75," + rb"a\ud800,0.25"
