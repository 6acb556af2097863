"""The throughput benchmark at the smallest sizes: it must measure, and must refuse to when it should."""

import dataclasses
import json
import re
from collections.abc import Iterator

import pytest
import torch
from recorded_graph import CaptureByRecording
from spikingjelly.activation_based import neuron, surrogate
from spikingjelly.activation_based.model import ms_resnet
from torch import Tensor

from benchmarks import agreement, replayed_contender
from benchmarks.command_line import MeasurementError
from benchmarks.contender import PRECISIONS
from benchmarks.convolution_floor import ConvolutionFloor
from benchmarks.environment import describe_environment
from benchmarks.implementations import IMPLEMENTATIONS, REFERENCE, Implementation
from benchmarks.network_size import NetworkSize, network_size
from benchmarks.peers import spikingjelly_network, step_loop
from benchmarks.throughput import command, plot
from benchmarks.throughput.largest_batch import find_largest_batch, largest
from benchmarks.throughput.measure import Cell
from benchmarks.timing import Timing, time_in_turns
from gac.neuron import PRESETS, LIFNode

CPU = torch.device("cpu")
SIZE = NetworkSize("gac_msresnet18_cifar", width=4, depth=(1, 1, 1), image_size=8, num_classes=3)
IMAGENET_SIZE = NetworkSize("gac_msresnet18", width=8, depth=(1, 1, 1, 1), image_size=32, num_classes=3)
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


def check(
    implementation: Implementation, T: int = 2, dtype: torch.dtype = torch.float32, size: NetworkSize = SIZE
) -> list[agreement.Agreement]:
    return agreement.check_agreement([implementation], size, T, {implementation.name: [dtype]}, CPU)


def test_measures_and_reports(tmp_path, capsys):
    files = {"json": tmp_path / "result.json", "png": tmp_path / "result.png"}
    status = command.main([*SMALL, "--json", str(files["json"]), "--plot", str(files["png"])])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    report = json.loads(files["json"].read_text())

    assert list(report["skipped"]) == ["ours-cupy", "ours-cupy-graph"]
    for name in report["skipped"]:
        assert f"skipped       {name}: the CUDA kernels need a CUDA device" in printed.out
    names = ["ours-torch", "spikingjelly", "step-loop", "convolution-floor"]
    assert [cell["implementation"] for cell in report["cells"]] == names
    rows = [line.split() for line in printed.out.splitlines()[-4:]]
    assert [row[0] for row in rows] == names
    *cells, floor = report["cells"]
    for row, cell in zip(rows, cells, strict=False):
        # Behind name, T, batch, precision, layout, duration and its two quartiles.
        assert float(row[8]) == pytest.approx(cell["train"]["median_ms"] / floor["train"]["median_ms"], abs=0.006)
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
    assert checked == {(name, "float32") for name in names[:3]} | {(name, "float64") for name in names[1:3]}
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
        (["--implementations", "ours-cupy-graph"], "nothing can run, ours-cupy-graph: the CUDA kernels need a CUDA"),
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
        (["--network", "msresnet104"], "invalid choice: 'msresnet104'"),
        (["--network", "gac_msresnet18"], "--depth: gac_msresnet18 has 4 stages, got 3 numbers"),
        (["--largest-batch"], "--largest-batch needs a GPU"),
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


@pytest.mark.parametrize("size", [SIZE, IMAGENET_SIZE], ids=["cifar", "imagenet"])
@pytest.mark.parametrize("name", ["spikingjelly", "step-loop"])
@pytest.mark.parametrize("T", [1, 4])
def test_peers_pass_the_gate(name, T, size):
    found = check(IMPLEMENTATIONS[name], T, size=size)
    assert len(found) == 6
    assert {each.quantity for each in found} >= set(agreement.NETWORK_LIMITS)


def test_measures_imagenet_networks(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = [*SMALL, "--network", "gac_msresnet34", "--width", "8", "--depth", "1", "1", "1", "1"]
    assert command.main([*arguments, "--image-size", "32", "--json", str(file)]) == 0, capsys.readouterr().err
    report = json.loads(file.read_text())
    assert report["network"]["network"] == "gac_msresnet34"
    assert all(cell["train"]["median_ms"] > 0 for cell in report["cells"])
    assert "gac_msresnet34, width 8, depth [1, 1, 1, 1], 32 x 32 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("gac_msresnet18_cifar", NetworkSize("gac_msresnet18_cifar", 64, (3, 3, 2), 32, 100)),
        ("gac_msresnet18", NetworkSize("gac_msresnet18", 64, (2, 2, 2, 2), 224, 1000)),
        ("gac_msresnet34", NetworkSize("gac_msresnet34", 64, (3, 4, 6, 3), 224, 1000)),
    ],
)
def test_sizes_are_the_published_ones_by_default(network, expected):
    assert network_size(command.make_parser().parse_args(["--network", network])) == expected


