"""Weight gradients beside the backward pass: those of autograd, to the bit.

Here an executor that defers all work until the join stands for the second stream (tests/deferred.py): nothing may be
needed before, and every buffer has to hold its values until then. Real streams are tested on a GPU.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deferred import Deferred
from gac.config import Config, DataConfig, ModelConfig, TrainConfig
from gac.execution.cuda_graph import CaptureOnDevice, Replayed
from gac.models import create_model, fused
from gac.models.recompute import recomputed
from gac.ops import overlap
from gac.ops.overlap import SecondStream, conv2d, is_overlapped, overlapped, select_executor
from gac.training import step as step_module
from gac.training.engine import train
from gac.training.optim import make_optimizer
from gac.training.step import TrainingStep
from recorded_graph import CaptureByRecording
from run_results import assert_same, result_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class Chain(nn.Module):
    """Convolutions with three weights, the second of which is used ``uses`` times, and a tanh between them."""

    def __init__(self, uses: int = 2) -> None:
        super().__init__()
        self.uses = uses
        torch.manual_seed(0)
        sizes = ((6, 3, 3, 3), (6, 6, 3, 3), (5, 6, 1, 1))
        self.weights = nn.ParameterList(torch.randn(size) / 3 for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.weights
        y = conv2d(x, first, stride=2, padding=1).tanh()
        for _ in range(self.uses):
            y = conv2d(y, second, padding=1).tanh()
        return conv2d(y, third, stride=(1, 1))


def images(seed: int = 1) -> Tensor:
    return torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(seed))


def gradients(
    net: nn.Module, executor: overlap.Executor | None, x: Tensor | None = None, amp: bool = False
) -> list[Tensor | None]:
    """Return the gradients of a backward pass, with its weight gradients by ``executor``."""
    net.zero_grad()
    x = images() if x is None else x
    with nullcontext() if executor is None else overlapped(net.parameters(), executor):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            loss = net(x).float().square().mean()
        loss.backward()
    return [parameter.grad for parameter in net.parameters()]


def equal(actual: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(a is not None and torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# --- Convolutions by themselves


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_autograd(order: torch.memory_format, amp: bool) -> None:
    # Of a weight that is used twice autocast would add the gradients in bfloat16, not in float32 as here.
    net, executor = Chain(uses=1 if amp else 2).to(memory_format=order), Deferred()
    x = images().contiguous(memory_format=order).requires_grad_()
    expected, of_x = gradients(net, None, x, amp), x.grad
    x.grad = None
    found = gradients(net, executor, x, amp)
    assert executor.joins == [2 + net.uses]
    assert equal([*found, x.grad], [*expected, of_x])
    for weight in net.parameters():
        # Fused optimisers take values in the order in which they lie in memory.
        assert weight.grad.is_contiguous(memory_format=order)
        assert not weight.grad.requires_grad


def test_gradients_are_added_to_those_that_are_there() -> None:
    net = Chain()
    expected = [2 * gradient for gradient in gradients(net, None)]
    with overlapped(net.parameters(), Deferred()):
        net(images()).square().mean().backward()
    assert equal([weight.grad for weight in net.parameters()], expected)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_weight_are_called(hook: str) -> None:
    net, executor, called = Chain(), Deferred(), []
    expected = gradients(net, None)
    handle = getattr(net.weights[1], hook)(lambda tensor: called.append(tensor.shape))
    assert equal(gradients(net, executor), expected)
    assert called == [(6, 6, 3, 3)]
    handle.remove()
    assert equal(gradients(net, executor), expected)
    assert executor.joins == [2, 4]


def test_a_frozen_weight_gets_no_gradient() -> None:
    net, executor = Chain(), Deferred()
    net.weights[1].requires_grad_(False)
    expected = gradients(net, None)
    found = gradients(net, executor)
    assert found[1] is None
    assert executor.joins == [2]
    assert equal(found[::2], expected[::2])


def test_who_asks_for_other_gradients_has_normal_autograd() -> None:
    net, executor = Chain(), Deferred()
    expected = gradients(net, None)
    with overlapped(net.parameters(), executor):
        with torch.no_grad():
            assert not is_overlapped(net.weights[0])
        assert is_overlapped(net.weights[0])
    # After it, and in another thread while it is open.
    assert equal(torch.autograd.grad(net(images()).square().mean(), [*net.parameters()]), expected)
    found = []
    with overlapped(net.parameters(), executor):
        thread = threading.Thread(target=lambda: found.append(is_overlapped(net.weights[0])))
        thread.start()
        thread.join()
    assert found == [False]
    # Within it nobody gets a gradient that is not there yet.
    with overlapped(net.parameters(), executor), pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(net(images()).square().mean(), [*net.parameters()])


def test_a_backward_pass_that_would_lose_gradients_is_an_error() -> None:
    net = Chain()
    with overlapped(net.parameters(), Deferred()):
        loss = net(images()).square().mean()
    with pytest.raises(RuntimeError, match="has to end before overlapped"):
        loss.backward()


def test_after_an_error_the_streams_are_joined_and_no_gradient_is_half_there() -> None:
    net, executor = Chain(), Deferred()
    x = images().requires_grad_()
    x.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError), overlapped(net.parameters(), executor):
        net(x).square().mean().backward()
    assert executor.joins == [4]
    assert [weight.grad for weight in net.parameters()] == [None] * 3


def test_of_two_errors_the_first_is_raised() -> None:
    def join() -> None:
        raise RuntimeError("the stream's capture has failed")

    executor = SimpleNamespace(submit=lambda work: work(), join=join)
    with pytest.raises(ZeroDivisionError), overlapped([], executor):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="capture has failed"), overlapped([], executor):
        pass


@pytest.mark.parametrize("thread", [False, True], ids=["same thread", "autograd's thread"])
def test_recomputation_belongs_to_the_pass(thread: bool) -> None:
    # On a CUDA device autograd computes again in a thread of its own.
    class Recomputed(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return recomputed(self.compute, [], x)

        def compute(self, x: Tensor) -> Tensor:
            overlap_found.append(is_overlapped(self.weights[0]))
            return super().forward(x)

    net, executor = Recomputed(), Deferred()
    overlap_found: list[bool] = []
    expected = gradients(net, None)
    net.zero_grad()
    with overlapped(net.parameters(), executor):
        loss = net(images()).square().mean()
        assert executor.joins == []
        if thread:
            backward = threading.Thread(target=loss.backward)
            backward.start()
            backward.join()
        else:
            loss.backward()
    assert executor.joins == [4]
    assert overlap_found == [False, False, True, True]
    assert equal([weight.grad for weight in net.parameters()], expected)


class _Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def test_all_weights_are_converted_at_once_and_all_gradients_too() -> None:
    net, executor = Chain(), Deferred()
    counts = {}
    for name, each in (("autograd", None), ("overlapped", executor)):
        with _Calls() as calls:
            gradients(net, each, amp=True)
        counts[name] = calls.names.count("_to_copy"), calls.names.count("_foreach_copy_")
    # Those of the three weights, there and back.
    conversions, at_once = counts["autograd"]
    assert at_once == 0
    assert counts["overlapped"] == (conversions - 6, 2)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_replays_of_a_captured_step_are_the_steps(amp: bool) -> None:
    finals = []
    for capture, executor in ((None, None), (CaptureByRecording(), Deferred())):
        net = Chain(uses=1 if amp else 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

        def step(x: Tensor) -> None:
            gradients(net, executor, x, amp)  # noqa: B023
            optimizer.step()  # noqa: B023

        run = step if capture is None else Replayed(step, capture)
        for seed in range(8):
            run(images(seed))
        finals.append([*net.parameters()])
    assert capture.replays > 3
    assert equal(*finals)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_shortcut_on_a_device_overlaps_too(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU it is computed from the pixels that the stride leaves. Tensors without values have no autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    conv = nn.Conv2d(4, 6, 1, stride, bias=False, device="meta")
    membrane, executor = torch.empty(2, 3, 4, 6, 8, device="meta", requires_grad=True), Deferred()
    with overlapped(conv.parameters(), executor):
        y = fused._convolve_shortcut(membrane, conv)
        assert y.shape == (2, 3, 6, 6 // stride, 8 // stride)
        y.sum().backward()
    assert executor.joins == [1]
    assert (membrane.grad.shape, conv.weight.grad.shape) == (membrane.shape, conv.weight.shape)


# --- Planted faults, which the comparisons above must see


def test_a_buffer_that_is_overwritten_before_the_join_is_seen() -> None:
    class Overwritten(torch.autograd.Function):
        """Passes values on; the gradient that it gave to the convolution before is garbage afterwards."""

        @staticmethod
        def forward(ctx, x: Tensor, kept: list[Tensor]) -> Tensor:
            ctx.kept = kept
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
            for each in ctx.kept:
                each.fill_(7.0)
            ctx.kept.append(gradient.clone())
            return ctx.kept[-1], None

    class Faulty(Chain):
        def forward(self, x: Tensor) -> Tensor:
            kept: list[Tensor] = []
            y = Overwritten.apply(conv2d(x, self.weights[0], stride=2, padding=1), kept)
            y = Overwritten.apply(conv2d(y, self.weights[1], padding=1), kept)
            return conv2d(y, self.weights[2])

    net = Faulty()
    expected = gradients(net, None)
    at_once = SimpleNamespace(submit=lambda work: work(), join=lambda: None)
    assert equal(gradients(net, at_once), expected)
    found = gradients(net, Deferred())
    assert not torch.equal(found[1], expected[1])
    assert equal([found[0], found[2]], [expected[0], expected[2]])


def test_a_join_that_is_forgotten_is_seen() -> None:
    net, executor = Chain(), Deferred()
    expected = gradients(net, None)
    assert not equal(gradients(net, SimpleNamespace(submit=executor.submit, join=lambda: None)), expected)


# --- The second stream


class _FakeStreams:
    """Two streams that only remember, per stream, which numbered pieces of work lie behind each point of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main, self.second = _FakeStream(self), _FakeStream(self)
        self.current = self.main
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.second)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._enter)

    @contextmanager
    def _enter(self, stream: "_FakeStream") -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class _FakeStream:
    def __init__(self, streams: _FakeStreams) -> None:
        self.streams, self.behind, self.usable = streams, set(), True

    def record_event(self) -> frozenset:
        return frozenset(self.behind)

    def wait_event(self, event: frozenset) -> None:
        self.behind |= event

    def wait_stream(self, other: "_FakeStream") -> None:
        if not self.usable:
            raise RuntimeError("the capture has failed")
        self.behind |= other.behind


