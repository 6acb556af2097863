"""train.py as a user runs it: a real process, real signals."""

import hashlib
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gac import load_checkpoint
from gac.checkpoint import read_checkpoint
from gac.cli import eval_main, train_main
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.training.run_folder import read_metrics
from run_results import assert_same, result_of

ROOT = Path(__file__).parents[1]
CONFIG = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=600, crop_padding=1),
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1]),
    train=TrainConfig(epochs=3, batch_size=10, cutmix="batch"),
    device="cpu",
)
BATCHES = 60


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG.to_dict()))
    return path


def start(config_file: Path, output: Path, *options: str, start_new_session: bool = False) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config", str(config_file), "--output", str(output), *options]
    # Work as small as this takes longer to share out than to do.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=start_new_session,
    )  # fmt: skip


def wait_for_epoch(process: subprocess.Popen, output: Path, epoch: int) -> list[dict[str, float]]:
    """Wait until ``epoch`` epochs are complete and return their metrics."""
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(read_metrics(metrics)) < epoch:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return read_metrics(metrics)


def signal_within_epoch(process: subprocess.Popen, output: Path, number: int, epoch: int) -> tuple[int, str]:
    """Send a signal a fifth of an epoch into ``epoch`` (from 0); return the exit status and stderr."""
    time.sleep(wait_for_epoch(process, output, epoch)[-1]["seconds"] / 5)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.mark.usefixtures("one_thread")