def test_imagenet_peer_is_spikingjellys_own_network_with_the_coding():
    """Without the coding, and with the same surrogate, the two classes compute the same."""
    torch.manual_seed(0)
    rect = {"surrogate_function": surrogate.Rect(1.0)}
    constants = {"tau": 4 / 3, "v_threshold": 0.5, "detach_reset": True, "decay_input": False}
    own = ms_resnet.MSResNet(
        T=3, num_classes=3, layers=(2, 1, 1, 1), base_channels=4, spiking_neuron=neuron.LIFNode, **rect, **constants
    ).double()
    peer = spikingjelly_network.SpikingJellyNetwork("imagenet", 3, 3, 4, (2, 1, 1, 1)).double()
    peer.encoder = torch.nn.Identity()
    for module in own.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # Its last BatchNorm of each block is zero at first.
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    # Both register their parameters in the order in which a block's are named, shortcuts last.
    assert [p.shape for p in peer.parameters()] == [p.shape for p in own.parameters()]
    for mine, theirs in zip(peer.parameters(), own.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    got, wanted = peer(images).mean(0), own(images)
    torch.testing.assert_close(got, wanted)
    grads = [
        torch.autograd.grad(logits.square().sum(), network.parameters())
        for logits, network in ((got, peer), (wanted, own))
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert any(grad.any() for grad in grads[0][:3])


class TestConvolutionFloor:
    def test_has_every_convolution_of_the_blocks(self):
        floor = make_floor("fp32", "NCHW")
        found = sorted((tuple(each.input.shape), tuple(each.weight.shape)) for each in floor._convolutions)
        frames = 3 * 5
        assert found == sorted(
            [
                ((frames, 4, 8, 8), (8, 4, 3, 3)),
                ((frames, 8, 8, 8), (8, 8, 3, 3)),
                ((frames, 4, 8, 8), (8, 4, 1, 1)),
                ((frames, 8, 8, 8), (16, 8, 3, 3)),
                ((frames, 16, 4, 4), (16, 16, 3, 3)),
                ((frames, 8, 8, 8), (16, 8, 1, 1)),
                ((frames, 16, 4, 4), (32, 16, 3, 3)),
                ((frames, 32, 2, 2), (32, 32, 3, 3)),
                ((frames, 16, 4, 4), (32, 16, 1, 1)),
            ]
        )

    def test_gradients_are_those_of_the_convolutions(self):
        for each in make_floor("fp32", "NHWC")._convolutions:
            x, weight = each.input.clone().requires_grad_(), each.weight.clone().requires_grad_()
            y = torch.nn.functional.conv2d(x, weight, None, each.stride, each.padding)
            torch.testing.assert_close(each.forward(), y.detach())
            wanted = torch.autograd.grad(y, (x, weight), each.grad_output)
            data, of_weight, of_bias = each.backward()
            torch.testing.assert_close((data, of_weight), wanted)
            assert of_bias is None

    def test_inputs_of_3x3_convolutions_are_spikes(self):
        for each in make_floor("fp32", "NCHW")._convolutions:
            if each.weight.shape[-1] == 3:
                assert set(each.input.unique().tolist()) <= {0.0, 1.0}
            else:
                assert each.input.unique().numel() > 2

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_has_the_precision_and_the_layout(self, precision):
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        for each in make_floor(precision, "NHWC")._convolutions:
            for tensor in (each.input, each.weight, each.grad_output):
                assert tensor.dtype == dtype
                assert tensor.is_contiguous(memory_format=torch.channels_last)


def make_floor(precision: str, layout: str) -> ConvolutionFloor:
    weights = REFERENCE.build(SIZE, 3).state_dict()
    return ConvolutionFloor(SIZE, 3, 5, precision, layout, weights, CPU)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 31, 32, 33, 100, 1000, 1023])