def test_the_second_stream_waits_and_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Buffer:
        pass

    streams = _FakeStreams(monkeypatch)
    executor, alive = SecondStream(CPU), {}
    for number in range(10):
        streams.main.behind.add(f"input {number}")
        buffer = Buffer()
        alive[number] = weakref.ref(buffer)

        def work(number: int = number, buffer: Buffer = buffer) -> None:
            assert streams.current is streams.second
            assert f"input {number}" in streams.second.behind
            streams.second.behind.add(f"work {number}")

        executor.submit(work)
        del work, buffer
        for earlier, reference in alive.items():
            # Memory that is freed is written by the main stream's next work.
            assert reference() is not None or f"work {earlier}" in streams.main.behind
        assert sum(reference() is not None for reference in alive.values()) <= SecondStream.AHEAD
    executor.join()
    assert {f"work {number}" for number in range(10)} <= streams.main.behind
    assert all(reference() is None for reference in alive.values())


def test_after_a_join_that_failed_the_second_stream_waits_for_nothing_of_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = _FakeStreams(monkeypatch)
    executor = SecondStream(CPU)
    executor.submit(lambda: streams.second.behind.add("captured"))
    streams.main.usable = False
    with pytest.raises(RuntimeError, match="capture has failed"):
        executor.join()
    streams.main.usable = True
    streams.second.behind.clear()
    for _ in range(2 * SecondStream.AHEAD):
        executor.submit(lambda: None)
    executor.join()
    assert streams.main.behind == set()


