"""The ImageNet recipes: what their files say, and a run of them on a small tree of real photographs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loader
from gac.cli import eval_main, parse_train, train_main
from gac.training.run_folder import read_metrics
from image_tree import DAMAGED, write_split

ROOT = Path(__file__).parents[1]
CONFIGS = {name: ROOT / "configs" / f"imagenet_{name}.yaml" for name in ("r18", "r34")}
SMALL = [
    *("--data.image_size", "32", "--data.resize", "36", "--data.workers", "2", "--device", "cpu"),
    *("--model.width", "4", "--model.depth", "[1, 1, 1, 1]", "--model.T", "2"),
    *("--train.epochs", "1", "--train.batch_size", "25", "--train.amp", "off"),
]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_recipe_is_the_published_one(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line[4:] for line in CONFIGS[name].read_text().splitlines() if line.startswith("#   python train.py")]
    runs = [parse_train(shlex.split(line)[2:]) for line in lines]
    assert [run.config.model.T for run in runs] == [4, 6]
    assert len({run.output for run in runs}) == 2
    for run in runs:
        data, train = run.config.data, run.config.train
        assert run.config.model.name == f"gac_msresnet{name[1:]}"
        assert (data.name, data.image_size, data.resize) == ("imagefolder", 224, 256)
        assert (data.augment, data.horizontal_flip) == ("autoaugment_imagenet", False)
        assert (train.cutmix, train.cutmix_probability, train.label_smoothing) == ("batch", 1.0, 0.1)
        assert (train.learning_rate, train.momentum, train.weight_decay) == (0.1, 0.9, 1e-5)
        assert (train.batch_size, train.epochs, train.amp) == (256, 250, "fp16")


def test_the_commands_of_the_guide_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    guide = (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in guide.splitlines() if line.startswith("python ")]
    trainings = [parse_train(command[2:]) for command in commands if command[1] == "train.py"]
    measurements = [loader.PARSER.parse_args(command[3:]) for command in commands if command[1] == "-m"]
    assert [run.config.data.name for run in trainings] == ["imagefolder", "imagefolder", "synthetic"]
    assert [options.need for options in measurements] == [2000, 2000]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The R18 recipe with a tiny network on photographs, of which 1 % cannot be read."""
    write_split(tmp_path / "imagenet" / "train", images=200, damaged=tuple(DAMAGED))
    write_split(tmp_path / "imagenet" / "val", images=100, damaged=("truncated.JPEG",))
    places = ["--data.root", str(tmp_path / "imagenet"), "--output", str(tmp_path / "run")]
    return ["--config", str(CONFIGS["r18"]), *places, *SMALL]


def test_trains_and_evaluates_without_the_images_that_cannot_be_read(arguments, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    skipped = [
        line.split(" cannot be read (")[0] for line in process.stderr.splitlines() if " cannot be read (" in line
    ]
    flowers = [tmp_path / "imagenet" / split / "flower" for split in ("train", "val")]
    damaged = [flowers[0] / "truncated.JPEG", flowers[0] / "zero_bytes.JPEG", flowers[1] / "truncated.JPEG"]
    assert sorted(skipped) == [str(path) for path in damaged]
    (metrics,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (metrics["epoch"], metrics["step"]) == (1, 8)

    result = tmp_path / "result.json"
    assert eval_main(["--checkpoint", str(tmp_path / "run" / "best.pt"), "--json", str(result)]) == 0
    scores = json.loads(result.read_text())["scores"]
    assert scores["images"] == 99
    assert scores["top1"] == metrics["test_top1"] == pytest.approx(100 * scores["correct"] / 99)


def test_a_broken_set_ends_the_run_in_one_line(arguments, tmp_path, capsys):
    for path in (tmp_path / "imagenet" / "train" / "china").glob("1_*"):
        path.write_bytes(b"")
    assert train_main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    (error,) = errors
    assert error.startswith(f"error: more than 1 % of the 200 images in {tmp_path}/imagenet/train cannot be read, ")


def test_a_missing_split_is_one_line_before_the_run_folder_is_made(arguments, tmp_path, capsys):
    (tmp_path / "imagenet" / "val").rename(tmp_path / "elsewhere")
    assert train_main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: there is no folder {tmp_path}/imagenet/val; ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