def test_stopped_twice_and_resumed_it_ends_as_if_nothing_had_happened(config_file: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, stderr = signal_within_epoch(start(config_file, parts), parts, signal.SIGINT, epoch=1)
    assert status == 130, stderr
    assert f"continue by adding --resume auto --output {parts}" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    first = read_checkpoint(parts / "last.pt")["training"]["position"]
    assert first["epoch"] == 1
    assert 0 < first["batch"] < BATCHES

    resumed = start(config_file, parts, "--resume", "auto")
    status, stderr = signal_within_epoch(resumed, parts, signal.SIGTERM, epoch=2)
    assert status == 143, stderr
    assert f"resuming {parts / 'last.pt'} after 1 epochs and {first['batch']} batches" in stderr

    arguments = ["--config", str(config_file), "--output"]
    assert train_main([*arguments, str(parts), "--resume", "auto"]) == 0
    assert train_main([*arguments, str(whole)]) == 0

    def timeless(path: Path) -> list[dict[str, float]]:
        times = ("seconds", "images_per_second")
        return [{k: v for k, v in line.items() if k not in times} for line in read_metrics(path)]

    assert timeless(parts / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    for name in ("last.pt", "best.pt"):
        model, expected = (read_checkpoint(folder / name)["model"] for folder in (parts, whole))
        assert all(model[key].equal(expected[key]) for key in expected)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def never() -> bool:
    return False


class Runs:
    """Training runs as processes that are killed, forked from one that has imported everything, which takes long."""

    PROGRAM = """
import json, os, sys
from gac.cli import train_main
print("imported", flush=True)
for line in sys.stdin:
    arguments, stderr = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os._exit(train_main(arguments))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

    def __init__(self, config_file: Path, stderr: Path) -> None:
        self.config_file = config_file
        self.stderr = stderr
        self._parent = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._parent.stdout.readline() == "imported\n"

    def run(
        self,
        output: Path,
        *options: str,
        when: Callable[[], bool] = never,
        do: Callable[[int], None] = kill,
    ) -> int:
        """Train, ``do`` something to the process as soon as ``when`` is true, and return the exit status."""
        arguments = ["--config", str(self.config_file), "--output", str(output), *options]
        print(json.dumps([arguments, str(self.stderr)]), file=self._parent.stdin, flush=True)
        process = int(self._parent.stdout.readline())
        ended = select.poll()
        ended.register(self._parent.stdout, select.POLLIN)
        while not ended.poll(0):
            if when():
                do(process)
                break
        return int(self._parent.stdout.readline())

    def close(self) -> None:
        self._parent.stdin.close()
        self._parent.wait(timeout=60)
        self._parent.stdout.close()


# Random numbers in every place that draws some: the encoder, in evaluation too, and CutMix.
KILLED = replace(
    CONFIG,
    data=replace(CONFIG.data, synthetic_images=120),
    model=replace(CONFIG.model, coding="rate"),
    train=replace(CONFIG.train, eval_batch_size=3, checkpoint_steps=5),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "killed.yaml").write_text(yaml.safe_dump(KILLED.to_dict()))
    runs = Runs(folder / "killed.yaml", folder / "stderr")
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def uninterrupted(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run folder that every killed and resumed run must end with, and how long it took in seconds."""
    folder, started = tmp_path_factory.mktemp("uninterrupted") / "run", time.monotonic()
    assert runs.run(folder) == 0, runs.stderr.read_text()
    return folder, time.monotonic() - started


def finish_and_compare(runs: Runs, folder: Path, uninterrupted: Path) -> None:
    assert runs.run(folder, "--resume", "auto") == 0, runs.stderr.read_text()
    assert_same(result_of(folder), result_of(uninterrupted))
    best, expected = (read_checkpoint(path / "best.pt") for path in (folder, uninterrupted))
    assert best["epoch"] == expected["epoch"]
    assert_same(best["model"], expected["model"])
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(
    seed: int, runs: Runs, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = uninterrupted
    moments = random.Random(seed)
    statuses = []
    for _ in range(3):
        ends = time.monotonic() + moments.uniform(0.2, 0.7) * seconds
        statuses.append(runs.run(tmp_path, "--resume", "auto", when=lambda ends=ends: time.monotonic() > ends))
    assert -signal.SIGKILL in statuses
    finish_and_compare(runs, tmp_path, expected)


def test_killed_while_a_checkpoint_is_written(runs: Runs, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    expected, _ = uninterrupted
    caught = 0
    for attempt in range(20):
        # The older name too, so that all of the writing is hit, not only its beginning.
        writes = iter(range(1 + attempt % 3))

        def writing(writes: Iterator[int] = writes) -> bool:
            return bool(list(tmp_path.glob(".last.pt.*.tmp"))) and next(writes, None) is None

        runs.run(tmp_path, "--resume", "auto", "--train.checkpoint_steps", "1", when=writing)
        caught += bool(list(tmp_path.glob(".last.pt.*.tmp")))
        if caught == 3:
            break
    assert caught == 3
    finish_and_compare(runs, tmp_path, expected)


def test_killed_while_evaluating(runs: Runs, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    expected, _ = uninterrupted
    last = tmp_path / "last.pt"
    # Written after the last step of an epoch, before the evaluation.
    status = runs.run(tmp_path, "--train.checkpoint_steps", "12", when=last.exists)
    assert status == -signal.SIGKILL
    position = read_checkpoint(last)["training"]["position"]
    assert (position["epoch"], position["batch"]) == (0, 12)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    finish_and_compare(runs, tmp_path, expected)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    runs: Runs, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    expected, _ = uninterrupted
    last, older = tmp_path / "last.pt", tmp_path / "last-1.pt"
    runs.run(tmp_path, when=lambda: older.exists() and last.exists())
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    finish_and_compare(runs, tmp_path, expected)
    first, *_, resuming = runs.stderr.read_text().splitlines()[:5]
    assert first == f"{last} is damaged: using last-1.pt, which is older; renamed it to last.pt.damaged"
    assert resuming.startswith(f"resuming {older} after ")


def test_a_second_run_is_kept_out_of_the_folder_until_the_first_has_ended(
    runs: Runs, uninterrupted: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    expected, _ = uninterrupted

    def start_another(process: int) -> None:
        for options in ([], ["--resume", "auto"]):
            assert train_main(["--config", str(runs.config_file), "--output", str(tmp_path), *options]) == 2
            message = capsys.readouterr().err
            assert message.startswith(f"error: {tmp_path} is in use by process {process} on ")
            assert message.count("\n") == 1
        kill(process)

    assert runs.run(tmp_path, when=(tmp_path / "last.pt").exists, do=start_another) == -signal.SIGKILL
    finish_and_compare(runs, tmp_path, expected)


def test_a_full_disk_ends_the_run_and_spares_the_checkpoint_before(
    runs: Runs, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    expected, _ = uninterrupted
    last = tmp_path / "last.pt"

    def fill_the_disk(process: int) -> None:
        # A limit on the size of files fails as a full disk does, and for the superuser as well.
        resource.prlimit(process, resource.RLIMIT_FSIZE, (20_000, 20_000))

    assert runs.run(tmp_path, when=last.exists, do=fill_the_disk) == 1
    *_, message = runs.stderr.read_text().splitlines()
    assert message == f"error: cannot write {last}: File too large; the checkpoints before it are as they were"
    assert read_checkpoint(last)["step"] > 0
    assert not list(tmp_path.glob(".*"))
    finish_and_compare(runs, tmp_path, expected)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is a disk that is always full")
def test_a_full_disk_that_tensorboard_meets_first_ends_the_run_like_any(
    runs: Runs, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    expected, _ = uninterrupted

    def fill_the_disk(process: int) -> None:
        (events,) = tmp_path.glob("events*")
        events.unlink()
        events.symlink_to("/dev/full")

    assert runs.run(tmp_path, when=(tmp_path / "last.pt").exists, do=fill_the_disk) == 1
    *_, message = runs.stderr.read_text().splitlines()
    # TensorBoard's thread may be writing its own report of the error at the same moment.
    assert message.endswith(f"error: cannot write {tmp_path}: No space left on device")
    finish_and_compare(runs, tmp_path, expected)


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, images in (("before", 20), ("after", 18)):
        pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
        labels = np.arange(images) % 2
        np.savez(tmp_path / f"{name}.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    data = replace(CONFIG.data, name="npz", root=str(tmp_path / "before.npz"))
    config, output = tmp_path / "npz.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(replace(CONFIG, data=data, train=replace(CONFIG.train, epochs=1)).to_dict()))
    arguments = ["--config", str(config), "--output", str(output), "--resume", "auto"]
    assert train_main(arguments) == 0
    before = (output / "config.yaml").read_text()
    capsys.readouterr()
    assert train_main([*arguments, "--data.root", str(tmp_path / "after.npz")]) == 2
    assert capsys.readouterr().err == (
        f"error: cannot resume {output / 'last.pt'} with other data (it had 20 training images, now 18, 20 test images,"
        " now 18): restore the data set or start a new run with another --output\n"
    )
    assert (output / "config.yaml").read_text() == before


def test_chosen_constants_of_the_neuron_from_the_command_line_to_evaluation(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    sizes = ["--data.synthetic_images=40", "--train.epochs=1"]
    arguments = ["--config", str(config_file), "--output", str(output), *sizes]
    chosen = ["--model.tau=4", "--model.v_threshold=0.6", "--model.surrogate=atan", "--model.detach_reset=true"]
    assert train_main([*arguments, *chosen]) == 0
    model = yaml.safe_load((output / "config.yaml").read_text())["model"]
    expected = {"neuron": "cifar", "tau": 4.0, "v_threshold": 0.6, "surrogate": "atan", "detach_reset": True}
    assert {name: model[name] for name in expected} == expected
    assert read_checkpoint(output / "best.pt")["config"]["model"] == model
    assert load_checkpoint(output / "best.pt").lif.lif_parameters().flatten() == (
        4.0,
        False,
        0.6,
        0.0,
        True,
        "ATan",
        2.0,
    )

    capsys.readouterr()
    assert eval_main(["--checkpoint", str(output / "best.pt"), "--json", str(tmp_path / "scores.json")]) == 0
    scores, (line,) = json.loads((tmp_path / "scores.json").read_text()), read_metrics(output / "metrics.jsonl")
    assert scores["scores"]["loss"] == pytest.approx(line["test_loss"])
    assert scores["config"]["model"]["tau"] == 4.0
    # The same file is another network with other constants, so that the one above is no accident.
    weights = tmp_path / "weights.pt"
    torch.save(read_checkpoint(output / "best.pt")["model"], weights)
    bare = [
        "--checkpoint",
        str(weights),
        "--json",
        str(tmp_path / "scores.json"),
        "--data.name=synthetic",
        "--device=cpu",
    ]
    bare += ["--data.image_size=8", "--data.synthetic_images=40"]
    for options, same in ((["--model.neuron=cifar"], False), (chosen, True)):
        assert eval_main([*bare, *options]) == 0
        loss = json.loads((tmp_path / "scores.json").read_text())["scores"]["loss"]
        assert (loss == pytest.approx(line["test_loss"])) is same

    capsys.readouterr()
    assert train_main([*arguments, "--resume", "auto"]) == 2
    assert "(model.tau 4.0 -> 2.0, model.v_threshold 0.6 -> 1.0, model.surrogate atan -> t" in capsys.readouterr().err
    assert train_main([*arguments, *chosen, "--train.epochs=2", "--resume", "auto"]) == 0
    assert len(read_metrics(output / "metrics.jsonl")) == 2
    capsys.readouterr()
    assert train_main([*arguments, "--model.tau=0.5"]) == 2
    assert capsys.readouterr().err == (
        "error: model.tau must be greater than 1 or null (a decay d of the potential is tau = 1 / (1 - d)); got 0.5\n"
    )


def test_without_a_readable_checkpoint_there_is_one_line(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, when=(tmp_path / "last.pt").exists)
    for path in tmp_path.glob("last*"):
        path.write_bytes(path.read_bytes()[:1000])
    assert runs.run(tmp_path, "--resume", "auto") == 2
    assert runs.stderr.read_text().count("\n") == 1
    assert runs.stderr.read_text().startswith(f"error: cannot resume: {tmp_path / 'last.pt'}")


def test_a_signal_to_the_process_group_spares_the_decoding_workers(tmp_path: Path) -> None:
    # As a cluster's scheduler sends it; on a terminal Ctrl-C does so with SIGINT.
    for folder, count in (("train", 400), ("val", 4)):
        for name in ("ant", "bee"):
            (tmp_path / folder / name).mkdir(parents=True)
            for index in range(count // 2):
                Image.new("RGB", (8, 8)).save(tmp_path / folder / name / f"{index}.png")
    data = replace(CONFIG.data, name="imagefolder", root=str(tmp_path), resize=8, workers=2)
    path, output = tmp_path / "folder.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(replace(CONFIG, data=data, train=replace(CONFIG.train, epochs=1000)).to_dict()))
    process = start(path, output, "--train.batch_size", "4", start_new_session=True)
    wait_for_epoch(process, output, 1)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "stopped by SIGTERM" in stderr.splitlines()[-1]
    assert read_checkpoint(output / "last.pt")["step"] > 0


def test_bad_input_is_status_2_and_one_line(config_file: Path, tmp_path: Path) -> None:
    process = start(config_file, tmp_path / "run", "--model.name", "gac_resnet18")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert stderr.startswith("error: unknown network 'gac_resnet18', expected one of: gac_msresnet18_cifar")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_thread")
def test_the_exported_weights_are_a_checkpoint_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data, epochs = replace(CONFIG.data, synthetic_images=40), replace(CONFIG.train, epochs=1)
    path, run = tmp_path / "small.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(replace(CONFIG, data=data, train=epochs).to_dict()))
    # In the run's folder, which is not there yet.
    command = ["--config", str(path), "--output", str(run), "--export-weights", str(run / "w.safetensors")]
    assert train_main(command) == 0
    best, exported = read_checkpoint(run / "best.pt"), read_checkpoint(run / "w.safetensors")
    assert exported["model"].keys() == best["model"].keys()
    assert all(torch.equal(exported["model"][name], tensor) for name, tensor in best["model"].items())
    assert exported["command"] == f"train.py {' '.join(command)}"
    assert exported["metrics"] == best["metrics"]
    reports = []
    for name in ("best.pt", "w.safetensors"):
        assert eval_main(["--checkpoint", str(run / name), "--json", str(tmp_path / "s.json"), "--device=cpu"]) == 0
        reports.append(json.loads((tmp_path / "s.json").read_text()))
        del reports[-1]["checkpoint"], reports[-1]["scores"]["images_per_second"]
    assert reports[0] == reports[1]
    caplog.clear()
    options = ["--config", str(path), "--output", str(tmp_path / "two"), "--init", str(run / "w.safetensors")]
    assert train_main(options) == 0
    assert f"began with the weights of {run / 'w.safetensors'}" in caplog.messages
    capsys.readouterr()
    for more, message in (
        (["--resume", str(run / "w.safetensors")], "without the state to resume from; use the run's last.pt"),
        (["--export-weights", str(run / "w.pt")], "expected a file *.safetensors"),
        (["--export-weights", str(tmp_path / "no/w.safetensors")], "expected a file in a folder that exists"),
        (["--export-weights", str(tmp_path / "w.safetensors"), "--dry-run"], "leave out --dry-run"),
    ):
        assert train_main([*command[:4], *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_a_report_of_the_best_network_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, epochs = replace(CONFIG.data, synthetic_images=40), replace(CONFIG.train, epochs=1)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(replace(CONFIG, data=data, train=epochs).to_dict()))
    command = ["--config", str(path), "--output", str(tmp_path / "run"), "--report"]
    assert train_main(command) == 0
    report = json.loads((tmp_path / "run/report/report.json").read_text())
    best = tmp_path / "run/best.pt"
    assert report["sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    (line,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert report["scores"]["top1"] == line["test_top1"]
    # One more epoch: the report of the first is replaced, unless something else lies beside it.
    again = [*command, "--resume=auto", "--train.epochs=2"]
    assert train_main(again) == 0
    assert json.loads((tmp_path / "run/report/report.json").read_text())["config"]["train"]["epochs"] == 2
    (tmp_path / "run/report/mine").write_text("")
    capsys.readouterr()
    assert train_main(again) == 2
    assert "holds something else than a report" in capsys.readouterr().err
    assert train_main([*command, "--dry-run"]) == 2
    assert "leave out --dry-run" in capsys.readouterr().err
