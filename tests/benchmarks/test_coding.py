"""The comparison of codings with tiny runs: real training, resumed after a real kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from benchmarks import coding
from benchmarks.coding_figure import coding_figure
from gac.analysis.energy import measure_energy
from gac.checkpoint import read_checkpoint
from gac.config import Config
from gac.evaluation.report import evaluate_checkpoint
from gac.training.run_folder import read_metrics
from gac.training.totals import TrainingDiverged

ROOT = Path(__file__).parents[2]
YAML = """
data: {name: synthetic, synthetic_images: 96, synthetic_classes: 4, image_size: 8, crop_padding: 0}
model: {width: 4, depth: [1, 1, 1], T: 2}
train: {epochs: 2, batch_size: 32, cutmix: "off", seed: 7, checkpoint_minutes: 0}
"""


def command(folder: Path, *own: str, options: tuple[str, ...] = ()) -> list[str]:
    """Return a command line with the configuration and all results in ``folder``."""
    (folder / "tiny.yaml").write_text(YAML)
    results = ["--json", str(folder / "result.json"), "--device", "cpu", "--seeds", "2"]
    return [*results, *own, "--", "--config", str(folder / "tiny.yaml"), "--output", str(folder / "runs"), *options]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of all codings."""
    folder = tmp_path_factory.mktemp("compared")
    assert coding.main(command(folder, "--plot", str(folder / "result.png"))) == 0
    return folder


def test_every_run_is_the_one_that_its_row_says(compared):
    runs = json.loads((compared / "result.json").read_text())["runs"]
    assert [(row["coding"], row["seed"]) for row in runs] == [
        (name, seed) for seed in (7, 8) for name in coding.CODINGS
    ]
    for row in runs:
        folder = compared / "runs" / f"{row['coding']}-{row['seed']}"
        config = Config.from_dict(read_checkpoint(folder / "last.pt")["config"])
        assert (config.model.coding, config.model.gate) == coding.CODINGS[row["coding"]]
        assert config.train.seed == row["seed"]
        assert row["history"] == read_metrics(folder / "metrics.jsonl")
        assert row["top1"] == row["history"][-1]["test_top1"]
        assert row["best_top1"] == max(line["test_top1"] for line in row["history"])
        assert row["images_per_second"] > 0


def test_a_row_is_what_the_network_in_its_folder_scores(compared):
    for row in json.loads((compared / "result.json").read_text())["runs"]:
        file = compared / "runs" / f"{row['coding']}-{row['seed']}" / "last.pt"
        payload = read_checkpoint(file)
        scored = evaluate_checkpoint(file, payload, Config.from_dict(payload["config"]), sample=100)
        assert scored.parameters == row["parameters"]
        with scored.sample.running():
            energy = measure_energy(scored.sample.network, scored.sample.inputs())
        assert (row["energy_images"], row["paper_mj"], row["full_mj"]) == (24, energy.paper_mj, energy.full_mj)
        assert 0 < row["paper_mj"] <= row["full_mj"]
        # The spikes of rate coding are drawn anew.
        assert row["coding"] == "rate" or scored.scores.top1 == row["top1"]


def test_the_summary_and_the_picture_have_every_coding(compared):
    report = json.loads((compared / "result.json").read_text())
    assert [each["coding"] for each in report["codings"]] == list(coding.CODINGS)
    sizes = {each["coding"]: each["parameters"] for each in report["codings"]}
    # Two vectors of two weights; two convolutions of 4 x 4 x 4 x 4.
    assert sizes["gac-temporal"] - sizes["direct"] == 4
    assert sizes["gac-spatial-channel"] - sizes["direct"] == 512
    assert sizes["gac"] - sizes["direct"] == 516
    assert (compared / "result.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_trained_again(compared, capsys):
    before = {path: path.stat().st_mtime_ns for path in compared.glob("runs/*/last.pt")}
    first = json.loads((compared / "result.json").read_text())
    assert coding.main(command(compared)) == 0
    again = json.loads((compared / "result.json").read_text())
    assert (again["runs"], again["codings"]) == (first["runs"], first["codings"])
    assert {path: path.stat().st_mtime_ns for path in compared.glob("runs/*/last.pt")} == before
    assert "gac against direct: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train.epochs", "3"), "holds a run of 2 epochs, not 3: choose another --output"),
        (("--train.batch_size", "16"), "with another configuration (train.batch_size 32 -> 16)"),
        (("--data.synthetic_images", "48"), "with another configuration (data.synthetic_images 96 -> 48)"),
    ],
)
def test_runs_of_another_budget_are_not_mixed_in(compared, options, message, capsys):
    assert coding.main(command(compared, options=options)) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_run_in_use_is_left_to_its_process(compared, capsys):
    lock = compared / "runs" / "gac-8" / "run.lock"
    hold = f"import fcntl; file = open({str(lock)!r}, 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", f"{hold}; input()"], text=True, **pipes)
    try:
        assert holder.stdout.readline() == "held\n"
        assert coding.main(command(compared, "--codings", "gac", "direct")) == 0
    finally:
        holder.communicate("\n", timeout=30)
    printed = capsys.readouterr().out
    (row,) = [line.split() for line in printed.splitlines() if "in use by another process" in line]
    assert row[:2] == ["gac", "8"]
    report = json.loads((compared / "result.json").read_text())
    assert [each["runs"] for each in report["codings"]] == [1, 2]
    # A single pair has no spread, so nothing is said of noise.
    assert report["codings"][1]["gain"]["interval"] is None
    assert "noise" not in printed


