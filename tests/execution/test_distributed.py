"""Several processes, started by a real torchrun, against a single one. Collectives go through Gloo, on the CPU."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.run
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from execution import several_ranks
from execution.several_ranks import ACCUMULATING, BATCHES, PLAIN, RESTARTED, SYNCHRONIZED, folder_config
from gac.checkpoint import read_checkpoint
from gac.cli import parse_eval, parse_train
from gac.config import Config
from gac.data import build_data
from gac.data.interface import Shard
from gac.errors import InputError
from gac.evaluation.report import evaluate_checkpoint
from gac.execution import distributed
from gac.execution.device import select_device
from gac.execution.distributed import (
    SINGLE_PROCESS,
    LostConnection,
    Ranks,
    collective,
    is_lost_connection,
    process_group,
)
from gac.training.engine import train
from gac.training.run_folder import read_metrics
from gac.training.signals import Interrupted
from gac.training.totals import over_ranks
from image_tree import CLASSES, write_split
from run_results import assert_same, result_of, stop_at, without_times

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str, max_restarts: int = 0) -> list[str]:
    """Return the command that starts a program in two processes."""
    options = ["--standalone", "--nproc_per_node", "2", "--max-restarts", str(max_restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *options, *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def write_npz(path: Path, images: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(images) % 3
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)


@pytest.fixture(scope="module")
def fused(request: pytest.FixtureRequest) -> tuple[Path, tuple[torch.Tensor, list, list]] | None:
    """The folder of the compiled kernels, and a fused step of one process; None without a compiler."""
    if shutil.which("g++") is None:
        return None
    folder = request.getfixturevalue("compiled_kernels")._folder
    return folder, several_ranks.fused_step(several_ranks.kernels_on_cpu(folder), slice(0, 4), synchronized=False)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, fused) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that several_ranks.py wrote to, and the results of both ranks."""
    folder = tmp_path_factory.mktemp("two")
    write_split(folder / "images" / "train", images=100, damaged=("truncated.JPEG",))
    write_split(folder / "images" / "val", images=100, damaged=("zero_bytes.JPEG",))
    for split, other in (("train", "val"), ("val", "train")):
        broken = folder / f"broken {split}"
        write_split(broken / split, images=100, damaged=("zero_bytes.JPEG",))
        # The last image is rank 1's, in training as in evaluation, and this one is rank 0's.
        sorted((broken / split / CLASSES[0]).iterdir())[3].write_bytes(b"")
        (broken / other).symlink_to(folder / "images" / other)
    for rank, images in enumerate((16, 8)):
        write_npz(folder / f"of_rank_{rank}.npz", images)
    with pytest.raises(Interrupted):
        train(SYNCHRONIZED, folder / "one_then_two", after_step=stop_at(BATCHES + 1))
    command = torchrun(several_ranks.__file__, str(folder), *([] if fused is None else [str(fused[0])]))
    process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that a run of two with synchronised BatchNorm must equal."""
    folder = tmp_path_factory.mktemp("one") / "synchronized"
    train(SYNCHRONIZED, folder)
    # The outputs must depend on the images, or the comparisons say nothing.
    rates = EventAccumulator(str(folder)).Reload().Scalars("firing_rate/lif")
    assert rates[-1].value > 0.01
    return folder


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], but: str = "$^") -> None:
    """Compare state dicts within float32's tolerance, leaving out the names that contain a match of ``but``."""
    assert found.keys() == expected.keys()
    for name in expected:
        if not re.search(but, name):
            torch.testing.assert_close(
                found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def assert_metrics_close(found: Path, expected: Path, but: str = "$^") -> None:
    lines, others = (read_metrics(folder / "metrics.jsonl") for folder in (found, expected))
    assert len(lines) == len(others) > 0
    for line, other in zip(map(without_times, lines), map(without_times, others), strict=True):
        assert line.keys() == other.keys()
        assert line.pop("backend") == other.pop("backend") == "torch"
        for name in line:
            if not re.search(but, name):
                assert line[name] == pytest.approx(other[name], rel=1e-4), name


def test_two_processes_with_synchronised_batch_norm_are_one(launched, single: Path) -> None:
    two = launched[0] / "synchronized"
    assert_metrics_close(two, single)
    found, expected = (read_checkpoint(folder / "last.pt") for folder in (two, single))
    assert_close(found["model"], expected["model"])
    assert_close(found["training"]["average"]["model"], expected["training"]["average"]["model"])
    assert torch.equal(found["training"]["random_state"]["torch"], expected["training"]["random_state"]["torch"])
    assert {path.name.split(".")[0] for path in two.iterdir()} == {path.name.split(".")[0] for path in single.iterdir()}
    # Far from what each rank's own statistics give: the comparison could fail.
    other = read_checkpoint(launched[0] / "plain" / "last.pt")["model"]
    assert (other["stages.0.0.conv1.conv.weight"] - found["model"]["stages.0.0.conv1.conv.weight"]).abs().max() > 1e-3


def test_without_synchronisation_each_rank_is_a_micro_batch(launched, tmp_path: Path) -> None:
    # Both take BatchNorm's statistics over the same halves. The running ones are only those of rank 0's halves.
    train(replace(PLAIN, train=replace(PLAIN.train, accumulate_steps=2)), tmp_path)
    found, expected = (read_checkpoint(folder / "last.pt") for folder in (launched[0] / "plain", tmp_path))
    assert_close(found["model"], expected["model"], but="running|tracked")
    assert_metrics_close(launched[0] / "plain", tmp_path, but="test")
    assert found["model"]["stem.norm.num_batches_tracked"] == 2 * BATCHES
    assert expected["model"]["stem.norm.num_batches_tracked"] == 4 * BATCHES


def test_micro_batches_on_two_ranks_are_those_of_one(launched, tmp_path: Path) -> None:
    train(replace(ACCUMULATING, train=replace(ACCUMULATING.train, accumulate_steps=4)), tmp_path)
    found, expected = (read_checkpoint(folder / "last.pt") for folder in (launched[0] / "accumulating", tmp_path))
    assert_close(found["model"], expected["model"], but="running|tracked")
    assert_metrics_close(launched[0] / "accumulating", tmp_path, but="test")


def micro_batches(images: int, steps: int) -> torch.Tensor:
    """Return a batch in the order in which two ranks see it: all of their first micro-batches, then the second ones."""
    parts = [part.tensor_split(steps) for part in torch.arange(images).tensor_split(2)]
    return torch.cat([torch.cat(each) for each in zip(*parts, strict=True)])


@pytest.mark.parametrize("case", several_ranks.EXACT_CASES)
def test_steps_of_two_processes_are_those_of_one(launched, case: str) -> None:
    config = several_ranks.exact_config(case)
    steps = config.train.accumulate_steps
    if config.train.sync_batch_norm:
        expected = several_ranks.exact_steps(config, order=lambda images: micro_batches(images, steps))
        but = "$^"
    else:
        # Each rank's part is a micro-batch. The running statistics are only those of rank 0's images.
        apart = replace(config, train=replace(config.train, accumulate_steps=2 * steps))
        expected = several_ranks.exact_steps(apart)
        but = "running|tracked"
    parts = [results["exact"][case] for results in launched[1]]
    for number in range(2):
        for name, tensor in expected[number].items():
            if not re.search(but, name):
                assert torch.equal(parts[0][number][name], parts[1][number][name]), name
                # The loss is computed in float32.
                torch.testing.assert_close(parts[0][number][name], tensor, rtol=1e-5, atol=1e-7)
    found = over_ranks([totals for *_, totals in parts])
    assert found == pytest.approx(expected[2], rel=1e-5)
    assert found.images == sum(several_ranks.EXACT_BATCHES)


def test_the_options_of_these_steps_change_them() -> None:
    config = several_ranks.exact_config("all at once")
    network, average, totals = several_ranks.exact_steps(config)
    weight = "stages.1.0.conv1.conv.weight"
    assert (network[weight] - average[weight]).abs().max() > 1e-4
    for name in ("gradient_clip_norm", "label_smoothing", "mixup_alpha", "weight_decay"):
        changed = replace(config, train=replace(config.train, **{name: 0.0}))
        assert (several_ranks.exact_steps(changed)[0][weight] - network[weight]).abs().max() > 1e-3, name
    for name, value in (("loss", "mean"), ("cutmix", "off"), ("accumulate_steps", 2)):
        changed = replace(config, train=replace(config.train, **{name: value}))
        assert (several_ranks.exact_steps(changed)[0][weight] - network[weight]).abs().max() > 1e-3, name
    assert totals.healthy


@pytest.mark.parametrize("case", several_ranks.BATCH_NORM_CASES)
def test_synchronised_batch_norm(launched, case: str) -> None:
    shape, repeats = several_ranks.BATCH_NORM_CASES[case]
    norm = several_ranks.make_norm()
    whole = several_ranks.normalized(norm, several_ranks.frames(shape), repeats, slice(0, 8))
    parts = [results["batch_norm"][case] for results in launched[1]]
    for number, expected in enumerate(whole):
        mine, other = (part[number] for part in parts)
        if number < 2:  # outputs and gradients of the images
            images = [each.unflatten(0, (-1, size)) for each, size in ((mine, 3), (other, 5))]
            found = torch.cat(images, 1).flatten(0, 1)
        elif number < 4:  # gradients of the parameters
            found = mine + other
        else:
            assert torch.equal(mine, other)
            found = mine
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_synchronised_batch_norm_in_the_fused_network(launched, fused) -> None:
    if fused is None:
        pytest.skip("g++ is not installed; it compiles the CUDA kernels for the CPU")
    assert_parts_are_the_whole([results["fused"] for results in launched[1]], fused[1])


@pytest.mark.c_compiler
def test_synchronised_batch_norm_in_c(launched) -> None:
    whole = several_ranks.fused_step(several_ranks.kernels_in_c(), slice(0, 4), synchronized=False)
    assert_parts_are_the_whole([results["fused in c"] for results in launched[1]], whole)


def assert_parts_are_the_whole(parts: list[tuple], whole: tuple[torch.Tensor, list, list]) -> None:
    """Compare the fused steps of two ranks, each with its own images, with that of one process."""
    logits, gradients, statistics = whole
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), logits, rtol=0, atol=1e-6)
    for expected, mine, other in zip(gradients, parts[0][1], parts[1][1], strict=True):
        torch.testing.assert_close(mine + other, expected, rtol=0, atol=5e-5 * expected.abs().max().item())
    for expected, mine, other in zip(statistics, parts[0][2], parts[1][2], strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_the_parts_are_the_batches_of_one_process(launched) -> None:
    whole = build_data(SYNCHRONIZED.data, device="cpu", batch_size=16, eval_batch_size=3, seed=1)
    (train_0, test_0), (train_1, test_1) = (results["parts"] for results in launched[1])
    assert [len(labels) for _, labels in train_0] == [8, 8, 6]
    assert [len(labels) for _, labels in train_1] == [8, 8, 5]
    for batch, *parts in zip(whole.train.epoch(3), train_0, train_1, strict=True):
        assert_same([torch.cat(each) for each in zip(*parts, strict=True)], list(batch))
    test = list(whole.test.epoch(0))
    assert [len(test_0), len(test_1)] == [len(test), len(test) - 1]
    for batch, *parts in zip(test, test_0, [*test_1, (torch.empty(0, 3, 8, 8), torch.empty(0).long())], strict=True):
        assert_same([torch.cat(each) for each in zip(*parts, strict=True)], list(batch))


def test_evaluation_counts_every_image_once(launched) -> None:
    best = launched[0] / "synchronized" / "best.pt"
    expected = evaluate_checkpoint(best, read_checkpoint(best), SYNCHRONIZED).scores
    assert expected.images == 10
    for results in launched[1]:
        found = results["report"].scores
        assert found.loss == pytest.approx(expected.loss)
        assert replace(found, loss=0, images_per_second=0) == replace(expected, loss=0, images_per_second=0)
    assert launched[1][0]["report"].device == "2 x cpu"


@pytest.mark.parametrize("name", ["synchronized", "folder"])
def test_predictions_of_all_ranks_are_those_of_one_process(launched, name: str) -> None:
    folder, results = launched
    best = folder / name / "best.pt"
    # The last batch leaves rank 1 no image; one image of the folder cannot be read.
    config = SYNCHRONIZED if name == "synchronized" else folder_config(folder / "images")
    expected = evaluate_checkpoint(best, read_checkpoint(best), config)
    for result in results:
        found = result["report" if name == "synchronized" else "report of folder"]
        assert found.predictions.images == expected.predictions.images
        assert found.predictions.labels.tolist() == expected.predictions.labels.tolist()
        assert np.allclose(found.predictions.probabilities, expected.predictions.probabilities, rtol=1e-4)
        assert (found.classes, found.confusion) == (expected.classes, expected.confusion)
        assert sum(images for _, _, images in found.confusion) == found.scores.images
    assert len(expected.predictions.images) == (10 if name == "synchronized" else 99)


def test_images_that_cannot_be_read_are_counted_once(launched, tmp_path: Path) -> None:
    folder = launched[0]
    train(folder_config(folder / "images"), tmp_path)
    (line,) = read_metrics(folder / "folder" / "metrics.jsonl")
    assert (line["skipped_images"], line["test_skipped_images"]) == (1, 1)
    assert_metrics_close(folder / "folder", tmp_path)


@pytest.mark.parametrize(("split", "which"), [("train", "training"), ("val", "test")])
def test_each_rank_below_the_limit_and_all_above_it_end_the_run(launched, split: str, which: str) -> None:
    folder, (first, second) = launched
    assert first[f"broken {split}"] == (
        f"2 of the 100 {which} images cannot be read, more than 1 %: replace or delete those that the warnings name"
    )
    assert second[f"broken {split}"] == 2
    assert not list((folder / f"run of broken {split}").glob("*.pt"))


def test_ranks_mix_alike_and_their_noise_differs(launched) -> None:
    first, second = launched[1]
    assert torch.equal(first["generator"], second["generator"])
    assert not torch.equal(first["noise"], second["noise"])


def test_a_signal_to_one_rank_stops_all_at_the_same_step(launched) -> None:
    folder, results = launched
    assert [result["sigterm"] for result in results] == [143, 143]
    assert [result["sigint"] for result in results] == [130, 130]
    assert read_checkpoint(folder / "two_then_one" / "last.pt")["step"] == BATCHES + 2


def test_interrupted_and_resumed_it_ends_as_if_nothing_had_happened(launched) -> None:
    assert_same(result_of(launched[0] / "interrupted"), result_of(launched[0] / "plain"))


def test_interrupted_in_evaluation_it_ends_as_if_nothing_had_happened(launched) -> None:
    folder, results = launched
    assert [result["in evaluation"] for result in results] == [143, 143]
    position = results[0]["stopped in evaluation at"]
    assert (position["epoch"], position["batch"]) == (0, BATCHES)
    assert_same(result_of(folder / "in evaluation"), result_of(folder / "plain"))


def test_a_run_goes_on_with_another_number_of_processes(launched, single: Path) -> None:
    train(SYNCHRONIZED, launched[0] / "two_then_one", "auto")
    for name in ("one_then_two", "two_then_one"):
        assert_metrics_close(launched[0] / name, single)
        found, expected = (read_checkpoint(folder / "last.pt") for folder in (launched[0] / name, single))
        assert_close(found["model"], expected["model"])


def test_rank_0_decides_when_minutes_have_passed(launched) -> None:
    assert [result["saved"] for result in launched[1]] == [[2, 5, 6, 12]] * 2


def test_divergence_on_one_rank_ends_all_at_the_same_step(launched) -> None:
    first, second = (result["diverged"] for result in launched[1])
    assert first == second
    assert first.startswith("the loss is not finite at step 2 (epoch 1, batch 2 of 6")
    assert not list((launched[0] / "diverged").glob("*.pt"))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("small", r"2 processes cannot share a batch of 1 images, which train\.batch_size 8 leaves of 17: choose"),
        ("device", r"device cuda:0 is a single one, and there are 2 processes: use --device cuda"),
        ("name", r"unknown network 'resnet'"),
        ("graph", r"train\.cuda_graph replays the steps of one process, and there are 2: set it to auto or false"),
        ("folder", r"cannot resume .* \(train\.epochs 2 -> 1\)"),
        ("options", r"rank 1 has train\.seed 11 and rank 0 10: start all processes with the same options, on the same"),
        ("data", r"rank 1 has train_size 8 and rank 0 16: start"),
        ("on rank 1", r"rank 1: there is no folder$"),
    ],
)
def test_bad_input_is_reported_once(launched, case: str, message: str) -> None:
    folder, (first, second) = launched
    assert re.match(message, first[f"refused {case}"])
    assert "\n" not in first[f"refused {case}"]
    assert second[f"refused {case}"] == 2
    assert not (folder / "refused").exists()


