"""python -m gac.release: what the package carries is made from a checkpoint, or refused."""

import pytest
import torch

from gac.checkpoint import read_checkpoint as read_weights
from gac.checkpoint import write_checkpoint
from gac.checkpoint.weights import FOLDER
from gac.release import main

CARRIED = read_weights(FOLDER / "digits.safetensors")


def checkpoint(path, **scales):
    """Write the carried network as train.py would, with some of its tensors scaled."""
    model = {name: tensor.float() * scales.get(name.replace(".", "_"), 1) for name, tensor in CARRIED["model"].items()}
    write_checkpoint(path, CARRIED | {"model": model})
    return path


def release(path, output):
    return main(["--checkpoint", str(path), "--output", str(output), "--command", "train.py again"])


def test_a_checkpoint_becomes_the_carried_file(tmp_path, capsys):
    output = tmp_path / "digits.safetensors"
    assert release(checkpoint(tmp_path / "best.pt"), output) == 0
    assert "top-1 99." in capsys.readouterr().out
    made = read_weights(output)
    assert all(torch.equal(made["model"][name], tensor) for name, tensor in CARRIED["model"].items())
    assert made["command"] == "train.py again"
    assert made["data_sha256"] == CARRIED["data_sha256"]
    assert made["scores"]["float16"] == made["scores"]["float32"]


def test_weights_that_half_precision_changes_are_refused(tmp_path, capsys):
    # So small that half precision makes them 0; in float32 the classes stay as they are.
    path = checkpoint(tmp_path / "best.pt", head_weight=1e-9, head_bias=1e-9)
    (tmp_path / "digits.safetensors").write_bytes(b"before")
    assert release(path, tmp_path / "digits.safetensors") == 2
    assert "test images get another class than in float32: train with another --train.seed" in capsys.readouterr().err
    assert (tmp_path / "digits.safetensors").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(2)}, "expected a file of train.py"),
        (None, "no such file"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        torch.save(content, tmp_path / "best.pt")
    assert release(tmp_path / "best.pt", tmp_path / "digits.safetensors") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
