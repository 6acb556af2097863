"""What docs/ show runs as it is written, and leads somewhere."""

import re
from pathlib import Path

import pytest
import torch

from gac.checkpoint import write_checkpoint
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
    # The last one needs NeuroBench, which is no dependency.
    (measuring, _neurobench) = python_blocks("energy.md")
    exec(measuring, names)
    assert "'stem.conv': False" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["analysis.md", "energy.md", "networks.md", "plug_and_play.md"])
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
