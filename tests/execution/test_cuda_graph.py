"""Replayed calls, on the CPU with a recording in the graph's place, and on a GPU with CUDA graphs."""

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from gac.analysis.firing import FiringRates
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.errors import InputError
from gac.execution.cuda_graph import WARM_UP_CALLS, CaptureOnDevice, Replayed, check_capturable, select_capture
from gac.training import engine, optim
from gac.training.engine import train
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
    # The function itself was called for the warm-up and for the capture, which reads inputs of its own.
    assert addresses[:-1] == [x.data_ptr() for x in inputs[:WARM_UP_CALLS]]
    assert addresses[-1] not in [x.data_ptr() for x in inputs]


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
    with pytest.raises(RuntimeError, match="captur"):
        replayed(x)


def test_reading_a_value_on_the_host_cannot_be_captured() -> None:
    _read_on_the_host(CPU, CaptureByRecording())


@pytest.mark.gpu
def test_reading_a_value_on_the_host_cannot_be_captured_on_a_gpu() -> None:
    # In a process of its own: after a capture that failed, torch's current stream and allocator are left in it.
    device = torch.device("cuda", 0)
    process = multiprocessing.get_context("spawn").Process(
        target=_read_on_the_host, args=(device, CaptureOnDevice(device))
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def test_only_a_gpu_that_is_asked_to_replays() -> None:
    cuda = torch.device("cuda", 0)
    assert isinstance(select_capture(True, cuda), CaptureOnDevice)
    assert select_capture(False, cuda) is None
    assert select_capture(True, CPU) is None


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


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> CaptureByRecording:
    """Capture by recording in runs with train.cuda_graph; all runs use the optimiser of the GPU."""

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

    recording = CaptureByRecording()
    monkeypatch.setattr(engine, "select_capture", lambda wanted, device: recording if wanted else None)
    monkeypatch.setattr(engine, "make_optimizer", on_device(optim.make_optimizer))
    monkeypatch.setattr(engine, "load_optimizer", on_device(optim.load_optimizer))
    # Two batches of the test set are watched.
    monkeypatch.setattr(FiringRates, "IMAGES", 4)
    return recording


def replaying(config: Config) -> Config:
    return replace(config, train=replace(config.train, cuda_graph=True))


def firing_rates(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder)).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("firing_rate/")]
    return {name: [scalar.value for scalar in events.Scalars(name)] for name in names}


def test_a_replayed_run_is_the_run(capture: CaptureByRecording, tmp_path: Path) -> None:
    # What records operations sees those of the modules, which in bfloat16 round more than the C kernels.
    config = replace(RUN, train=replace(RUN.train, amp="bf16"), model=replace(RUN.model, backend="torch"))
    train(config, tmp_path / "plain")
    assert capture.captured == 0
    train(replaying(config), tmp_path / "replayed")
    # Of the step, of the evaluation and of that of the averaged weights: one for each size.
    assert capture.captured == 6
    epochs = config.train.epochs
    assert capture.replays == epochs * (3 + (5 - 2) + 5) - 3 * WARM_UP_CALLS + 3 * (epochs - WARM_UP_CALLS)
    assert_same(result_of(tmp_path / "replayed"), result_of(tmp_path / "plain"))
    rates = firing_rates(tmp_path / "plain")
    assert firing_rates(tmp_path / "replayed") == rates
    assert [len(values) for values in rates.values()] == [epochs] * 8
    assert all(0 < rate < 1 for values in rates.values() for rate in values[1:])


def test_a_replayed_run_that_was_stopped_ends_as_the_run(capture: CaptureByRecording, tmp_path: Path) -> None:
    config = replace(RUN, train=EVERYTHING, model=replace(RUN.model, backend="torch"))
    train(config, tmp_path / "plain")
    replays = []
    with pytest.raises(Interrupted):
        train(replaying(config), tmp_path / "replayed", after_step=stop_at(7))
    replays.append(capture.replays)
    train(replaying(config), tmp_path / "replayed", resume="auto")
    replays.append(capture.replays)
    assert 0 < replays[0] < replays[1]
    assert_same(result_of(tmp_path / "replayed"), result_of(tmp_path / "plain"))


@pytest.mark.parametrize("coding", ["rate", "latency", "phase"])
def test_codings_that_read_on_the_host_are_refused(coding: str, tmp_path: Path) -> None:
    config = replaying(replace(RUN, model=replace(RUN.model, coding=coding)))
    with pytest.raises(InputError, match=f"train.cuda_graph cannot replay {coding} coding, .* leave it off"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("coding", [None, "gac", "direct"])
def test_other_codings_can_be_replayed(coding: str | None) -> None:
    check_capturable(ModelConfig(coding=coding))
