"""The throughput benchmark at the smallest sizes: it must measure, and must refuse to when it should."""

import dataclasses
import json

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from spikingjelly.activation_based.model import ms_resnet
from torch import Tensor

from benchmarks import candidates, equality, peers, plot, throughput
from benchmarks.candidates import FLOOR, IMPLEMENTATIONS, REFERENCE, ConvolutionFloor, Setting
from benchmarks.common import OUT_OF_MEMORY, PRECISIONS, NetworkSize, time_in_turns, timing
from benchmarks.throughput import find_largest_batch, largest
from gac.execution.environment import describe_environment
from recorded_graph import CaptureByRecording

CPU = torch.device("cpu")
SIZE = NetworkSize("gac_msresnet18_cifar", width=4, depth=(1, 1, 1), image_size=8, num_classes=3)
SMALL = [
    *("--device", "cpu", "--precision", "fp32", "--time-steps", "2", "--batch", "2"),
    *("--width", "4", "--depth", "1", "1", "1", "--image-size", "8", "--num-classes", "3"),
    *("--warmup", "2", "--rounds", "2", "--steps", "2"),
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def proven_kernels(monkeypatch):
    """Leave out the tests of the kernels, which have a run of their own."""
    ran = []
    monkeypatch.setattr(equality, "run_tests", lambda paths, report, marker: ran.append(marker))
    return ran


@pytest.mark.c_compiler
def test_measures_and_reports(tmp_path, capsys, proven_kernels):
    files = {"json": tmp_path / "result.json", "png": tmp_path / "result.png"}
    status = throughput.main([*SMALL, "--json", str(files["json"]), "--plot", str(files["png"])])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    report = json.loads(files["json"].read_text())

    assert list(report["skipped"]) == ["ours-cupy", "ours-cupy-graph", "ours-cupy-overlap"]
    for name in report["skipped"]:
        assert f"skipped       {name}: the CUDA kernels need a CUDA device" in printed.out
    assert proven_kernels == ["c_kernels"]
    names = ["ours-c", "ours-torch", "spikingjelly", "step-loop", "convolution-floor"]
    assert [cell["implementation"] for cell in report["cells"]] == names
    *rows, in_training, in_evaluation = [line.split() for line in printed.out.splitlines()[-7:]]
    assert [line[:2] for line in (in_training, in_evaluation)] == [["density", "train:"], ["density", "evaluation:"]]
    for line, phase in ((in_training, "train"), (in_evaluation, "evaluation")):
        # Of two convolutions in each of three blocks.
        assert len(line) == 2 + 6
        for cell in report["cells"]:
            assert [float(density) for density in line[2:]] == pytest.approx(cell["densities"][phase], abs=0.0006)
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
    assert checked == {(name, "float64") for name in ("spikingjelly", "step-loop")}
    assert all(each["difference"] <= each["limit"] for each in report["agreement"])
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_half_precision_runs(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = [*SMALL, "--precision", "fp16", "bf16", "--implementations", "ours-torch", "--json", str(file)]
    assert throughput.main(arguments) == 0, capsys.readouterr().err
    report = json.loads(file.read_text())
    assert report["skipped"] == {"fp16": "needs a CUDA device"}
    assert [cell["precision"] for cell in report["cells"]] == ["bf16"]


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
        (["--device", "tpu"], "device must be auto, cpu, cuda, cuda:N or another accelerator"),
        (["--speed"], "unrecognized arguments: --speed"),
        (["--network", "msresnet104"], "invalid choice: 'msresnet104'"),
        (["--network", "gac_msresnet18"], "depth must be 4 integers >= 1, the blocks of each stage, got [1, 1, 1]"),
        (["--largest-batch"], "--largest-batch needs a GPU"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert throughput.main([*SMALL, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_nothing_is_timed_if_the_gate_fails(monkeypatch, capsys):
    forward = peers.LIF.forward
    monkeypatch.setattr(peers.LIF, "forward", lambda self, x: forward(self, 1.001 * x))
    monkeypatch.setattr(throughput, "measure", lambda *_: pytest.fail("was timed"))
    assert throughput.main(SMALL) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: step-loop is not the network of ours-torch at T=2: ")
    assert printed.err.count("\n") == 1
    assert "train ms" not in printed.out


def test_measures_imagenet_networks(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = [*SMALL, "--network", "gac_msresnet34", "--width", "8", "--depth", "1", "1", "1", "1"]
    assert throughput.main([*arguments, "--image-size", "32", "--json", str(file)]) == 0, capsys.readouterr().err
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
    assert NetworkSize.from_options(throughput.PARSER.parse_args(["--network", network])) == expected


def test_imagenet_peer_is_spikingjellys_own_network_with_the_coding():
    """Without the coding, and with the same surrogate, the two classes compute the same."""
    torch.manual_seed(0)
    rect = {"surrogate_function": surrogate.Rect(1.0)}
    constants = {"tau": 4 / 3, "v_threshold": 0.5, "detach_reset": True, "decay_input": False}
    own = ms_resnet.MSResNet(
        T=3, num_classes=3, layers=(2, 1, 1, 1), base_channels=4, spiking_neuron=neuron.LIFNode, **rect, **constants
    ).double()
    size = NetworkSize("gac_msresnet18", width=4, depth=(2, 1, 1, 1), image_size=32, num_classes=3)
    peer = peers.Network(0, peers.spikingjelly_lif, size, T=3).double()
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
        found = sorted((tuple(x.shape), tuple(each.weight.shape)) for each, x, _ in floor.convolutions)
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

    def test_every_gradient_is_computed(self, monkeypatch):
        floor, found = make_floor("fp32", "NHWC"), []
        grad = torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda *arguments: found.extend(grad(*arguments)))
        floor.train_step()
        wanted = []
        for convolution, x, grad_output in floor.convolutions:
            leaves = x.detach().requires_grad_(), convolution.weight.detach().requires_grad_()
            y = torch.nn.functional.conv2d(*leaves, None, convolution.stride, convolution.padding)
            wanted += grad(y, leaves, grad_output)
        torch.testing.assert_close(found, wanted)

    def test_inputs_of_3x3_convolutions_are_spikes(self):
        for convolution, x, _ in make_floor("fp32", "NCHW").convolutions:
            if convolution.kernel_size == (3, 3):
                assert set(x.unique().tolist()) <= {0.0, 1.0}
            else:
                assert x.unique().numel() > 2

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_has_the_precision_and_the_layout(self, precision):
        for convolution, *tensors in make_floor(precision, "NHWC").convolutions:
            for tensor in (convolution.weight, *tensors):
                assert tensor.dtype == PRECISIONS[precision]
                assert tensor.is_contiguous(memory_format=torch.channels_last)


def make_floor(precision: str, layout: str) -> ConvolutionFloor:
    setting = Setting(SIZE, 3, 5, precision, layout, CPU)
    return ConvolutionFloor(IMPLEMENTATIONS[FLOOR], setting, setting.weights())


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
def test_replayed_steps_on_a_gpu(tmp_path, capsys, monkeypatch):
    # They are part of the suite that this test is part of.
    monkeypatch.setattr(equality, "run_tests", lambda paths, report, marker: None)
    file = tmp_path / "result.json"
    names = ["ours-cupy", "ours-cupy-graph", "ours-cupy-overlap"]
    arguments = [*SMALL, "--device", "cuda", "--precision", "fp32", "fp16", "--implementations", *names]
    assert throughput.main([*arguments, "--json", str(file)]) == 0, capsys.readouterr().err
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

    forward = peers.Network.forward
    monkeypatch.setattr(peers.Network, "forward", too_large)
    batch, peak = find_largest_batch(IMPLEMENTATIONS["spikingjelly"], Setting(SIZE, 2, 1, "fp32", "NCHW", device))
    assert limit - 16 <= batch <= limit
    assert peak > 0


REPLAYED = dataclasses.replace(REFERENCE, name="ours-cupy-graph", replayed=True)


def test_replayed_steps_are_timed(monkeypatch, tmp_path, capsys):
    captures = []

    def capture(device: torch.device) -> CaptureByRecording:
        captures.append(CaptureByRecording())
        return captures[-1]

    monkeypatch.setattr(candidates, "CaptureOnDevice", capture)
    monkeypatch.setitem(IMPLEMENTATIONS, REPLAYED.name, REPLAYED)
    file = tmp_path / "result.json"
    arguments = [*SMALL, "--precision", "bf16", "--implementations", REPLAYED.name, "--json", str(file)]
    assert throughput.main(arguments) == 0, capsys.readouterr().err
    report = json.loads(file.read_text())
    assert [cell["implementation"] for cell in report["cells"]] == [REPLAYED.name]
    # The warm-up, whose last step gives the memory; two turns of training and two of evaluation, each of an untimed
    # step and two timed ones.
    assert [capture.replays for capture in captures] == [1, 1, 3, 3, 3, 3]
    assert all(capture.captured == 1 for capture in captures)


def test_out_of_memory_is_reported_and_the_rest_measured(monkeypatch, tmp_path, capsys):
    forward = peers.Network.forward

    def too_large(self, images: Tensor) -> Tensor:
        if self.time == 0 and self.training and len(images) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return forward(self, images)

    monkeypatch.setattr(peers.Network, "forward", too_large)
    files = {"json": tmp_path / "result.json", "png": tmp_path / "result.png"}
    status = throughput.main([*SMALL, "--json", str(files["json"]), "--plot", str(files["png"])])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    cells = {cell["implementation"]: cell for cell in json.loads(files["json"].read_text())["cells"]}
    assert cells["spikingjelly"]["train"] == "out of memory"
    assert cells["spikingjelly"]["evaluation"]["median_ms"] > 0
    assert cells["step-loop"]["train"]["median_ms"] > 0
    (row,) = [line for line in printed.out.splitlines() if line.startswith("spikingjelly")]
    assert "out of memory" in row


def test_results_that_cannot_be_written_are_one_line(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setattr(throughput, "measure", lambda *_: folder.rmdir() or [])
    assert throughput.main([*SMALL, "--implementations", "ours-torch", "--json", str(folder / "result.json")]) == 1
    assert capsys.readouterr().err == f"error: cannot write {folder / 'result.json'}: No such file or directory\n"


def test_a_loss_that_is_not_finite_is_not_reported(monkeypatch, capsys):
    entropy = candidates.F.cross_entropy
    monkeypatch.setattr(candidates.F, "cross_entropy", lambda logits, labels: entropy(logits, labels) * float("inf"))
    assert throughput.main([*SMALL, "--implementations", "ours-torch"]) == 1
    assert capsys.readouterr().err == "error: ours-torch, T=2, batch 2, fp32: the loss is not finite any more\n"


def test_calls_take_turns_until_memory_runs_out():
    log: list[str] = []

    def fails_in_its_second_turn() -> None:
        log.append("b")
        if log.count("b") > 3:
            raise torch.OutOfMemoryError

    calls = {"a": lambda: log.append("a"), "b": fails_in_its_second_turn}
    timings = time_in_turns(calls, CPU, 3, 2, lambda name: log.append(f"/{name} "))
    assert "".join(log) == "aaa/a bbb/b aaa/a b/b aaa/a "
    assert timings["b"] == OUT_OF_MEMORY
    assert len(timings["a"]["samples_ms"]) == 6


def test_a_cpu_runs_out_of_memory_too():
    calls = {"too large": lambda: torch.empty(1 << 50)}
    assert time_in_turns(calls, CPU, rounds=1, repeats=1) == {"too large": OUT_OF_MEMORY}


def test_other_errors_are_not_taken_for_lack_of_memory():
    def broken() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        time_in_turns({"a": broken}, CPU, rounds=1, repeats=1)


def test_figure_shows_every_line_whole():
    cells = [
        {"implementation": name, "T": T, "batch": 64, "precision": precision, "train": timing([64 * T / speed] * 3)}
        for name, factor in (("ours-cupy", 4), ("step-loop", 1))
        for precision, speed in (("fp32", factor), ("fp16", 10 * factor))
        for T in (1, 2, 6)
    ]
    environment = describe_environment(CPU)
    figure = plot.throughput_figure(cells, "title", environment)
    assert [axes.get_title() for axes in figure.axes] == ["batch 64, fp32", "batch 64, fp16"]
    for axes, factor in zip(figure.axes, (1, 10), strict=True):
        lines = [container.lines[0] for container in axes.containers]
        # Time steps/s = 1000 x images x T / ms.
        assert [line.get_ydata() for line in lines] == [pytest.approx([1000 * s * factor] * 3) for s in (4, 1)]
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert all(max(line.get_ydata()) < top for line in lines)
