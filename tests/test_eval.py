"""eval.py on checkpoints of both kinds."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from gac import create_model
from gac.checkpoint import read_checkpoint, write_checkpoint
from gac.cli import eval_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.data import build_data
from gac.errors import InputError
from gac.execution.cuda_graph import Graphs
from gac.options import parse_eval
from gac.training.engine import train
from recorded_graph import CaptureByRecording

ROOT = Path(__file__).parents[1]
CONFIG = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=40, synthetic_classes=3),
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1]),
    train=TrainConfig(epochs=1, batch_size=16),
    device="cpu",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(CONFIG, folder)
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert eval_main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_scores_are_those_of_the_training_run(run: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "eval.py", "--checkpoint", str(run / "best.pt"), "--json", str(tmp_path / "scores.json")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    line = json.loads((run / "metrics.jsonl").read_text())
    assert scores["scores"]["top1"] == line["test_top1"]
    assert scores["scores"]["top5"] == line["test_top5"]
    assert scores["scores"]["loss"] == pytest.approx(line["test_loss"])
    assert len(scores["scores"]["top1_by_time"]) == 2
    assert Config.from_dict(scores["config"]) == CONFIG.with_neuron()
    assert scores["versions"]["torch"] == torch.__version__
    rows = dict(row.split(maxsplit=1) for row in process.stdout.splitlines() if not row.startswith("  "))
    assert f"{line['test_top1']:.2f} %" in rows["top-1"]
    assert process.stdout.count("t = 1..") == 2
    assert "published" not in rows
    assert rows["backend"] == f"{scores['backend']} ({scores['backend_reason']})"
    assert (scores["backend"], scores["trained_backend"]) == (line["backend"], line["backend"])
    assert rows["checkpoint"].endswith(f"(after epoch 1, trained with backend {line['backend']!r})")


def test_what_is_scored_is_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(CONFIG, train=replace(CONFIG.train, epochs=4, ema_decay=0.9)), tmp_path)
    payload = read_checkpoint(tmp_path / "best.pt")
    average = read_checkpoint(tmp_path / "last.pt")["training"]["average"]["model"]
    for weights, state, what in (("raw", payload["model"], ""), ("ema", average, ", moving average of the weights")):
        write_checkpoint(tmp_path / f"{weights}.pt", payload | {"weights": weights, "model": state})
        arguments = ["--checkpoint", str(tmp_path / f"{weights}.pt"), "--json", str(tmp_path / "scores.json")]
        assert eval_main(arguments) == 0
        printed = f"(after epoch {payload['epoch']}{what}, trained with backend {payload['backend']!r})\n"
        assert printed in capsys.readouterr().out
        report = json.loads((tmp_path / "scores.json").read_text())
        assert report["weights"] == weights
        if weights == "ema":
            lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
            assert report["scores"]["loss"] == pytest.approx(lines[-1]["test_loss_ema"])


def test_overrides_apply_to_data_and_execution(run: Path) -> None:
    arguments = ["--data.synthetic_images", "20", "--train.eval_batch_size", "7", "--model.backend=torch"]
    parsed = parse_eval(["--checkpoint", str(run / "best.pt"), *arguments])
    assert parsed.config == replace(
        CONFIG.with_neuron(),
        data=replace(CONFIG.data, synthetic_images=20),
        model=replace(CONFIG.with_neuron().model, backend="torch"),
        train=replace(CONFIG.train, eval_batch_size=7),
    )


def test_batches_are_replayed_on_request(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = CaptureByRecording()
    graphs = Graphs(lambda: capture)
    monkeypatch.setattr("gac.evaluation.report.select_graphs", lambda wanted, device: graphs if wanted else None)
    scores = []
    for options in ([], ["--train.cuda_graph", "true"]):
        assert capture.replays == 0
        arguments = ["--checkpoint", str(run / "best.pt"), "--train.eval_batch_size=2", *options]
        assert eval_main([*arguments, "--json", str(tmp_path / "scores.json")]) == 0
        report = json.loads((tmp_path / "scores.json").read_text())
        assert report["config"]["train"]["cuda_graph"] == (True if options else "auto")
        scores.append({**report["scores"], "images_per_second": None})
    assert scores[0] == scores[1]
    assert capture.replays == 2  # of five batches, three of which warm up
    capsys.readouterr()
    payload = read_checkpoint(run / "best.pt")
    payload["config"]["model"]["coding"] = "rate"
    write_checkpoint(tmp_path / "rate.pt", payload)
    rate = ["--checkpoint", str(tmp_path / "rate.pt")]
    assert "cannot replay rate coding" in error_of(capsys, *rate, "--train.cuda_graph=true")


def test_a_data_set_with_other_classes_or_channels_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = ["--checkpoint", str(run / "best.pt")]
    assert "is for 3 classes, data set synthetic has 4" in error_of(capsys, *checkpoint, "--data.synthetic_classes=4")
    assert "is for 3 classes, data set digits has 10" in error_of(capsys, *checkpoint, "--data.name=digits")


def test_a_wrong_value_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = ["--checkpoint", str(run / "best.pt")]
    assert "eval_batch_size must be at least 1" in error_of(capsys, *checkpoint, "--train.eval_batch_size=0")
    assert "data.name must be one of digits" in error_of(capsys, *checkpoint, "--data.name=cifar")
    assert "expected a file in a folder that exists" in error_of(capsys, *checkpoint, "--json", str(run / "no" / "x"))


@pytest.fixture
def cifar_shaped(tmp_path: Path) -> list[str]:
    """A state dict without configuration, as the authors' files are, and a data set it fits."""
    torch.manual_seed(0)
    torch.save(create_model("gac_msresnet18_cifar", 10, T=4, width=8).state_dict(), tmp_path / "weights.pt")
    said = ["--model.neuron=cifar", "--data.image_size=8", "--data.synthetic_images=40"]
    return ["--checkpoint", str(tmp_path / "weights.pt"), *said]


