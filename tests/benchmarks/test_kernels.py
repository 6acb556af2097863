"""The kernel benchmark at the smallest sizes: it must measure the real operations, and must refuse what is wrong."""

import json
import time
import weakref

import pytest
import torch

from benchmarks import kernels
from benchmarks.common import OUT_OF_MEMORY, MeasurementError, NetworkSize, timing
from benchmarks.kernels import (
    MEASURED,
    Case,
    bandwidth_of_all_layers,
    capturable_stream,
    captured,
    in_a_row,
    measure,
    sites,
)
from cuda_on_cpu.launcher import KernelsOnCpu
from gac.neuron import PRESETS
from gac.ops import c_kernels
from gac.ops.catalogue import OPERATIONS, Layer
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


@pytest.fixture(autouse=True)
def proven_kernels(monkeypatch):
    """Leave out the tests of the kernels, which have a run of their own."""
    ran = []
    monkeypatch.setattr(kernels, "run_tests", lambda paths, report, marker: ran.append((paths, marker)))
    return ran


@pytest.mark.c_compiler
def test_measures_and_reports(tmp_path, capsys, proven_kernels, monkeypatch):
    launched = set()

    def record(kernel: Kernel, *others: object) -> None:
        launched.add(kernel.instance.split("<")[0])
        c_kernels.launch(kernel, *others)

    monkeypatch.setattr(launch, "_cpu_launcher", record)
    files = {"json": tmp_path / "result.json", "png": tmp_path / "result.png"}
    status = kernels.main([*SMALL, "--json", str(files["json"]), "--plot", str(files["png"])])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert proven_kernels == [(("tests/ops",), "c_kernels")]
    assert "skipped" not in printed.out
    for name in ("lif", "norm_lif", "residual_lif", "gate_lif", "residual_lif_pool"):
        assert any(each.startswith(f"{name}_forward") for each in launched)
        assert any(each.startswith(f"{name}_backward") for each in launched)
    assert "batch_moments_partials" in launched
    report = json.loads(files["json"].read_text())
    rows = report["rows"]
    assert {row["operation"] for row in rows} == set(MEASURED)
    for row in rows:
        assert row["ours"]["median_ms"] > 0
        assert row["peer"]["median_ms"] > 0
        assert row["bytes_per_second"] == pytest.approx(1000 * row["bytes"] / row["ours"]["median_ms"])
        assert row["share_of_copy"] == pytest.approx(row["bytes_per_second"] / report["copy_bytes_per_second"])
    passes = {name: {row["pass"] for row in rows if row["operation"] == name} for name in MEASURED}
    assert passes.pop("batch_statistics") == {"forward"}
    assert all(found == {"forward", "backward"} for found in passes.values())
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_every_operation_of_the_catalogue_is_measured():
    assert list(MEASURED) == list(OPERATIONS)


def test_sizes_are_those_of_the_network():
    size = NetworkSize.from_options(kernels.PARSER.parse_args(SMALL))
    found = {name: dict(sites(name, size)) for name in MEASURED}
    a, b, c, d = (4, 8, 8), (8, 8, 8), (16, 4, 4), (32, 2, 2)
    assert found == {
        "lif": {a: 2, b: 4, c: 2, d: 2},
        "batch_statistics": {b: 5, c: 3, d: 3},
        "norm_lif": {b: 2, c: 1, d: 1},
        "residual_lif": {b: 1},
        "residual_norm_lif": {b: 1, c: 1},
        "residual_lif_pool": {d: 1},
        "gate_lif": {a: 1},
    }