def test_only_a_gpu_that_is_asked_to_has_a_second_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    _FakeStreams(monkeypatch)
    assert isinstance(select_executor(True, torch.device("cuda", 0)), SecondStream)
    assert select_executor(False, torch.device("cuda", 0)) is None
    assert select_executor(True, CPU) is None


# --- Training. Layers are so narrow that none of their convolutions is by events, which sum in another order.

RUN = Config(
    data=DataConfig(name="synthetic", image_size=8, synthetic_images=50, synthetic_classes=3, crop_padding=1),
    # All layers spike, from the second epoch on.
    model=ModelConfig(T=2, width=4, depth=[1, 1, 1], neuron="imagenet", temporal_init="alive"),
    train=TrainConfig(epochs=3, batch_size=18, learning_rate=0.2, cutmix="off"),
    device="cpu",
)
CONVOLUTIONS = 9


@pytest.mark.c_kernels
@pytest.mark.parametrize(
    ("options", "joins"),
    [
        ({}, [CONVOLUTIONS] * 9),
        # Batches of 18 and at last 14 images, whose quarters are not of equal size.
        ({"accumulate_steps": 4, "gradient_clip_norm": 0.5, "ema_decay": 0.8, "loss": "tet"}, [CONVOLUTIONS] * 36),
        ({"checkpoint_activations": True, "amp": "bf16", "self_distillation": 0.3}, [CONVOLUTIONS] * 9),
        ({"freeze": "stem.*, coding.*, stages.0.*", "optimizer": "adamw", "learning_rate": 1e-3}, [6] * 9),
    ],
    ids=["plain", "micro-batches", "recomputed in bf16", "frozen"],
)
def test_training_is_the_same_to_the_bit(
    options: dict[str, object], joins: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(RUN, train=replace(RUN.train, overlap_weight_gradients=True, **options))
    train(config, tmp_path / "without")
    executor = Deferred()
    monkeypatch.setattr(step_module, "select_executor", lambda wanted, device: executor if wanted else None)
    train(config, tmp_path / "with")
    assert executor.joins == joins
    assert_same(result_of(tmp_path / "with"), result_of(tmp_path / "without"))


@pytest.mark.c_kernels
def test_training_that_forgets_a_join_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = replace(RUN, train=replace(RUN.train, overlap_weight_gradients=True))
    train(config, tmp_path / "without")
    unjoined = SimpleNamespace(submit=Deferred().submit, join=lambda: None)
    monkeypatch.setattr(step_module, "select_executor", lambda wanted, device: unjoined)
    train(config, tmp_path / "with")
    with pytest.raises(AssertionError):
        assert_same(result_of(tmp_path / "with"), result_of(tmp_path / "without"))


def test_a_run_in_which_nothing_overlaps_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_config = replace(RUN.train, epochs=1, overlap_weight_gradients=True)
    config = replace(RUN, train=train_config, model=replace(RUN.model, backend="torch"))
    monkeypatch.setattr(step_module, "select_executor", lambda wanted, device: Deferred() if wanted else None)
    train(config, tmp_path / "run")
    (warning,) = [record.message for record in caplog.records if "left off" in record.message]
    assert warning.startswith("train.overlap_weight_gradients is left off: no convolution of this network runs")


# --- On a GPU


class _Slow(SecondStream):
    """A second stream that is late: what does not wait for it is wrong."""

    def submit(self, work: Callable[[], None]) -> None:
        def late() -> None:
            torch.cuda._sleep(2_000_000)  # about a millisecond
            work()

        super().submit(late)


@pytest.mark.gpu
@pytest.mark.parametrize("replayed", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_second_stream_trains_the_same(
    replayed: bool, amp: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    net = create_model("gac_msresnet18_cifar", 5, 3, width=16, depth=[1, 1, 1], temporal_init="alive")
    net.set_checkpoint_activations(recompute)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 3, 16, 16, generator=generator).to(device) for _ in range(6)]
    labels = torch.arange(8, device=device) % 5
    # So small that no spike changes: what is compared is the sum of all gradients, not a chaotic run.
    config = TrainConfig(learning_rate=1e-6, amp=amp, accumulate_steps=2, gradient_clip_norm=1e6)
    moved = {}
    for executor in (None, SecondStream(device), _Slow(device)):
        trained = copy.deepcopy(net).to(device, memory_format=torch.channels_last)
        optimizer = make_optimizer(trained.parameters(), config, device)
        scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16", init_scale=2.0**10)
        monkeypatch.setattr(step_module, "select_executor", lambda wanted, device: executor)  # noqa: B023
        step = TrainingStep(trained, optimizer, scaler, config, device)
        run = Replayed(step, CaptureOnDevice(device)) if replayed else step
        for batch in batches:
            run(batch.contiguous(memory_format=torch.channels_last), labels, labels)
        totals = step.totals.read()
        assert (totals.step, totals.skipped) == (6, 0)
        moved[executor] = {
            name: optimizer.state[parameter]["momentum_buffer"].clone()
            for name, parameter in trained.named_parameters()
        }
    expected, *found = moved.values()
    for each in found:
        for name, momentum in each.items():
            # cuDNN's kernels are deterministic, so this is no rounding but a reserve for another choice among them.
            scale = expected[name].abs().max().item()
            assert (momentum - expected[name]).abs().max().item() <= 1e-3 * scale, name
