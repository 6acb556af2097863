"""python -m gac.release: what is released is made from a run, whole, or refused."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import gac
from gac.analysis.report import is_report
from gac.checkpoint import find_released, read_checkpoint, write_checkpoint
from gac.checkpoint.weights import FOLDER, Released
from gac.config import Config
from gac.hub import HubNetwork
from gac.release import main

DIGITS = find_released("digits")
CARRIED = read_checkpoint(DIGITS.file())


def run_folder(folder, **scales):
    """Write a run of the carried network as train.py would, with some of its tensors scaled."""
    folder.mkdir()
    model = {name: tensor.float() * scales.get(name.replace(".", "_"), 1) for name, tensor in CARRIED["model"].items()}
    metrics = next(line for line in DIGITS.log if line["epoch"] == CARRIED["epoch"])
    write_checkpoint(folder / "best.pt", CARRIED | {"model": model, "metrics": metrics})
    (folder / "config.yaml").write_text(yaml.safe_dump(CARRIED["config"]))
    (folder / "metrics.jsonl").write_bytes((FOLDER / "digits.jsonl").read_bytes())
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A release of the carried network in half precision."""
    folder = tmp_path_factory.mktemp("release")
    arguments = [
        "--name",
        "digits",
        "--half",
        "--command",
        "train.py again",
        "--url",
        "https://a/w",
        "--url",
        "https://b/w",
    ]
    assert main([str(run_folder(folder / "run")), str(folder / "out"), *arguments]) == 0
    return folder / "out"


def test_the_weights_are_the_carried_ones(released):
    made = read_checkpoint(released / "model.safetensors")
    assert all(torch.equal(made["model"][name], tensor) for name, tensor in CARRIED["model"].items())
    assert made["data_sha256"] == CARRIED["data_sha256"]
    assert made["scores"]["float16"]["correct"] == made["scores"]["float32"]["correct"]
    assert made["command"] == "train.py again"


def test_the_entry_fits_the_registry(released, monkeypatch, tmp_path):
    content = (released / "model.safetensors").read_bytes()
    entry = Released(**json.loads((released / "release.json").read_text()))
    assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert entry.urls == ("https://a/w", "https://b/w")
    monkeypatch.setattr("gac.checkpoint.weights.FOLDER", tmp_path)
    (tmp_path / "digits.json").write_text(replace(entry, urls=()).to_json())
    (tmp_path / "digits.safetensors").write_bytes(content)
    assert gac.load_pretrained("digits").card == entry.card


def test_everything_a_release_needs_is_there(released):
    assert is_report(released / "report")
    page = (released / "report/index.html").read_text()
    assert hashlib.sha256((released / "model.safetensors").read_bytes()).hexdigest() in page
    assert (released / "metrics.jsonl").read_bytes() == (FOLDER / "digits.jsonl").read_bytes()
    assert Config.from_dict(yaml.safe_load((released / "config.yaml").read_text())) == Config.from_dict(
        CARRIED["config"]
    )
    environment = json.loads((released / "environment.json").read_text())
    assert environment["training"] == CARRIED["versions"]
    assert environment["release"]["torch"].startswith(torch.__version__)
    assert "scores" in json.loads((released / "config.json").read_text())["card"]


def test_the_folder_is_a_repository_for_the_hub(released):
    network = HubNetwork.from_pretrained(released)
    assert network.card == json.loads((released / "release.json").read_text())["card"]
    assert network.generate_model_card().content == ModelCard.load(released / "README.md").content
    assert "python train.py again" in (released / "README.md").read_text()


def test_a_folder_that_is_not_empty_is_left_alone(released, tmp_path, capsys):
    before = sorted(released.rglob("*"))
    assert main([str(tmp_path), str(released), "--name", "digits"]) == 2
    assert "nothing in it is overwritten" in capsys.readouterr().err
    assert sorted(released.rglob("*")) == before


def test_weights_that_half_precision_changes_are_refused(tmp_path, capsys):
    # So small that half precision makes them 0; in float32 the classes stay as they are.
    run = run_folder(tmp_path / "run", head_weight=1e-9, head_bias=1e-9)
    assert main([str(run), str(tmp_path / "out"), "--name", "digits", "--half"]) == 2
    assert "test images get another class than in float32: leave out --half, or" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(2)}, "expected a file of train.py"),
        (None, "no such file"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        torch.save(content, tmp_path / "best.pt")
    assert main([str(tmp_path), str(tmp_path / "out"), "--name", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    write_checkpoint(tmp_path / "best.pt", CARRIED)
    assert main([str(tmp_path), str(tmp_path / "out"), "--name", "x"]) == 2
    assert "config.yaml: No such file or directory: expected the folder of a run" in capsys.readouterr().err