# --- train.py under torchrun

LONG = replace(PLAIN, train=replace(PLAIN.train, epochs=200, eval_batch_size=20, checkpoint_steps=20))


class Run:
    """train.py under torchrun, its stderr in a file."""

    def __init__(self, config: Config, folder: Path, *options: str, max_restarts: int = 0) -> None:
        self.output = folder / "run"
        self._stderr = folder / "stderr"
        (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
        arguments = ["train.py", "--config", str(folder / "config.yaml"), "--output", str(self.output), *options]
        with self._stderr.open("w") as stderr:
            command = torchrun(*arguments, max_restarts=max_restarts)
            environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr)

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def epochs(self) -> int:
        path = self.output / "metrics.jsonl"
        return len(read_metrics(path)) if path.exists() else 0

    def wait_for(self, epoch: int) -> None:
        """Wait until more than ``epoch`` epochs are complete."""
        deadline = time.monotonic() + 120
        while self.epochs() <= epoch:
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.02)

    def rank(self, number: int) -> int:
        """Return the process id of a rank."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes()
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == self.process.pid and f"\0RANK={number}\0".encode() in b"\0" + environment:
                return int(path.name)
        raise AssertionError(self.stderr)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_job_with_a_killed_rank_restarts_and_ends_as_if_nothing_had_happened(launched, tmp_path: Path) -> None:
    run = Run(RESTARTED, tmp_path, "--resume", "auto", max_restarts=1)
    run.wait_for(1)
    os.kill(run.rank(1), signal.SIGKILL)
    assert run.process.wait(timeout=120) == 0, run.stderr
    assert run.stderr.count("starting afresh") == 1
    assert run.stderr.count(f"resuming {run.output}/last.pt after ") == 1
    assert_same(result_of(run.output), result_of(launched[0] / "never restarted"))
    best, expected = (read_checkpoint(folder / "best.pt") for folder in (run.output, launched[0] / "never restarted"))
    assert best["epoch"] == expected["epoch"]
    assert_same(best["model"], expected["model"])


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_fails_the_job_and_is_named(tmp_path: Path) -> None:
    run = Run(LONG, tmp_path)
    run.wait_for(0)
    os.kill(run.rank(1), signal.SIGKILL)
    assert run.process.wait(timeout=60) == 1
    report = run.stderr.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9", report), run.stderr
    metrics = [without_times(line) for line in read_metrics(run.output / "metrics.jsonl")]
    assert [line["epoch"] for line in metrics] == list(range(1, len(metrics) + 1))


def test_torchrun_that_is_told_to_stop_leaves_a_checkpoint(tmp_path: Path) -> None:
    run = Run(LONG, tmp_path)
    run.wait_for(0)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=60) != 0
    assert "stopped by SIGTERM after " in run.stderr
    epochs, batches = map(int, re.search(r"after (\d+) epochs and (\d+) batches", run.stderr).groups())
    assert read_checkpoint(run.output / "last.pt")["step"] == epochs * BATCHES + batches


# --- Without torchrun


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("Connection closed by peer"), LostConnection),
        (torch.distributed.DistBackendError("NCCL"), torch.distributed.DistBackendError),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError),
        (ValueError("shapes"), ValueError),
    ],
)
def test_what_a_collective_raises(raised: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected) as error, collective():
        raise raised
    assert type(error.value) is expected
    assert str(error.value) == str(raised)
    lost = expected in (LostConnection, torch.distributed.DistBackendError)
    assert is_lost_connection(error.value) == lost


def test_after_an_error_the_group_is_left_to_the_end_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: options["timeout"])
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    with process_group() as ranks:
        assert ranks == Ranks(1, 2, 1, launched=True, patient=distributed.PATIENCE)
    assert left == [True]
    with pytest.raises(ValueError, match="there is no step"), process_group():
        raise ValueError("there is no step")
    assert left == [True]


def test_ranks_wait_longer_while_one_works_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    for name in ("all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, lambda *values, group, **options: waited.append(group))
    ranks = Ranks(0, 2, patient="a day")
    ranks.together(lambda: None)
    ranks.on_main(lambda: None)
    assert waited == [None] * 2
    waited.clear()
    ranks.together(lambda: None, in_turn=True)
    ranks.on_main(lambda: None, patient=True)
    assert waited == ["a day"] * 4
    waited.clear()

    def fails() -> None:
        raise ValueError("no report")

    with pytest.raises(ValueError, match="no report"):
        ranks.on_main(fails, patient=True)
    assert waited == ["a day"]


def test_one_process_joins_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as ranks:
        assert ranks == SINGLE_PROCESS
        assert not torch.distributed.is_initialized()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with process_group() as ranks:
        assert ranks == Ranks(launched=True)
        assert not torch.distributed.is_initialized()


def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match=r"WORLD_SIZE is 4, but LOCAL_RANK missing .* torchrun"), process_group():
        pass


def test_restarts_that_could_not_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE")
    for name, value in zip(names, ("0", "2", "0", "1", "True"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's"), process_group():
        pass


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_has_its_own_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    # The second machine's second process.
    assert select_device(name, Ranks(3, 4, 1)) == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]
    with pytest.raises(InputError, match=r"no CUDA device for process 2 .* sees 2: lower .*--nproc_per_node"):
        select_device(name, Ranks(2, 4, 2))


@pytest.mark.parametrize("images", [0, 1, 7, 8, 13])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_shares_are_those_of_tensor_split(images: int, ranks: int) -> None:
    order = torch.arange(images)
    parts = [order[Shard(rank, ranks).of(images)] for rank in range(ranks)]
    assert_same(parts, list(order.tensor_split(ranks)))


def test_the_timeout_is_the_documented_one() -> None:
    minutes = distributed.TIMEOUT.total_seconds() / 60
    assert f"{minutes:.0f} minutes" in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_commands_of_the_guide_parse(monkeypatch: pytest.MonkeyPatch, single: Path) -> None:
    monkeypatch.chdir(ROOT)
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [
        shlex.split(line.removeprefix("srun ").removesuffix(" &"))
        for line in guide.splitlines()
        if line.startswith(("python ", "torchrun ", "srun torchrun "))
    ]
    scripts = []
    for program, *arguments in commands:
        script, *options = arguments
        if program == "torchrun":
            parsed = torch.distributed.run.get_args_parser().parse_args(arguments)
            script, options = parsed.training_script, parsed.training_script_args
        scripts.append(script)
        if script == "train.py":
            parse_train(options)
        else:
            assert options[0] == "--checkpoint"
            # The guide's run was trained on folders of images.
            kind = ["--data.name", "imagefolder"] if "--data.root" in options else []
            parse_eval(["--checkpoint", str(single / "best.pt"), *kind, *options[2:]])
    assert sorted(scripts) == [*["eval.py"] * 3, *["train.py"] * 12]
