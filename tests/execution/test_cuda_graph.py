"""Replayed calls, on the CPU with a recording in the graph's place, and on a GPU with CUDA graphs."""

import gc
import logging
import multiprocessing
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.hooks import RemovableHandle

from deferred import Deferred
from gac import create_model
from gac.analysis.firing import FiringRates
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError
from gac.execution.cuda_graph import (
    WARM_UP_CALLS,
    CaptureFailed,
    CaptureOnDevice,
    Graphs,
    Replayed,
    check_capturable,
    select_graphs,
)
from gac.execution.distributed import SINGLE_PROCESS, Ranks
from gac.neuron import LIFNode
from gac.training import engine, optim, self_check
from gac.training import step as step_module
from gac.training.engine import Trainer, train
from gac.training.run_folder import read_metrics
from gac.training.setup import choose_graphs
from gac.training.signals import Interrupted
from recorded_graph import CaptureByRecording
from run_results import assert_same, result_of, stop_at

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def test_replays_begin_after_the_warm_up_and_see_new_values() -> None:
    capture, addresses = CaptureByRecording(), []

    def double(x: torch.Tensor) -> torch.Tensor:
        addresses.append(x.data_ptr())
        return 2 * x

    replayed = Replayed(double, capture)
    inputs = [torch.full((3,), float(i)) for i in range(WARM_UP_CALLS + 3)]
    assert [replayed(x)[0].item() for x in inputs] == [2.0 * i for i in range(WARM_UP_CALLS + 3)]
    assert (capture.captured, capture.replays) == (1, 3)
    # The function itself was called for the warm-up and for the capture, each time with the same inputs of its own.
    assert len(addresses) == WARM_UP_CALLS + 1
    assert len({*addresses}) == 1
    assert addresses[0] not in [x.data_ptr() for x in inputs]


def test_every_size_layout_and_dtype_has_a_graph_of_its_own() -> None:
    capture = CaptureByRecording()
    replayed = Replayed(lambda x, y: x.double() + y, capture)
    x = torch.randn(2, 3, 4, 4)
    variants = [(x, x), (x[:1], x[:1]), (x.to(memory_format=torch.channels_last), x), (x, x.double())]
    for _ in range(WARM_UP_CALLS + 2):
        for a, b in variants:
            assert torch.equal(replayed(a, b), a.double() + b)
    assert capture.captured == len(variants)


