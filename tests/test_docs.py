"""What docs/ show runs as it is written, and leads somewhere."""

import re
from pathlib import Path

import pytest
import torch

from gac.checkpoint import find_released, list_pretrained, write_checkpoint
from gac.config import Config, ModelConfig
from gac.models import create_model, list_models

DOCS = Path(__file__).parents[1] / "docs"


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = ModelConfig(T=2, width=4, depth=[1, 1, 1])
    net = create_model("gac_msresnet18_cifar", 10, 2, width=4, depth=[1, 1, 1], in_channels=1)
    entries = {"model": net.state_dict(), "config": Config(model=model).to_dict(), "num_classes": 10, "in_channels": 1}
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    write_checkpoint(tmp_path / "runs" / "demo" / "best.pt", entries)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in python_blocks("analysis.md"):
        exec(block, names)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "firing.png",
        "gates.png",
        "raster.png",
        "energy.png",
        "saliency.png",
    }
    capsys.readouterr()
    names["images"] = torch.rand(2, 1, 8, 8)
    (measuring,) = python_blocks("energy.md")
    exec(measuring, names)
    assert "'stem.conv': False" in capsys.readouterr().out


def test_the_examples_about_weights_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"images": torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)}
    logits = []
    for block in python_blocks("weights.md"):
        exec(block, names)
        logits.append(names["logits"])
    assert torch.equal(*logits)
    assert names["tuned"].num_classes == 3


def test_the_table_of_weights_is_the_registry() -> None:
    rows = re.findall(
        r"^\| `(\S+)` \| `(\S+)`.*?\| (\d+) \| ([\d.]+) %", (DOCS / "weights.md").read_text(), re.MULTILINE
    )
    assert [name for name, *_ in rows] == list_pretrained()
    for name, network, T, top1 in rows:
        card = find_released(name).card
        assert (network, int(T)) == (card["config"]["model"]["name"], card["config"]["model"]["T"])
        assert top1 == f"{card['scores']['float16']['top1']:.2f}"


@pytest.mark.parametrize("name", ["analysis.md", "energy.md", "networks.md", "plug_and_play.md", "weights.md"])
def test_the_pictures_are_there(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (DOCS / name).read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), target


def test_each_network_has_its_row() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.+?) M, with GAC (.+?) M \((\d+)", (DOCS / "networks.md").read_text(), re.MULTILINE
    )
    assert {name for name, *_ in rows} == {name for name in list_models() if not name.startswith("gac_")}
    for name, *counts, classes in rows:
        for prefix, millions in zip(("", "gac_"), counts, strict=True):
            with torch.device("meta"):
                parameters = create_model(prefix + name, int(classes), 6 if "cifar" in name else 4).parameters()
            assert f"{sum(p.numel() for p in parameters) / 1e6:.2f}" == millions
