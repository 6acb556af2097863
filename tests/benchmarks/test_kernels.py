"""The kernel benchmark at the smallest sizes: it must measure the real operations, and must refuse what is wrong."""

import json
import time
import weakref

import pytest
import torch

from benchmarks import kernels
from benchmarks.common import EXEMPT, NetworkSize, Timing, compare, relative_rms
from benchmarks.kernels import (
    OPERATIONS,
    Case,
    Layer,
    Row,
    bandwidth_of_all_layers,
    capturable_stream,
    measure,
    replay,
    sites,
)
from cuda_on_cpu.launcher import KernelsOnCpu
from gac.ops.cuda import launch
from gac.ops.cuda.compiler import Kernel

CPU = torch.device("cpu")
SMALL = [
    *("--device", "cpu", "--time-steps", "3", "--batch", "2", "--dtype", "float32", "--rounds", "2", "--repeats", "1"),
    *("--width", "4", "--depth", "2", "1", "1", "--image-size", "8"),
]


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setitem(kernels.COPY_BYTES, "cpu", 2**20)


def test_measures_and_reports(tmp_path, capsys):
    files = {"json": tmp_path / "result.json", "png": tmp_path / "result.png"}
    status = kernels.main([*SMALL, "--json", str(files["json"]), "--plot", str(files["png"])])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "on a CPU the operations' references in torch" in printed.out
    report = json.loads(files["json"].read_text())
    rows = report["rows"]
    assert {row["operation"] for row in rows} == set(OPERATIONS)
    for row in rows:
        assert row["ours"]["median_ms"] > 0
        assert row["peer"]["median_ms"] > 0
        assert row["bytes_per_second"] == pytest.approx(1000 * row["bytes"] / row["ours"]["median_ms"])
        assert row["share_of_copy"] == pytest.approx(row["bytes_per_second"] / report["copy_bytes_per_second"])
    passes = {name: {row["pass"] for row in rows if row["operation"] == name} for name in OPERATIONS}
    assert passes.pop("batch_statistics") == {"forward"}
    assert all(found == {"forward", "backward"} for found in passes.values())
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_sizes_are_those_of_the_network():
    size = NetworkSize.from_options(kernels.make_parser().parse_args(SMALL))
    found = {name: dict(sites(name, size)) for name in OPERATIONS}
    a, b, c, d = (4, 8, 8), (8, 8, 8), (16, 4, 4), (32, 2, 2)
    assert found == {
        "lif": {a: 2, b: 4, c: 2, d: 2},
        "batch_statistics": {b: 5, c: 3, d: 3},
        "norm_lif": {b: 2, c: 1, d: 1},
        "residual_lif": {b: 1},
        "residual_norm_lif": {b: 1, c: 1},
        "residual": {d: 1},
        "gate_lif": {a: 1},
        "lif_pool": {d: 1},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operations", "conv"], "invalid choice: 'conv'"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--repeats", "0"], "argument --repeats: expected a whole number >= 1, got '0'"),
        (["--plot", "result.pdf"], "expected a file *.png"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert kernels.main([*SMALL, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_nothing_is_timed_if_the_gate_fails(monkeypatch, capsys):
    spikingjelly = Layer.spikingjelly
    monkeypatch.setattr(Layer, "spikingjelly", lambda self, x: spikingjelly(self, 1.001 * x))
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("was timed"))
    assert kernels.main([*SMALL, "--operations", "norm_lif"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: norm_lif, peer, [3, 2, 8, 8, 8], float32: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_the_kernels(name, kernels_on_cpu):
    """What is timed on a GPU, run on the CPU: the kernels pass the gate, and they are what runs."""
    torch.manual_seed(0)
    case = Case(name, Layer((2, 2, 8, 4, 4), torch.float16, "imagenet", CPU, kernels=True))
    launched = record_launches(kernels_on_cpu)
    assert all(difference.within for difference in compare(case.ours, case.reference, case.inputs))
    kind = {"batch_statistics": "batch_moments", "residual_norm_lif": "residual_lif", "residual": "residual_lif"}
    expected = kind.get(name, name)
    passes = {kernel.split("<")[0] for kernel in launched}
    assert any(kernel.startswith(f"{expected}_") for kernel in passes)
    if case.backward_bytes:
        assert any(kernel.startswith(f"{expected}_backward") for kernel in passes)


def record_launches(launcher: KernelsOnCpu) -> list[str]:
    launched: list[str] = []

    def record(kernel: Kernel, *others: object) -> None:
        launched.append(kernel.instance)
        launcher(kernel, *others)

    launch.set_cpu_launcher(record)
    return launched


def test_bytes_are_those_of_the_tensors():
    """The formulas against a count of what each pass names: activations of 2 * 3 * 4 * 5 * 5 numbers."""
    shape = (2, 3, 4, 5, 5)
    x = 2 * (2 * 3 * 4 * 5 * 5)
    found = {
        name: (case.forward_bytes / x, case.backward_bytes / x)
        for name in OPERATIONS
        for case in [Case(name, Layer(shape, torch.float16, "cifar", CPU, kernels=False))]
    }
    assert found == {
        # The last membrane potential: half of the time steps, in twice the bytes.
        "lif": (3, 3),
        "batch_statistics": (1, 0),
        "norm_lif": (3, 5),
        "residual_lif": (5, 8),
        "residual_norm_lif": (6, 11),
        "residual": (4, 5),
        # A frame is half of a sequence.
        "gate_lif": (3, 4),
        "lif_pool": (1, 2),
    }


def test_bandwidth_of_all_layers_weighs_time():
    def row(layers: int, size: int, ms: float | None) -> Row:
        timing = None if ms is None else Timing((ms,))
        return Row("lif", (1, 1, 1, 1, 1), layers, "float32", "forward", size, timing, timing)

    assert bandwidth_of_all_layers([row(3, 1000, 1.0), row(1, 5000, 2.0)]) == pytest.approx(1000 * 8000 / 5)
    assert bandwidth_of_all_layers([row(3, 1000, 1.0), row(1, 5000, None)]) is None


def test_out_of_memory_of_the_peer_leaves_ours(monkeypatch):
    def too_large(self, x):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Layer, "spikingjelly", too_large)
    rows = measure("lif", Layer((2, 2, 4, 4, 4), torch.float32, "cifar", CPU, kernels=False), 1, 1e9, 1, 1)
    assert [row.direction for row in rows] == ["forward", "backward"]
    assert all(row.peer is None and row.ours.median_ms > 0 for row in rows)


class TestComparison:
    def setup_method(self):
        torch.manual_seed(0)
        self.case = Case("residual_lif", Layer((3, 2, 4, 5, 5), torch.float32, "cifar", CPU, kernels=False))

    def failed(self, change) -> set[str]:
        def changed(*inputs):
            return change(dict(self.case.ours(*inputs)))

        found = compare(changed, self.case.reference, self.case.inputs)
        return {difference.quantity for difference in found if not difference.within}

    def test_passes_what_is_right(self):
        assert self.failed(lambda outputs: outputs) == set()

    def test_finds_changed_spikes(self):
        def change(outputs):
            mask = torch.ones_like(outputs["spikes"])
            mask[-1, ..., :2] = 0
            return outputs | {"spikes": outputs["spikes"] * mask}

        assert "share of changed spikes" in self.failed(change)

    @pytest.mark.parametrize(("neurons", "expected"), [(1, set()), (2, {"share of changed spikes"})])
    def test_one_unlucky_neuron_is_left_out_of_all_else(self, neurons, expected):
        def change(outputs):
            spikes = outputs["spikes"]
            unlucky = torch.zeros(spikes.shape[1:], dtype=torch.bool)
            unlucky.view(-1)[:neurons] = True
            return outputs | {"spikes": torch.where(unlucky, 1 - spikes, spikes)}

        assert self.failed(change) == expected

    def test_finds_a_wrong_stream(self):
        assert "membrane stream" in self.failed(lambda o: o | {"membrane stream": 1.001 * o["membrane stream"]})

    def test_finds_a_wrong_gradient(self):
        def change(outputs):
            spikes = outputs["spikes"]
            return outputs | {"spikes": spikes.detach() + 1.01 * (spikes - spikes.detach())}

        found = self.failed(change)
        assert {"gradient of y", "gradient of shortcut", "gradient of weight"} <= found
        assert "membrane stream" not in found

    def test_nan_is_wrong(self):
        assert "membrane stream" in self.failed(lambda o: o | {"membrane stream": o["membrane stream"] * float("nan")})

    def test_a_few_in_a_million_may_be_off(self):
        wanted = torch.randn(1000, 1000, dtype=torch.float64)
        got = wanted.clone()
        allowed = int(EXEMPT * wanted.numel())
        got.view(-1)[:allowed] += 10
        assert relative_rms(got, wanted) == 0
        got.view(-1)[allowed] += 10
        assert relative_rms(got, wanted) == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_replay_makes_all_calls(device):
    device = torch.device(device)
    counter, x = torch.zeros((), device=device), torch.ones(4, device=device, requires_grad=True)
    with capturable_stream(device):
        y = x * 3

        def differentiate() -> None:
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
            counter.add_(grad[0])

        run = replay([lambda: counter.add_(1), differentiate], device)
        counter.zero_()
        run()
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert counter.item() == 2 * (1 + 3)


@pytest.mark.parametrize("keep", [0, 2])
def test_results_are_kept_for_a_while(keep):
    alive, most = weakref.WeakSet(), 0

    def call() -> torch.Tensor:
        nonlocal most
        alive.add(result := torch.zeros(1))
        most = max(most, len(alive))
        return result

    replay([call] * 6, CPU, keep)()
    assert most == keep + 1
    assert not alive


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.gpu
def test_on_a_gpu(dtype, tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--device", "cuda", "--batch", "8", "--dtype", dtype, "--rounds", "2", "--json", str(file)]
    assert kernels.main(arguments) == 0, capsys.readouterr().err
    rows = json.loads(file.read_text())["rows"]
    assert {row["operation"] for row in rows} == set(OPERATIONS)
    # Above 1 it would have found its tensors in the cache, or its bytes would be counted wrong.
    assert all(0 < row["share_of_copy"] < 1.2 for row in rows)


def test_times_are_those_of_single_calls():
    timings = kernels._time([None] * 3, lambda case, who: lambda: time.sleep(0.01), 1, CPU, 1, 2)
    assert set(timings) == {"ours", "peer"}
    assert all(10 <= timing.median_ms < 25 for timing in timings.values())