def test_a_file_without_configuration_needs_the_data_sets_name(
    cifar_shaped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "name it with --data.name" in error_of(capsys, *cifar_shaped)


def test_a_file_without_configuration_is_scored(
    cifar_shaped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file = tmp_path / "scores.json"
    assert eval_main([*cifar_shaped, "--data.name=synthetic", "--device=cpu", "--json", str(json_file)]) == 0
    scores = json.loads(json_file.read_text())
    assert (scores["T"], scores["coding"], scores["scores"]["images"]) == (4, "gac", 10)
    assert set(scores["config"]) == {"data", "device"}
    assert "T=4" in capsys.readouterr().out


def test_the_published_number_stands_beside_the_published_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    torch.save(create_model("gac_msresnet18_cifar", 10, T=2).state_dict(), tmp_path / "weights.pt")

    def small_cifar10(config: DataConfig, **options: object):
        data = build_data(replace(config, name="synthetic", image_size=8, synthetic_images=8), **options)
        return replace(data, info=replace(data.info, name="cifar10"))

    monkeypatch.setattr("gac.evaluation.report.build_data", small_cifar10)
    said = ["--data.name=cifar10", "--model.neuron=cifar", "--device=cpu"]
    assert eval_main(["--checkpoint", str(tmp_path / "weights.pt"), *said]) == 0
    published = capsys.readouterr().out.splitlines()[-1]
    assert published.startswith("published")
    assert "96.18 %" in published


def test_the_number_of_time_steps_is_free_without_gated_attention_only(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "T=3 was asked for, but its gated attention is made for T=2" in error_of(
        capsys, "--checkpoint", str(run / "best.pt"), "--model.T=3"
    )
    torch.save(create_model("msresnet18_cifar", 10, T=1, width=8).state_dict(), tmp_path / "weights.pt")
    plain = ["--checkpoint", str(tmp_path / "weights.pt"), "--data.name=synthetic", "--data.image_size=8"]
    assert "do not show whether it is direct, rate, latency or phase" in error_of(capsys, *plain)
    plain += ["--model.coding=direct"]
    assert "its weights do not show its neurons: say which preset" in error_of(capsys, *plain)
    plain += ["--model.neuron=cifar"]
    for options, T in (([], 6), (["--model.T=3"], 3)):
        assert eval_main([*plain, *options, "--device=cpu"]) == 0
        assert capsys.readouterr().out.count("t = 1..") == T


def test_a_checkpoint_makes_eval_neither_download_nor_read_a_path_that_is_not_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = torch.load(run / "best.pt", weights_only=True)
    payload["config"]["data"] |= {"name": "cifar10", "root": str(tmp_path / "elsewhere"), "download": True}
    path = tmp_path / "theirs.pt"
    torch.save(payload, path)
    assert "cifar10, was in" in error_of(capsys, "--checkpoint", str(path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", None)
    assert "data.download" in error_of(capsys, "--checkpoint", str(path))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_network_with_gated_attention_is_scored_at_fewer_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(*options: str) -> list[str]:
        assert eval_main(["--checkpoint", str(run / "best.pt"), "--device=cpu", *options]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "t = 1..1" in line]

    assert lines("--model.T=1") == lines() != []


def test_what_the_terminal_cannot_show_costs_no_result(run: Path, tmp_path: Path) -> None:
    checkpoint, scores = tmp_path / "长城.pt", tmp_path / "scores.json"
    checkpoint.write_bytes((run / "best.pt").read_bytes())
    # One reader that knows only ASCII, and one that is gone.
    predictions = tmp_path / "predictions.csv"
    command = [sys.executable, "eval.py", "--checkpoint", str(checkpoint), "--json", str(scores)]
    command += ["--predictions", str(predictions)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stderr.count("\n")) == (0, 1), process.stderr  # which backend runs
    assert r"\u957f\u57ce.pt" in process.stdout
    scores.unlink()
    predictions.unlink()
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (process.returncode, process.stderr.count("\n")) == (0, 1), process.stderr
    assert json.loads(scores.read_text())["scores"]["images"] == 10
    assert len(predictions.read_text().splitlines()) == 11


def test_memory_that_cannot_be_had_is_one_line(
    cifar_shaped: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gac.memory.available_memory", lambda: 2**28)
    torch.save(create_model("msresnet18_cifar", 10, T=1, width=8).state_dict(), tmp_path / "weights.pt")
    options = [*cifar_shaped, "--data.name=synthetic", "--device=cpu", "--model.coding=direct"]
    error = error_of(capsys, *options, "--model.T=10000")
    assert "train.eval_batch_size 256 with model.width 8 and model.T 10000 on images of 8 x 8 pixels needs" in error
    assert eval_main([*options, "--model.T=2"]) == 0


def test_a_checkpoint_that_says_another_T_than_its_weights(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    payload = read_checkpoint(run / "best.pt")
    payload["config"]["model"]["T"] = 6
    write_checkpoint(tmp_path / "best.pt", payload)
    error = error_of(capsys, "--checkpoint", str(tmp_path / "best.pt"))
    assert "T=6 was asked for, but its gated attention is made for T=2" in error


def test_pictures_in_a_folder_need_no_word_on_the_cutout_of_training(run: Path, tmp_path: Path) -> None:
    payload = read_checkpoint(run / "best.pt")
    payload["config"]["data"]["cutout"] = 4
    write_checkpoint(tmp_path / "best.pt", payload)
    pictures = ["--data.name", "imagefolder", "--data.root", str(tmp_path)]
    assert parse_eval(["--checkpoint", str(tmp_path / "best.pt"), *pictures]).config.data.name == "imagefolder"
    assert parse_eval(["--checkpoint", str(tmp_path / "best.pt")]).config.data.cutout == 4
    with pytest.raises(InputError, match=r"data\.cutout must be 0 with data\.name imagefolder"):
        parse_eval(["--checkpoint", str(tmp_path / "best.pt"), *pictures, "--data.cutout", "4"])


@pytest.mark.parametrize("coding", ["gac", "rate"])
def test_energy_is_that_of_the_test_images_and_repeats(
    coding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(CONFIG, model=replace(CONFIG.model, coding=coding)), tmp_path)
    results = []
    for _ in range(2):
        command = ["--checkpoint", str(tmp_path / "best.pt"), "--energy", "--json", str(tmp_path / "scores.json")]
        assert eval_main(command) == 0
        results.append((capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())["energy"]))
    assert results[0][1] == results[1][1]
    out, energy = results[0]
    assert energy["data"] == "10 of the 10 test images of synthetic, evenly spread"
    assert f"energy of an image over T=2 steps, mean over {energy['data']}\n" in out
    (total,) = (line.split() for line in out.splitlines() if line.startswith("total "))
    assert total[-2:] == [f"{energy['paper_mj']:.6f}", f"{energy['full_mj']:.6f}"]
    assert energy["images"] == 10
    assert energy["macs"] > 0


def test_fewer_images_are_kept_where_the_memory_is_small(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gac.evaluation.sample.available_memory", lambda: 4 * 4 * (3 * 8 * 8 * 4))
    assert eval_main(["--checkpoint", str(run / "best.pt"), "--energy", "--device=cpu"]) == 0
    assert "too little memory to keep 256 test images for a closer look: 4 are kept" in caplog.text
    assert "mean over 4 of the 10 test images of synthetic" in capsys.readouterr().out


def test_a_report_and_saliency_are_of_the_file_that_was_scored(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    command = ["--checkpoint", str(run / "best.pt"), "--model.T=1", "--report", str(folder)]
    # Files of results may go into it. NumPy has no bfloat16, which everything drawn must have left.
    results = ["--json", str(folder / "scores.json"), "--saliency", str(folder / "maps.png")]
    assert eval_main([*command, "--train.amp=bf16", *results]) == 0
    assert (folder / "maps.png").exists()
    assert "energy" not in capsys.readouterr().out
    assert f"a page about it: {folder / 'index.html'}" in caplog.messages
    digest = hashlib.sha256((run / "best.pt").read_bytes()).hexdigest()
    page = (folder / "index.html").read_text()
    assert digest in page
    assert "over all 2 time steps, of which the first 1 were scored" in page
    assert "<dt>for an image over T = 2, every operation counted</dt>" in page
    report, scores = (json.loads((folder / name).read_text()) for name in ("report.json", "scores.json"))
    assert report["sha256"] == digest
    assert report["scores"]["top1_by_time"] == scores["scores"]["top1_by_time"]
    before = sorted(folder.rglob("*"))
    message = error_of(capsys, *command)
    assert (
        message
        == f"error: --report {folder}: the folder is not empty, and nothing in it is overwritten: name another one\n"
    )
    assert sorted(folder.rglob("*")) == before
    saliency = tmp_path / "maps.png"
    command = ["--checkpoint", str(run / "best.pt"), "--saliency", str(saliency), "--layer"]
    assert eval_main([*command, "stages.0"]) == 0
    with Image.open(saliency) as picture:
        assert len(set(picture.convert("L").get_flattened_data())) > 20
    capsys.readouterr()
    assert error_of(capsys, *command, "stage.0").startswith(
        "error: there is no layer 'stage.0' (did you mean stages.0?): there are stem, stem.conv, stem.norm and "
    )
    with pytest.raises(InputError, match="without torchrun"):
        parse_eval(command[:-1], processes=2)
    assert "add one of them" in error_of(capsys, *command[:2], "--layer", "stages.0")
    command = ["--checkpoint", str(run / "best.pt"), "--report", str(folder)]
    for place, reason in ((run / "best.pt", "expected a new folder"), (tmp_path / "no" / "page", "in one that exists")):
        assert reason in error_of(capsys, *command[:2], "--report", str(place))