def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    """kill -9 while the second run trains: the first stays as it is, and both end as they do without the kill."""
    options = ("--train.epochs", "12", "--train.checkpoint_steps", "1")
    arguments = command(tmp_path, "--codings", "direct", options=options)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.coding", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    first, second = (tmp_path / "runs" / f"direct-{seed}" for seed in (7, 8))
    deadline = time.monotonic() + 120
    while not (second / "metrics.jsonl").exists() or len(read_metrics(second / "metrics.jsonl")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(read_metrics(second / "metrics.jsonl"))
    assert done < 12
    finished = (first / "last.pt").read_bytes()
    assert len(json.loads((tmp_path / "result.json").read_text())["runs"]) == 1

    assert coding.main(arguments) == 0
    runs = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert [row["seed"] for row in runs] == [7, 8]
    assert (first / "last.pt").read_bytes() == finished
    untouched = tmp_path / "untouched"
    untouched.mkdir()
    assert coding.main(command(untouched, "--codings", "direct", options=options)) == 0
    expected = json.loads((untouched / "result.json").read_text())["runs"]
    for found, wanted in zip(runs, expected, strict=True):
        clocks = ("seconds", "images_per_second")
        for line, other in zip(found["history"], wanted["history"], strict=True):
            assert {k: v for k, v in line.items() if k not in clocks} == {
                k: v for k, v in other.items() if k not in clocks
            }


def test_an_interrupt_ends_with_one_line_and_its_status(tmp_path, monkeypatch, capsys):
    train = coding.train

    def interrupted(config, folder, resume):
        train(config, folder, resume, after_step=lambda trainer: os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(coding, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        coding.main(command(tmp_path, "--codings", "gac"))
    assert stopped.value.code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; the same command goes on with gac, seed 7\n"


def test_a_run_that_diverges_is_named(tmp_path, monkeypatch, capsys):
    def diverge(config, folder, resume):
        raise TrainingDiverged("the loss is not finite at step 3")

    monkeypatch.setattr(coding, "train", diverge)
    assert coding.main(command(tmp_path, "--codings", "phase")) == 1
    assert capsys.readouterr().err == "error: phase, seed 7: the loss is not finite at step 3\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.T", "1"), "latency coding needs T >= 2"),
        (("--model.gate", "temporal"), "are what is compared: leave them out and choose --codings"),
        (("--model.coding", "rate"), "are what is compared: leave them out and choose --codings"),
        (("--dry-run",), "the benchmark resumes by itself: no --resume and trial runs, and --device before --"),
        (("--device", "cpu"), "no --resume and trial runs, and --device before --"),
        (("--train.epoch", "3"), "unknown option --train.epoch; did you mean --train.epochs?"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(tmp_path, options, message, capsys):
    assert coding.main(command(tmp_path, options=options)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def rows(**top1: list[float]) -> list[dict]:
    return [
        {"coding": name, "seed": seed, "top1": value, "parameters": 5, "images_per_second": 10.0 * seed}
        | {"paper_mj": 1.0 * seed, "full_mj": 2.0 * seed}
        for name, values in top1.items()
        for seed, value in enumerate(values, 1)
    ]


def test_differences_are_paired_by_seed():
    # The codings move together from seed to seed: unpaired, the spread of either would hide the difference.
    gac, direct, rate = coding.summarise(rows(gac=[50.0, 60.0, 70.0], direct=[49.0, 59.0, 68.0], rate=[51.0, 58.0]))
    assert gac["top1"] == {"mean": 60.0, "std": 10.0, "interval": pytest.approx((35.16, 84.84), abs=0.01)}
    assert gac["gain"] == {"mean": None, "std": None, "interval": None}
    # Student's t for two degrees of freedom: 4.303.
    std = (1 / 3) ** 0.5
    half = 4.3027 * std / 3**0.5
    assert direct["gain"]["mean"] == pytest.approx(4 / 3)
    assert direct["gain"]["std"] == pytest.approx(std)
    assert direct["gain"]["interval"] == pytest.approx((4 / 3 - half, 4 / 3 + half), abs=1e-3)
    assert (rate["runs"], rate["gain"]["mean"], rate["images_per_second"]) == (2, 0.5, 15.0)
    assert (rate["paper_mj"], rate["full_mj"]) == (1.5, 3.0)


@pytest.mark.parametrize(
    ("direct", "words"),
    [
        ([48.0, 58.1, 68.0], "better by more than noise"),
        ([52.0, 62.1, 72.0], "worse by more than noise"),
        ([49.0, 61.0, 70.0], "within noise"),
        ([49.0, 59.0, 69.0], "every seed has the same difference, so the noise is not known"),
    ],
)
def test_the_verdict_is_that_of_the_interval(direct, words):
    _, summary = coding.summarise(rows(gac=[50.0, 60.0, 70.0], direct=direct))
    assert coding.verdict(summary) == f"gac against direct: {words}"


def test_the_figure_shows_every_run_and_every_gain():
    found = rows(gac=[50.0, 60.0], direct=[49.0, 59.5], rate=[30.0])
    environment = {"device": "CPU", "CPU": "some", "torch": "2"}
    figure = coding_figure(found, coding.summarise(found), "title", environment)
    assert isinstance(figure, Figure)
    left, right = figure.axes
    dots = [each.get_offsets()[:, 0].tolist() for each in left.collections if isinstance(each, PathCollection)]
    assert dots == [[50.0, 60.0], [49.0, 59.5], [30.0]]
    assert [each.get_text() for each in left.get_yticklabels()] == ["gac", "direct", "rate"]
    (gain,) = right.containers
    assert gain.lines[0].get_xdata().tolist() == [0.75]
