"""The command for a GPU: it must end with what ran, whatever happens to a part of it."""

import json
import os
import time

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import ROOT, Part, goals, run
from gac.options import parse_train

CPU, CPU_DEVICE, CUDA = ["--device", "cpu"], torch.device("cpu"), torch.device("cuda")


def python(name: str, code: str, seconds: int = 60, **options: object) -> Part:
    return Part(name, ["-c", code], seconds, **options)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """What runs instead of the parts."""
    chosen: list[Part] = []
    monkeypatch.setattr(gpu, "parts", lambda *_: iter(chosen))
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.2)
    return chosen


def test_a_part_that_fails_is_named_and_the_others_run(parts, tmp_path, capsys):
    (tmp_path / "fails.json").write_text("of an earlier run")
    parts += [
        python("fails", "print('why'); raise SystemExit(3)"),
        python("hangs", "import time; time.sleep(60)", seconds=1),
        python("works", "print('done')", quick=True),
        python("impossible", "", why_not="no GPU"),
    ]
    assert gpu.main([*CPU, "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: not everything ran: fails, hangs; the logs are in {tmp_path}\n"
    outcomes = {each["part"]: each["outcome"] for each in json.loads((tmp_path / "summary.json").read_text())["parts"]}
    assert outcomes == {
        "fails": "failed with status 3, see fails.log",
        "hangs": "stopped after 1 s",
        "works": "ok",
        "impossible": "skipped: no GPU",
    }
    assert (tmp_path / "fails.log").read_text() == "why\n"
    assert not (tmp_path / "fails.json").exists()
    assert gpu.main([*CPU, "--output", str(tmp_path), "--quick"]) == 0
    assert [each["part"] for each in json.loads((tmp_path / "summary.json").read_text())["parts"]] == ["works"]


def test_when_the_time_is_up_the_rest_is_not_started(parts, tmp_path):
    parts += [python("first", "import time; time.sleep(60)"), python("second", "")]
    assert gpu.main([*CPU, "--output", str(tmp_path), "--budget", "1"]) == 1
    outcomes = [each["outcome"] for each in json.loads((tmp_path / "summary.json").read_text())["parts"]]
    assert outcomes == ["stopped after 1 s", "not started: no time left"]


def test_what_a_part_started_ends_with_it(tmp_path, parts):
    file = tmp_path / "beats"
    child = f"import time\nwhile True: open({str(file)!r}, 'a').write('.'); time.sleep(0.05)"
    part = python("parent", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    assert run(part, tmp_path, 3.0) == "stopped after 3 s"
    size = os.path.getsize(file)
    time.sleep(0.3)
    assert os.path.getsize(file) == size > 0


def test_every_part_is_a_command_that_parses(tmp_path):
    options = gpu.PARSER.parse_args([*CPU, "--data", str(tmp_path / "cifar.npz")])
    found = {device: list(gpu.parts(options, tmp_path, tmp_path, device)) for device in (CPU_DEVICE, CUDA)}
    for part in (part for chosen in found.values() for part in chosen):
        if part.command[0] == "-m" and part.command[1].startswith("benchmarks."):
            module = __import__(part.command[1], fromlist=["PARSER"])
            module.PARSER.parse_args(part.command[2:])
        if part.command[0] == "train.py":
            parse_train(part.command[1:])
    names = [part.name for part in found[CUDA]]
    assert names[:4] == ["doctor", "tests", "throughput", "kernels"]
    assert len(names) == len(set(names))


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu.main([]) == 2
    assert "error: device cuda is not there, PyTorch sees 0 CUDA devices" in capsys.readouterr().err


@pytest.mark.slow
def test_on_a_cpu_every_part_runs(tmp_path):
    assert gpu.main([*CPU, "--output", str(tmp_path)]) == 0


def test_the_verdicts_on_what_was_measured():
    found = {goal["goal"]: goal["met"] for goal in goals(ROOT / "benchmarks" / "results" / "h200")}
    assert found["memory of a training step over spikingjelly's"]
    assert not found["train: times as fast as spikingjelly"]
    assert not found["train: times as fast as step-loop"]
    assert found["norm_lif backward, float16: share of a copy's rate"]
    assert not found["gate_lif backward, float16: share of a copy's rate"]
