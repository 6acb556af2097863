"""The scripts in examples/ run as their first line says."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gac
from gac.checkpoint import write_checkpoint
from gac.config import Config, ModelConfig

ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_the_coding_picture_is_drawn_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    net = gac.create_model("gac_msresnet18_cifar", 10, 2, width=4, depth=[1, 1, 1], in_channels=1)
    config = Config(model=ModelConfig(T=2, width=4, depth=[1, 1, 1]))
    entries = {"model": net.state_dict(), "config": config.to_dict(), "num_classes": 10, "in_channels": 1}
    write_checkpoint(tmp_path / "net.pt", entries)
    done = run(ROOT / "examples" / "coding_picture.py", tmp_path / "net.pt", tmp_path / "coding.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path / 'coding.png'}: test image ")
    assert (tmp_path / "coding.png").read_bytes().startswith(b"\x89PNG")


def test_the_coding_picture_says_what_it_needs(monkeypatch):
    # In this process: another one would need seconds to import torch.
    monkeypatch.setattr(sys, "argv", ["coding_picture.py"])
    with pytest.raises(SystemExit, match=r"^usage: python examples/coding_picture\.py CHECKPOINT PICTURE"):
        runpy.run_path(str(ROOT / "examples" / "coding_picture.py"), run_name="__main__")


def test_neurobench_counts_what_this_package_counts(monkeypatch, capsys):
    pytest.importorskip("neurobench", reason="NeuroBench brings tonic, which is GPL-3.0, so CI does not install it")
    monkeypatch.setattr(sys, "argv", ["neurobench_eval.py"])
    runpy.run_path(str(ROOT / "examples" / "neurobench_eval.py"), run_name="__main__")
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["NeuroBench", "gac"]
    table = {row[:30].strip(): row[30:].split() for row in rows}
    for name in ("top-1", "parameters", "activation sparsity", "accumulates an image"):
        assert table[name][0] == table[name][1], name
    # NeuroBench leaves out the real-valued inputs that are 0.
    theirs, ours = (float(each.replace(",", "")) for each in table["multiply-accumulates an image"])
    assert 0 < theirs < ours


def test_a_missing_neurobench_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "neurobench.benchmarks", None)
    monkeypatch.setattr(sys, "argv", ["neurobench_eval.py"])
    with pytest.raises(SystemExit, match=r"this example needs NeuroBench: pip install neurobench \(it brings tonic"):
        runpy.run_path(str(ROOT / "examples" / "neurobench_eval.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("host", "operations"),
    [
        # The multiply-accumulates that the coding adds at T = 4: two convolutions of 4 x 4 and the host's next one.
        ("sew_resnet", 4 * (2 * 16**2 * 64 * 64 * 16 + 8**2 * 64 * 64 * 9)),
        ("spiking_vgg", 4 * (2 * 32**2 * 64 * 64 * 16 + 16**2 * 128 * 64 * 9)),
        ("spikformer", 4 * 16**2 * (2 * 16 * 16 * 16 + 32 * 16 * 9)),
    ],
)
def test_a_host_trains_with_the_coding(
    host: str, operations: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ROOT / "examples" / f"gac_in_{host}.py"
    assert len(file.read_text().splitlines()) < 40
    monkeypatch.setattr(sys, "argv", [file.name, "4"])
    runpy.run_path(str(file), run_name="__main__")
    printed = capsys.readouterr().out
    macs = []
    for name in ("as it is", "with GAC"):
        losses = [float(loss) for loss in re.findall(rf"^{name}, step \d: loss (.+)", printed, flags=re.MULTILINE)]
        assert len(losses) == 4
        assert losses[-1] < losses[0] - 0.01
        macs.append(float(re.search(rf"^{name}: (.+) M MAC", printed, flags=re.MULTILINE)[1]))
    # Printed to 0.01 M; the temporal attention has 32.
    assert macs[1] - macs[0] == pytest.approx(operations / 1e6, abs=0.02)