def _train(device: torch.device, capture: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    network(torch.zeros(2, 3, 8, 8))
    network.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=device.type == "cuda")
    loss_sum = torch.zeros((), device=device)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        loss_sum.add_(loss.detach())

    run = step if capture is None else Replayed(step, capture)
    generator = torch.Generator().manual_seed(1)
    for i in range(24):
        size = 3 if i % 6 == 5 else 4  # the last batch of an epoch is smaller
        images = torch.randn(size, 3, 8, 8, generator=generator).to(device)
        run(images, torch.randint(5, (size,), generator=generator).to(device))
    return [loss_sum, *network.state_dict().values()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_by_replays_is_training(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(device)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    capture = CaptureByRecording() if device == CPU else CaptureOnDevice(device)
    for replayed, plain in zip(_train(device, capture), _train(device, None), strict=True):
        tolerance = 0 if device == CPU else 1e-5
        torch.testing.assert_close(replayed, plain, rtol=tolerance, atol=tolerance)


def _read_on_the_host(device: torch.device, capture: Any) -> None:
    replayed = Replayed(lambda x: x.sum().item(), capture)
    x = torch.ones(3, device=device)
    for _ in range(WARM_UP_CALLS):
        assert replayed(x) == 3.0
    stream = torch.cuda.current_stream(device) if device != CPU else None
    with pytest.raises(CaptureFailed, match=r"Error in a capture: .*captur"):
        replayed(x)
    if device != CPU:
        # The process goes on as if nothing had been tried.
        assert torch.cuda.current_stream(device) == stream
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.rand(1000, device=device).sum().item() > 0
        graphs = Graphs(lambda: CaptureOnDevice(device))
        double = graphs.replaying(lambda x: 2 * x)
        for i in range(WARM_UP_CALLS + 3):
            assert double(x + i).sum().item() == 6 * (1 + i)
        assert graphs.in_use


def test_reading_a_value_on_the_host_cannot_be_captured() -> None:
    _read_on_the_host(CPU, CaptureByRecording())


@pytest.mark.gpu
def test_reading_a_value_on_the_host_cannot_be_captured_on_a_gpu() -> None:
    # In a process of its own, as nobody has seen yet what a capture that failed leaves behind.
    device = torch.device("cuda", 0)
    process = multiprocessing.get_context("spawn").Process(
        target=_read_on_the_host, args=(device, CaptureOnDevice(device))
    )
    process.start()
    process.join()
    assert process.exitcode == 0


class Refusing(CaptureByRecording):
    """Fails at every capture with this error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.captured += 1
        raise self.error


class Numbered(RuntimeError):
    """As torch's and CuPy's errors for CUDA, which have its number."""

    def __init__(self, **number: int) -> None:
        super().__init__("CUDA error: out of memory\nCUDA kernel errors might be reported later")
        self.__dict__.update(number)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), Numbered(error_code=2), Numbered(status=2)]
)
def test_running_out_of_memory_in_a_capture_is_raised_where_graphs_are_demanded(error: Exception) -> None:
    call = Graphs(lambda: Refusing(error), demanded=True).replaying(lambda x: 2 * x)
    for _ in range(WARM_UP_CALLS):
        call(torch.ones(1))
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA .*out of memory while .* auto or false does"):
        call(torch.ones(1))


def test_after_running_out_of_memory_in_a_capture_no_graph_keeps_any(caplog: pytest.LogCaptureFixture) -> None:
    recording = CaptureByRecording()
    graphs = Graphs(lambda: recording)
    kept: list[weakref.ref] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        found = 2 * x
        kept.append(weakref.ref(found))
        return found

    def too_large(x: torch.Tensor) -> torch.Tensor:
        # It has room in the memory that graphs no longer have.
        if any(reference() is not None for reference in kept):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 3 * x

    replayed, larger = graphs.replaying(double), graphs.replaying(too_large)
    x = torch.ones(1)
    for _ in range(WARM_UP_CALLS):
        larger(x)
    for _ in range(WARM_UP_CALLS + 2):
        assert replayed(x).item() == 2
    assert recording.captured == 1
    recording._recordings.clear()
    assert larger(x).item() == 3
    (record,) = caplog.records
    assert record.getMessage() == (
        "CUDA graphs are not used, every step is launched by the host: CUDA out of memory while a CUDA graph was"
        " captured"
    )
    assert (replayed(x).item(), graphs.in_use) == (2, False)


def test_a_call_that_is_out_of_memory_raises_with_graphs_too() -> None:
    def too_large(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    # As it is called for the warm-up, and again after a capture of it has failed.
    for warm_up in (WARM_UP_CALLS, 0):
        graphs = Graphs(CaptureByRecording)
        calls = iter([lambda x: x] * (WARM_UP_CALLS - warm_up) + [too_large] * 2)
        call = graphs.replaying(lambda x: next(calls)(x))  # noqa: B023
        for _ in range(WARM_UP_CALLS - warm_up):
            call(torch.ones(1))
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            call(torch.ones(1))
        assert graphs.in_use is (warm_up > 0)


def test_after_a_capture_that_failed_everything_is_called(caplog: pytest.LogCaptureFixture) -> None:
    capture = Refusing(Numbered(error_code=900))
    graphs = Graphs(lambda: capture)
    undone: list[str] = []
    double = graphs.replaying(lambda x: 2 * x, undo=lambda: undone.append("double"))
    triple = graphs.replaying(lambda x: 3 * x)
    with caplog.at_level(logging.INFO):
        for i in range(WARM_UP_CALLS + 3):
            x = torch.full((2,), float(i))
            assert torch.equal(double(x), 2 * x)
            assert torch.equal(triple(x), 3 * x)
    assert (capture.captured, undone, graphs.in_use) == (1, ["double"], False)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("launched by the host: Numbered in a capture: CUDA error: out of memory")


def test_what_was_captured_is_not_replayed_after_another_capture_failed() -> None:
    recording = CaptureByRecording()
    graphs = Graphs(lambda: recording)
    double, triple = graphs.replaying(lambda x: 2 * x), graphs.replaying(lambda x: x * x.sum().item())
    x = torch.ones(1)
    for _ in range(WARM_UP_CALLS + 1):
        double(x)
        assert graphs.in_use
    for _ in range(WARM_UP_CALLS + 1):
        assert triple(x) == 1
    assert not graphs.in_use
    before = recording.replays
    assert (double(3 * x).item(), triple(3 * x).item()) == (6, 9)
    assert recording.replays == before


class FakeCuda:
    """Stands for the parts of torch.cuda that a capture uses, and notes in which stream functions run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends_well: bool) -> None:
        self.current = default = SimpleNamespace(device_index=0, wait_stream=lambda other: None)
        self.made: list[Any] = []
        self.ended: list[Any] = []
        self.pools: list[Any] = []
        self.synchronized = 0
        self.random_states: list[Any] = []
        generator = SimpleNamespace(clone_state=lambda: "a copy", graphsafe_set_state=self.random_states.append)

        def new_stream(device: torch.device) -> Any:
            self.made.append(SimpleNamespace(device_index=0, wait_stream=lambda other: None))
            return self.made[-1]

        @contextmanager
        def stream(wanted: Any) -> Iterator[None]:
            before, self.current = self.current, wanted
            try:
                yield
            finally:
                self.current = before

        @contextmanager
        def graph(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            self.pools.append(pool)
            self.current = stream
            try:
                yield
            finally:
                if not ends_well:
                    raise RuntimeError("operation failed due to a previous error during capture")

        def synchronize(device: torch.device) -> None:
            self.synchronized += 1

        for name, value in {
            "Stream": new_stream, "stream": stream, "graph": graph, "synchronize": synchronize,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "device": lambda device: nullcontext(),
            "current_stream": lambda device=None: self.current, "graph_pool_handle": object,
            "default_generators": (generator,),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: self.ended.append(pool), raising=False)
        self.default = default
        default.record_event = object


def test_warm_ups_and_captures_share_a_stream_and_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, seen = FakeCuda(monkeypatch, ends_well=True), []
    capture = CaptureOnDevice(torch.device("cuda", 0))

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append((cuda.current, gc.isenabled()))
        return x

    for replayed in (Replayed(function, capture), Replayed(function, capture)):
        for _ in range(WARM_UP_CALLS + 2):
            replayed(torch.ones(1))
            assert cuda.current is cuda.default
    (stream,) = cuda.made
    assert stream is not cuda.default
    # No garbage is collected in a capture, where it could destroy a graph.
    assert seen == ([(stream, True)] * WARM_UP_CALLS + [(stream, False)]) * 2
    assert len(cuda.pools) == 2
    assert cuda.pools[0] is cuda.pools[1]
    assert gc.isenabled()


def test_a_capture_that_fails_leaves_torch_as_it_was_and_names_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, ends_well=False)
    replayed = Replayed(lambda x: x + {}["missing"], CaptureOnDevice(torch.device("cuda", 0)))
    for _ in range(WARM_UP_CALLS):
        with pytest.raises(KeyError):
            replayed(torch.ones(1))
    with pytest.raises(CaptureFailed, match="KeyError in a capture: 'missing'"):
        replayed(torch.ones(1))
    assert cuda.current is cuda.default
    assert (cuda.ended, cuda.synchronized, cuda.random_states) == ([(0, cuda.pools[0])], 1, ["a copy"])
    assert gc.isenabled()

    replayed = Replayed(lambda x: x, CaptureOnDevice(torch.device("cuda", 0)))
    for _ in range(WARM_UP_CALLS):
        replayed(torch.ones(1))
    with pytest.raises(CaptureFailed, match="RuntimeError in a capture: operation failed due to a previous error"):
        replayed(torch.ones(1))


def test_only_a_gpu_that_is_asked_to_replays() -> None:
    cuda = torch.device("cuda", 0)
    assert isinstance(select_graphs(True, cuda)._capture, CaptureOnDevice)
    assert select_graphs(False, cuda) is None
    assert select_graphs(True, CPU) is None


def test_auto_replays_where_that_is_possible(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cuda, auto = torch.device("cuda", 0), Config()
    assert auto.train.cuda_graph == "auto"
    network, teacher = (create_model("gac_msresnet18_cifar", 3, 2, width=4, depth=[1, 1, 1]) for _ in range(2))
    modules = (*network.modules(), *teacher.modules())
    backends = dict.fromkeys((each for each in modules if isinstance(each, LIFNode)), "cupy")
    monkeypatch.setattr(LIFNode, "chosen_backend", lambda neuron, x: backends[neuron])
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device: empty(*sizes))
    assert choose_graphs(auto, cuda, SINGLE_PROCESS, network) is not None
    assert choose_graphs(auto, CPU, SINGLE_PROCESS, network) is None
    assert choose_graphs(auto, cuda, Ranks(0, 2), network) is None
    for coding in ("rate", "latency", "phase"):
        config = replace(auto, model=replace(auto.model, coding=coding))
        assert choose_graphs(config, cuda, SINGLE_PROCESS, network) is None
    assert choose_graphs(auto, cuda, SINGLE_PROCESS, network, teacher) is not None
    backends[teacher.lif] = "torch"
    assert choose_graphs(auto, cuda, SINGLE_PROCESS, network, teacher) is None
    backends[network.lif] = "torch"
    assert choose_graphs(auto, cuda, SINGLE_PROCESS, network) is None
    # Where it does not apply nobody has to be told.
    assert not caplog.records
    for demanded in (True, False):
        assert (choose_graphs(graph(auto, demanded), cuda, SINGLE_PROCESS, network) is not None) is demanded


def test_what_a_teacher_runs_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(engine, "choose_graphs", lambda config, device, ranks, *networks: asked.append(networks))
    train(replace(RUN, train=replace(RUN.train, epochs=1)), tmp_path / "teacher")
    learning = replace(RUN.train, epochs=1, teacher=str(tmp_path / "teacher" / "best.pt"))
    train(replace(RUN, train=learning), tmp_path / "run")
    assert [len(networks) for networks in asked] == [1, 2]
    assert not any(parameter.requires_grad for parameter in asked[1][1].parameters())


# 4 steps and 6 batches of the test set an epoch, the last of them smaller; enough epochs to replay those too.
RUN = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=64, synthetic_classes=3, crop_padding=1),
    # All layers spike, from the second epoch on.
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1], neuron="imagenet", temporal_init="alive"),
    train=TrainConfig(epochs=4, batch_size=18, eval_batch_size=3, learning_rate=0.2, cutmix="off", ema_decay=0.8),
    device="cpu",
)
EVERYTHING = replace(
    RUN.train,
    epochs=3,
    cutmix="batch",
    mixup_alpha=0.4,
    loss="tet",
    nesterov=True,
    schedule_step="batch",
    warmup_epochs=1.5,
    gradient_clip_norm=0.5,
    accumulate_steps=2,
    checkpoint_activations=True,
)