@pytest.mark.c_compiler
def test_other_types_are_left_out_on_a_cpu(capsys, tmp_path):
    file = tmp_path / "result.json"
    few = ["--operations", "residual_lif_pool", "--dtype", "float16", "float32", "--json", str(file)]
    assert kernels.main([*SMALL, *few]) == 0
    assert (
        capsys.readouterr().out.count("\nskipped       float16: on a CPU there are C kernels for float32 only\n") == 1
    )
    assert {row["dtype"] for row in json.loads(file.read_text())["rows"]} == {"float32"}
    assert kernels.main([*SMALL, "--dtype", "float16", "bfloat16"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    expected = "--dtype: on a CPU there are C kernels for float32 only, not for float16, bfloat16"
    assert printed.err == f"error: {expected}\n"


def test_without_kernels_nothing_is_timed(capsys, monkeypatch):
    monkeypatch.setattr(c_kernels, "status", lambda: c_kernels.Status(False, "there is no C compiler: install gcc"))
    assert kernels.main(SMALL) == 2
    expected = "error: the fused operations cannot run: there is no C compiler: install gcc\n"
    assert capsys.readouterr().err == expected


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


@pytest.mark.c_compiler
def test_nothing_is_timed_if_the_gate_fails(monkeypatch, capsys):
    fire = kernels._fire
    monkeypatch.setattr(kernels, "_fire", lambda layer, x: fire(layer, 1.03 * x))
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("was timed"))
    assert kernels.main([*SMALL, "--operations", "norm_lif"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: norm_lif, peer, [3, 2, 8, 8, 8], float32: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("name", MEASURED)
def test_the_gate_finds_a_wrong_gradient_of_a_peer(name, monkeypatch):
    modules, peer = MEASURED[name]

    def wrong(layer: Layer, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(output.detach() + 1.02 * (output - output.detach()) for output in peer(layer, *inputs))

    layer = Layer((3, 2, 8, 6, 6), torch.float32, PRESETS["cifar"], CPU, kernels=False)
    torch.manual_seed(0)
    assert kernels.compare_with_peer(name, layer)
    monkeypatch.setitem(MEASURED, name, (modules, wrong))
    if name == "batch_statistics":
        # It has no gradient of its own.
        assert kernels.compare_with_peer(name, layer)
        return
    with pytest.raises(MeasurementError, match=f"{name}, peer, .* gradient 0 differ"):
        kernels.compare_with_peer(name, layer)


@pytest.mark.parametrize("name", MEASURED)
def test_operations_are_the_kernels(name, kernels_on_cpu):
    """What is timed on a GPU, run on the CPU: it is the kernels that run."""
    torch.manual_seed(0)
    case = Case(name, Layer((2, 2, 8, 4, 4), torch.float16, PRESETS["imagenet"], CPU, kernels=True))
    launched = record_launches(kernels_on_cpu)
    case.call["ours"]()
    if case.bytes["backward"]:
        case.backward("ours")()
    kind = {"batch_statistics": "batch_moments", "residual_norm_lif": "residual_lif"}
    expected = kind.get(name, name)
    passes = {kernel.split("<")[0] for kernel in launched}
    assert any(kernel.startswith(f"{expected}_") for kernel in passes)
    if case.bytes["backward"]:
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
        name: (case.bytes["forward"] / x, case.bytes["backward"] / x)
        for name in MEASURED
        for case in [Case(name, Layer(shape, torch.float16, PRESETS["cifar"], CPU, kernels=False))]
    }
    assert found == {
        # The last membrane potential: half of the time steps, in twice the bytes.
        "lif": (3, 3),
        "batch_statistics": (1, 0),
        "norm_lif": (3, 5),
        "residual_lif": (5, 8),
        "residual_norm_lif": (6, 11),
        "residual_lif_pool": (3, 6),
        # A frame is half of a sequence.
        "gate_lif": (3, 4),
    }


def test_bandwidth_of_all_layers_weighs_time():
    def row(layers: int, size: int, ms: float | None) -> dict:
        return {"layers": layers, "bytes": size, "ours": OUT_OF_MEMORY if ms is None else timing([ms])}

    assert bandwidth_of_all_layers([row(3, 1000, 1.0), row(1, 5000, 2.0)]) == pytest.approx(1000 * 8000 / 5)
    assert bandwidth_of_all_layers([row(3, 1000, 1.0), row(1, 5000, None)]) is None


def test_out_of_memory_of_the_peer_leaves_ours(monkeypatch, capsys):
    def too_large(layer, x):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "_fire", too_large)
    layer = Layer((2, 2, 4, 4, 4), torch.float32, PRESETS["cifar"], CPU, kernels=False)
    rows = measure("lif", layer, 1, 1e9, 1, 1)
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    assert all(row["peer"] == OUT_OF_MEMORY and row["ours"]["median_ms"] > 0 for row in rows)
    for row in rows:
        kernels.print_row(row)
    assert capsys.readouterr().out.count("out of memory") == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_calls_are_made(device):
    device = torch.device(device)
    counter, x = torch.zeros((), device=device), torch.ones(4, device=device, requires_grad=True)
    with capturable_stream(device):
        y = x * 3

        def differentiate() -> None:
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
            counter.add_(grad[0])

        run = captured(in_a_row([lambda: counter.add_(1), differentiate]), device)
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

    in_a_row([call] * 6, keep)()
    assert most == keep + 1
    assert not alive


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.gpu
def test_on_a_gpu(dtype, tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--device", "cuda", "--batch", "8", "--dtype", dtype, "--rounds", "2", "--json", str(file)]
    assert kernels.main(arguments) == 0, capsys.readouterr().err
    rows = json.loads(file.read_text())["rows"]
    assert {row["operation"] for row in rows} == set(MEASURED)
    # Above 1 it would have found its tensors in the cache, or its bytes would be counted wrong.
    assert all(0 < row["share_of_copy"] < 1.2 for row in rows)


def test_times_are_those_of_single_calls():
    class Waits:
        call = dict.fromkeys(("ours", "peer"), lambda: time.sleep(0.01))

    timings = kernels._time([Waits()] * 3, "forward", 2, CPU, 1, 2)
    assert set(timings) == {"ours", "peer"}
    assert all(10 <= timing["median_ms"] < 25 for timing in timings.values())
