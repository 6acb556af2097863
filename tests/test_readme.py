"""What README says runs as it is written."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from gac import create_model
from gac.options import parse_train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_examples_run(tmp_path, monkeypatch):
    torch.save(create_model("gac_msresnet18_cifar", 10, 2, width=4).state_dict(), tmp_path / "authors.pth")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["spikes"].shape == (6, 8, 64, 32, 32)
    assert names["logits"].shape == (6, 8, 10)


COMMANDS = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py --config" in c])
def test_the_training_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    parsed = parse_train(words[words.index("train.py") + 1 :])
    assert parsed.config.model.name.startswith("gac_")


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