class Captures:
    """Makes stand-ins for captures: those of ``runs`` and, for the trial before each, those of ``trials``."""

    def __init__(self) -> None:
        self.kind: Callable[[], CaptureByRecording] = CaptureByRecording
        self.trial: Callable[[], CaptureByRecording] = CaptureByRecording
        self.runs: list[CaptureByRecording] = []
        self.trials: list[CaptureByRecording] = []

    def graphs(self, config: Config, *_: Any) -> Graphs | None:
        if config.train.cuda_graph is False:
            return None
        graphs = Graphs(self.make_for_run, demanded=config.train.cuda_graph is True)
        graphs.make = self.make_for_trial
        return graphs

    def make_for_run(self) -> CaptureByRecording:
        self.runs.append(self.kind())
        return self.runs[-1]

    def make_for_trial(self) -> CaptureByRecording:
        self.trials.append(self.trial())
        return self.trials[-1]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Capture by recording on the CPU as on CUDA; all runs use the optimiser of the GPU."""

    def on_device(make: Any) -> Any:
        def made(*arguments: Any) -> torch.optim.SGD | None:
            result = make(*arguments)
            optimizer = result if result is not None else arguments[0]
            for group in optimizer.param_groups:
                group["fused"] = True
                # A graph reads the tensor that was there when it was captured.
                group["lr"] = torch.as_tensor(group["lr"])
            return result

        return made

    captures = Captures()
    monkeypatch.setattr(engine, "choose_graphs", captures.graphs)
    for module in (engine, self_check):
        monkeypatch.setattr(module, "make_optimizer", on_device(optim.make_optimizer))
        monkeypatch.setattr(module, "load_optimizer", on_device(optim.load_optimizer))
    # Two batches of the test set are watched.
    monkeypatch.setattr(FiringRates, "IMAGES", 4)
    return captures


def graph(config: Config, cuda_graph: bool | str) -> Config:
    return replace(config, train=replace(config.train, cuda_graph=cuda_graph))


def outcome_of(folder: Path) -> Any:
    """Return the results of a run without whether steps were replayed."""
    payload, lines = result_of(folder)
    for line in (*lines, *payload["training"]["history"], payload["metrics"]):
        line.pop("cuda_graph")
    return payload, lines


def firing_rates(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder)).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("firing_rate/")]
    return {name: [scalar.value for scalar in events.Scalars(name)] for name in names}


def test_a_replayed_run_is_the_run(captures: Captures, tmp_path: Path) -> None:
    # What records operations sees those of the modules, which in bfloat16 round more than the C kernels.
    config = replace(RUN, train=replace(RUN.train, amp="bf16"), model=replace(RUN.model, backend="torch"))
    train(graph(config, False), tmp_path / "plain")
    assert not captures.runs
    train(graph(config, "auto"), tmp_path / "replayed")
    # Of the step, of the evaluation and of that of the averaged weights: one for each size.
    (capture,) = captures.runs
    assert capture.captured == 6
    epochs = config.train.epochs
    assert capture.replays == epochs * (3 + (5 - 2) + 5) - 3 * WARM_UP_CALLS + 3 * (epochs - WARM_UP_CALLS)
    # Training and evaluation, each captured with one batch and compared on two others.
    assert [(trial.captured, trial.replays) for trial in captures.trials] == [(1, 3)] * 2
    assert_same(outcome_of(tmp_path / "replayed"), outcome_of(tmp_path / "plain"))
    for name, used in (("plain", False), ("replayed", True)):
        assert [line["cuda_graph"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] == [used] * epochs
    rates = firing_rates(tmp_path / "plain")
    assert firing_rates(tmp_path / "replayed") == rates
    assert [len(values) for values in rates.values()] == [epochs] * 8
    assert all(0 < rate < 1 for values in rates.values() for rate in values[1:])


def test_a_replayed_run_that_was_stopped_ends_as_the_run(captures: Captures, tmp_path: Path) -> None:
    config = replace(RUN, train=EVERYTHING, model=replace(RUN.model, backend="torch"))
    train(graph(config, False), tmp_path / "plain")
    with pytest.raises(Interrupted):
        train(graph(config, True), tmp_path / "replayed", after_step=stop_at(7))
    train(graph(config, "auto"), tmp_path / "replayed", resume="auto")
    assert all(capture.replays > 0 for capture in captures.runs)
    assert len(captures.runs) == 2
    # Each time training with labels and with the targets of CutMix, and evaluation.
    assert [trial.replays for trial in captures.trials] == [3] * 6
    assert_same(outcome_of(tmp_path / "replayed"), outcome_of(tmp_path / "plain"))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "CUDA graphs" in each.getMessage() and each.levelno > 20]


def test_a_run_whose_captures_fail_is_the_plain_run(
    captures: Captures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(RUN, model=replace(RUN.model, backend="torch"), train=replace(RUN.train, epochs=2))
    train(graph(config, False), tmp_path / "plain")
    captures.kind = lambda: Refusing(RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    train(graph(config, True), tmp_path / "failing")
    assert_same(outcome_of(tmp_path / "failing"), outcome_of(tmp_path / "plain"))
    (warning,) = warnings_of(caplog)
    assert warning.endswith("RuntimeError in a capture: CUDA error: operation not permitted when stream is capturing")
    assert [line["cuda_graph"] for line in read_metrics(tmp_path / "failing" / "metrics.jsonl")] == [False, False]

    # And if that shows in the trial, nothing is captured in the run.
    captures.kind, captures.trial = CaptureByRecording, captures.kind
    caplog.clear()
    train(graph(config, "auto"), tmp_path / "not tried")
    assert_same(outcome_of(tmp_path / "not tried"), outcome_of(tmp_path / "plain"))
    assert len(warnings_of(caplog)) == 1
    assert captures.runs[-1].captured == 0


def test_a_run_that_is_out_of_memory_says_so(
    captures: Captures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(RUN, model=replace(RUN.model, backend="torch"), train=replace(RUN.train, epochs=2))
    captures.kind = lambda: Refusing(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError, match="auto or false does without"):
        train(graph(config, True), tmp_path / "run")
    captures.kind, captures.trial = CaptureByRecording, captures.kind
    with pytest.raises(InputError, match=r"^train\.cuda_graph true: cpu has no memory .*batch_size 18: choose"):
        train(graph(config, True), tmp_path / "true")
    assert not (tmp_path / "true").exists()
    assert not warnings_of(caplog)
    train(graph(config, "auto"), tmp_path / "auto")
    (warning,) = warnings_of(caplog)
    assert warning.endswith("cpu has no memory to try graphs on a copy of the network")


def test_a_run_by_default_goes_on_after_a_capture_that_is_out_of_memory(
    captures: Captures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The trial has enough memory, and so has each step.
    config = replace(RUN, model=replace(RUN.model, backend="torch"), train=replace(RUN.train, epochs=2))
    captures.kind = lambda: Refusing(torch.OutOfMemoryError("CUDA out of memory"))
    train(graph(config, "auto"), tmp_path / "auto")
    (warning,) = warnings_of(caplog)
    assert warning.endswith("by the host: CUDA out of memory while a CUDA graph was captured")
    assert captures.runs[0].captured == 1
    assert [line["cuda_graph"] for line in read_metrics(tmp_path / "auto" / "metrics.jsonl")] == [False, False]


def hook_a_module(trainer: Trainer, hook: Callable[..., None]) -> RemovableHandle:
    return trainer.network.head.register_full_backward_hook(hook)


def hook_a_parameter(trainer: Trainer, hook: Callable[..., None]) -> RemovableHandle:
    return trainer.network.head.weight.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("register", [hook_a_module, hook_a_parameter])
def test_steps_that_hooks_watch_are_not_replayed(
    register: Any, captures: Captures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(RUN, model=replace(RUN.model, backend="torch"), train=replace(RUN.train, epochs=3, ema_decay=0.0))
    called, replays, handles = [], [], []

    def watch(trainer: Trainer) -> None:
        replays.append(captures.runs[-1].replays)
        # The fifth step would be the second that is replayed.
        if trainer.position.step == 5:
            handles.append(register(trainer, lambda *arguments: called.append(trainer.position.step + 1)))
        if trainer.position.step == 10:
            handles.pop().remove()

    train(graph(config, "auto"), tmp_path / "watched", after_step=watch)
    assert called == [6, 7, 8, 9, 10]
    # The tenth step was called, the eleventh replayed.
    assert (replays[9] - replays[8], replays[10] - replays[9]) == (0, 1)
    (warning,) = warnings_of(caplog)
    assert warning == "CUDA graphs are not used while a training step has hooks, which no replay would call"
    lines = read_metrics(tmp_path / "watched" / "metrics.jsonl")
    assert [line["cuda_graph"] for line in lines] == [True, False, True]
    train(graph(config, False), tmp_path / "plain")
    assert_same(outcome_of(tmp_path / "watched"), outcome_of(tmp_path / "plain"))


def test_that_nothing_overlaps_is_said_once_with_a_trial(
    captures: Captures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_module, "select_executor", lambda wanted, device: Deferred() if wanted else None)
    learning = replace(RUN.train, epochs=1, cutmix="batch", overlap_weight_gradients=True)
    train(replace(RUN, model=replace(RUN.model, backend="torch"), train=learning), tmp_path / "run")
    # With labels, with CutMix's targets and in evaluation.
    assert len(captures.trials) == 3
    assert len([record for record in caplog.records if "overlap_weight_gradients is left off" in record.message]) == 1


@pytest.mark.parametrize("coding", ["rate", "latency", "phase"])
def test_codings_that_read_on_the_host_are_refused(coding: str, tmp_path: Path) -> None:
    config = graph(replace(RUN, model=replace(RUN.model, coding=coding)), True)
    with pytest.raises(InputError, match=f"train.cuda_graph cannot replay {coding} coding, .* set it to auto or false"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("coding", [None, "gac", "direct"])
def test_other_codings_can_be_replayed(coding: str | None) -> None:
    check_capturable(ModelConfig(coding=coding))


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
@pytest.mark.parametrize("options", [{}, {"cutmix": "batch", "optimizer": "adamw", "learning_rate": 1e-3}], ids=str)
def test_a_whole_run_on_a_gpu_replays_by_default(
    amp: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(RUN, device="cuda", train=replace(RUN.train, epochs=5, amp=amp, **options))
    losses = {}
    for cuda_graph in (False, "auto"):
        train(graph(config, cuda_graph), tmp_path / str(cuda_graph))
        lines = read_metrics(tmp_path / str(cuda_graph) / "metrics.jsonl")
        assert [line["cuda_graph"] for line in lines] == [cuda_graph == "auto"] * 5, warnings_of(caplog)
        losses[cuda_graph] = [line["train_loss"] for line in lines]
    assert not warnings_of(caplog)
    # Only rounding differs, but one spike more or less changes all that follow.
    assert losses["auto"] == pytest.approx(losses[False], rel=0.05)


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_after_a_capture_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read(trainer: Trainer) -> None:
        # From here on the step reads a number on the host, which nothing can capture.
        if trainer.position.step == 1:
            network = trainer.step._parallel
            trainer.step._parallel = lambda images: network(images * (images.sum().item() * 0 + 1))

    config = replace(RUN, device="cuda", train=replace(RUN.train, epochs=3, amp="fp16"))
    train(graph(config, "auto"), tmp_path / "run", after_step=read)
    (warning,) = warnings_of(caplog)
    assert "captur" in warning
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # The first epoch only warms up.
    assert [line["cuda_graph"] for line in lines] == [True, False, False]
