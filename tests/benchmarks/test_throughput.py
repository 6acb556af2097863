"""The throughput benchmark at the smallest sizes: it must measure, and must refuse to when it should."""

import dataclasses
import json
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks import agreement
from benchmarks.command_line import MeasurementError
from benchmarks.environment import describe_environment
from benchmarks.implementations import IMPLEMENTATIONS, REFERENCE, Implementation, NetworkSize
from benchmarks.peers import spikingjelly_network, step_loop
from benchmarks.throughput import command, plot
from benchmarks.throughput.measure import Cell
from benchmarks.timing import Timing, time_in_turns
from gac.neuron import LIFNode

CPU = torch.device("cpu")
SIZE = NetworkSize(width=4, depth=(1, 1, 1), image_size=8, num_classes=3)
SMALL = [
    *("--device", "cpu", "--precision", "fp32", "--time-steps", "2", "--batch", "2"),
    *("--width", "4", "--depth", "1", "1", "1", "--image-size", "8", "--num-classes", "3"),
    *("--warmup", "2", "--rounds", "2", "--steps", "2"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(implementation: Implementation, T: int = 2, dtype: torch.dtype = torch.float32) -> list[agreement.Agreement]:
    return agreement.check_agreement([implementation], SIZE, T, {implementation.name: [dtype]}, CPU)


def test_measures_and_reports(tmp_path, capsys):
    files = {"json": tmp_path / "result.json", "png": tmp_path / "result.png"}
    status = command.main([*SMALL, "--json", str(files["json"]), "--plot", str(files["png"])])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    report = json.loads(files["json"].read_text())

    assert list(report["skipped"]) == ["ours-cupy"]
    assert "skipped       ours-cupy: the CUDA kernels need a CUDA device" in printed.out
    names = ["ours-torch", "spikingjelly", "step-loop"]
    assert [cell["implementation"] for cell in report["cells"]] == names
    assert [line.split()[0] for line in printed.out.splitlines()[-3:]] == names
    for cell in report["cells"]:
        assert cell["peak_bytes"] is None
        for phase in ("train", "evaluation"):
            timing = cell[phase]
            low, high = timing["quartiles_ms"]
            assert len(timing["samples_ms"]) == 4
            assert 0 < min(timing["samples_ms"]) <= low <= timing["median_ms"] <= high <= max(timing["samples_ms"])
            assert timing["images_per_second"] == pytest.approx(1000 * 2 / timing["median_ms"])
            assert timing["time_steps_per_second"] == pytest.approx(2 * timing["images_per_second"])
            assert timing["ms_per_time_step"] == pytest.approx(timing["median_ms"] / 2)
    checked = {(each["implementation"], each["dtype"]) for each in report["agreement"]}
    assert checked == {(name, "float32") for name in names} | {(name, "float64") for name in names[1:]}
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_half_precision_runs_and_is_checked_in_our_neuron(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = [*SMALL, "--precision", "fp16", "bf16", "--implementations", "ours-torch", "--json", str(file)]
    assert command.main(arguments) == 0, capsys.readouterr().err
    report = json.loads(file.read_text())
    assert report["skipped"] == {"fp16": "needs a CUDA device"}
    assert [cell["precision"] for cell in report["cells"]] == ["bf16"]
    assert {each["dtype"] for each in report["agreement"]} == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementations", "ours-cupy"], "nothing can run, ours-cupy: the CUDA kernels need a CUDA device"),
        (["--precision", "fp16"], "nothing can run, fp16: needs a CUDA device"),
        (["--batch", "0"], "argument --batch: expected a whole number >= 1, got '0'"),
        (["--image-size", "4"], "argument --image-size: expected a whole number >= 8"),
        (["--warmup", "1"], "argument --warmup: expected a whole number >= 2"),
        (["--time-steps", "two"], "got 'two'"),
        (["--json", "absent/result.json"], "in a folder that exists"),
        (["--plot", "result.pdf"], "expected a file *.png"),
        (["--implementations", "authors"], "invalid choice: 'authors'"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert command.main([*SMALL, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_nothing_is_timed_if_the_gate_fails(monkeypatch, capsys):
    forward = step_loop.LIF.forward
    monkeypatch.setattr(step_loop.LIF, "forward", lambda self, x: forward(self, 1.001 * x))
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("was timed"))
    assert command.main(SMALL) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: step-loop is not the network of ours-torch: ")
    assert printed.err.count("\n") == 1
    assert "train ms" not in printed.out


@pytest.mark.parametrize("name", ["spikingjelly", "step-loop"])
@pytest.mark.parametrize("T", [1, 4])
def test_peers_pass_the_gate(name, T):
    found = check(IMPLEMENTATIONS[name], T)
    assert len(found) == 6
    assert {each.quantity for each in found} >= set(agreement.NETWORK_LIMITS)


def wrong_surrogate(monkeypatch):
    def backward(ctx, grad):
        return 1.01 * grad

    monkeypatch.setattr(step_loop.TriangleSpike, "backward", staticmethod(backward))


def fires_at_another_threshold(monkeypatch):
    def forward(ctx, membrane):
        ctx.save_for_backward(membrane)
        return (membrane > 1.01).to(membrane.dtype)

    monkeypatch.setattr(step_loop.TriangleSpike, "forward", staticmethod(forward))


def ungated(monkeypatch):
    monkeypatch.setattr(step_loop.GatedAttention, "forward", lambda self, x: self.lif(x))


def sees_fewer_frames(monkeypatch):
    """The same logits and gradients; only the running variance knows how many frames there were."""

    def forward(self, x):
        if not isinstance(self.layers[1], torch.nn.BatchNorm2d) or not torch.equal(x[:, 0], x[:, -1]):
            return self.layers(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.layers(x[:, 0]).unsqueeze(1).expand(-1, x.shape[1], -1, -1, -1)

    monkeypatch.setattr(step_loop.EveryFrame, "forward", forward)


@pytest.mark.parametrize(
    ("defect", "quantity"),
    [
        (wrong_surrogate, "loss gradients"),
        (fires_at_another_threshold, "training logits"),
        (ungated, "training logits"),
        (sees_fewer_frames, "running statistics"),
    ],
)
def test_the_gate_finds_defects_of_a_network(defect, quantity, monkeypatch):
    defect(monkeypatch)
    with pytest.raises(MeasurementError, match=f"step-loop is not the network of ours-torch: {quantity} in float64"):
        check(IMPLEMENTATIONS["step-loop"])


def test_the_gate_finds_exchanged_tensors():
    exchange = {"conv1": "conv2", "conv2": "conv1"}
    names = tuple(
        (re.sub("conv[12](?=..norm)", lambda found: exchange[found[0]], pattern), replacement)
        for pattern, replacement in step_loop.NAMES
    )
    assert names != step_loop.NAMES
    with pytest.raises(MeasurementError, match="training logits in float64"):
        check(dataclasses.replace(IMPLEMENTATIONS["step-loop"], names=names))


class WrongGradient(LIFNode):
    """Right spikes; a gradient that is wrong by 2 percent."""

    def multi_step_functional_forward(self, inputs: tuple, states: tuple, **kwargs: object) -> tuple:
        (spikes,), states = super().multi_step_functional_forward(inputs, states, **kwargs)
        return (spikes.detach() + 1.02 * (spikes - spikes.detach()),), states


class MissesSpikes(LIFNode):
    """Right but for the spikes of one pixel at the last time step."""

    def multi_step_functional_forward(self, inputs: tuple, states: tuple, **kwargs: object) -> tuple:
        (spikes,), states = super().multi_step_functional_forward(inputs, states, **kwargs)
        mask = torch.ones_like(spikes)
        mask[-1, ..., 0, 0] = 0
        return (spikes * mask,), states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("neuron", "quantity"), [(WrongGradient, "neurons' gradients"), (MissesSpikes, "share of changed spikes")]
)
def test_the_gate_finds_defects_of_a_neuron_without_float64(neuron, quantity, dtype):
    def build(size: NetworkSize, T: int) -> torch.nn.Module:
        network = REFERENCE.build(size, T)
        for module in REFERENCE.neurons(network):
            module.__class__ = neuron
        return network

    sound = Implementation("kernels", REFERENCE.build, LIFNode, float64=False)
    assert len(check(sound, dtype=dtype)) == 2
    with pytest.raises(MeasurementError, match=f"kernels is not the network of ours-torch: {quantity}"):
        check(Implementation("kernels", build, LIFNode, float64=False), dtype=dtype)


def test_out_of_memory_is_reported_and_the_rest_measured(monkeypatch, tmp_path, capsys):
    forward = spikingjelly_network.SpikingJellyNetwork.forward

    def too_large(self, images: Tensor) -> Tensor:
        if self.training and images.dtype == torch.float32:
            raise torch.OutOfMemoryError("no memory left")
        return forward(self, images)

    monkeypatch.setattr(spikingjelly_network.SpikingJellyNetwork, "forward", too_large)
    files = {"json": tmp_path / "result.json", "png": tmp_path / "result.png"}
    status = command.main([*SMALL, "--json", str(files["json"]), "--plot", str(files["png"])])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    cells = {cell["implementation"]: cell for cell in json.loads(files["json"].read_text())["cells"]}
    assert cells["spikingjelly"]["train"] == "out of memory"
    assert cells["spikingjelly"]["evaluation"]["median_ms"] > 0
    assert cells["step-loop"]["train"]["median_ms"] > 0
    (row,) = [line for line in printed.out.splitlines() if line.startswith("spikingjelly")]
    assert "out of memory" in row


def test_calls_take_turns_until_memory_runs_out():
    log: list[str] = []

    def fails_in_its_second_turn() -> None:
        log.append("b")
        if log.count("b") > 3:
            raise torch.OutOfMemoryError

    calls = {"a": lambda: log.append("a"), "b": fails_in_its_second_turn}
    timings = time_in_turns(calls, lambda name: log.append(f"/{name} "), CPU, rounds=3, repeats=2)
    assert "".join(log) == "aaa/a bbb/b aaa/a b/b aaa/a "
    assert timings["b"] is None
    assert len(timings["a"].samples_ms) == 6


def test_a_cpu_runs_out_of_memory_too():
    calls = {"too large": lambda: torch.empty(1 << 50)}
    assert time_in_turns(calls, lambda name: None, CPU, rounds=1, repeats=1) == {"too large": None}


def test_other_errors_are_not_taken_for_lack_of_memory():
    def broken() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        time_in_turns({"a": broken}, lambda name: None, CPU, rounds=1, repeats=1)


def test_figure_shows_every_line_whole():
    cells = [
        Cell(name, T, 64, precision, "NCHW", Timing((64 * T / speed,) * 3), None, None)
        for name, factor in (("ours-cupy", 4), ("step-loop", 1))
        for precision, speed in (("fp32", factor), ("fp16", 10 * factor))
        for T in (1, 2, 6)
    ]
    figure = plot.make_figure(cells, SIZE, describe_environment("benchmarks.throughput", [], CPU))
    assert [axes.get_title() for axes in figure.axes] == ["batch 64, float32", "batch 64, float16 autocast"]
    for axes, factor in zip(figure.axes, (1, 10), strict=True):
        lines = [container.lines[0] for container in axes.containers]
        # Time steps/s = 1000 x images x T / ms.
        assert [line.get_ydata() for line in lines] == [pytest.approx([1000 * s * factor] * 3) for s in (4, 1)]
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert all(max(line.get_ydata()) < top for line in lines)