def test_largest_batch_is_found_to_a_sixteenth(limit):
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = largest(fits)
    assert found <= limit <= found + max(0, found // 16)
    assert len(tried) <= 2 * limit.bit_length() + 2


@pytest.mark.gpu
def test_replayed_steps_on_a_gpu(tmp_path, capsys):
    file = tmp_path / "result.json"
    names = ["ours-cupy", "ours-cupy-graph"]
    arguments = [*SMALL, "--device", "cuda", "--precision", "fp32", "fp16", "--implementations", *names]
    assert command.main([*arguments, "--json", str(file)]) == 0, capsys.readouterr().err
    cells = json.loads(file.read_text())["cells"]
    assert [cell["implementation"] for cell in cells] == names * 2
    for cell in cells:
        assert cell["peak_bytes"] > 0
        assert all(cell[phase]["median_ms"] > 0 for phase in ("train", "evaluation"))


@pytest.mark.gpu
def test_largest_batch_on_a_gpu(monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    limit = 300

    def too_large(self, images: Tensor) -> Tensor:
        if len(images) > limit:
            torch.empty(1 << 50, device=images.device)
        return forward(self, images)

    forward = spikingjelly_network.SpikingJellyNetwork.forward
    monkeypatch.setattr(spikingjelly_network.SpikingJellyNetwork, "forward", too_large)
    weights = REFERENCE.build(SIZE, 2).state_dict()
    found = find_largest_batch(IMPLEMENTATIONS["spikingjelly"], SIZE, 2, "fp32", "NCHW", weights, device)
    assert limit - 16 <= found.batch <= limit
    assert found.peak_bytes > 0


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
    ("neuron_type", "quantity"), [(WrongGradient, "neurons' gradients"), (MissesSpikes, "share of changed spikes")]
)
def test_the_gate_finds_defects_of_a_neuron_without_float64(neuron_type, quantity, dtype):
    def build(size: NetworkSize, T: int) -> torch.nn.Module:
        network = REFERENCE.build(size, T)
        for module in REFERENCE.neurons(network):
            module.__class__ = neuron_type
        return network

    sound = Implementation("kernels", REFERENCE.build, LIFNode, float64=False)
    assert len(check(sound, dtype=dtype)) == 2
    with pytest.raises(MeasurementError, match=f"kernels is not the network of ours-torch: {quantity}"):
        check(Implementation("kernels", build, LIFNode, float64=False), dtype=dtype)


def test_membranes_that_rounding_may_put_on_either_side_of_a_jump_are_left_out():
    # h = x at the first step; Rect jumps where h is 0 and 1.
    x = torch.tensor([[-1e-9, 0.0, 1e-9, 0.5, 1 - 1e-9, 1.0, 1 + 1e-9, 1.1]], dtype=torch.float64)
    found = agreement._near_a_jump(LIFNode.from_parameters(PRESETS["imagenet"], "torch"), x)
    assert found.tolist() == [[True, False, True, False, True, False, True, False]]
    assert not agreement._near_a_jump(LIFNode.from_parameters(PRESETS["cifar"], "torch"), x).any()


REPLAYED = dataclasses.replace(REFERENCE, name="ours-cupy-graph", float64=False, replayed=True)


def test_replayed_steps_are_checked_and_timed(monkeypatch, tmp_path, capsys):
    captures = []

    def capture(device: torch.device) -> CaptureByRecording:
        captures.append(CaptureByRecording())
        return captures[-1]

    monkeypatch.setattr(replayed_contender, "CaptureOnDevice", capture)
    monkeypatch.setitem(IMPLEMENTATIONS, REPLAYED.name, REPLAYED)
    file = tmp_path / "result.json"
    arguments = [*SMALL, "--precision", "bf16", "--implementations", REPLAYED.name, "--json", str(file)]
    assert command.main(arguments) == 0, capsys.readouterr().err
    report = json.loads(file.read_text())
    assert [cell["implementation"] for cell in report["cells"]] == [REPLAYED.name]
    found = {(each["dtype"], each["quantity"]): each["difference"] for each in report["agreement"]}
    for dtype in ("float32", "bfloat16"):
        for quantity in ("loss", "gradients", "weights' change", "running statistics", "logits"):
            assert found[dtype, f"replayed: {quantity}"] == 0
    # Training and evaluation in the gate for each dtype; the warm-up, whose last step gives the memory; two turns of
    # training and two of evaluation, each of an untimed step and two timed ones.
    assert [capture.replays for capture in captures] == [2, 2] * 2 + [1, 1] + [3, 3] + [3, 3]
    assert all(capture.captured == 1 for capture in captures)


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
