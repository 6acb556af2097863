"""The gate before networks are timed: it must pass what is equal, and find what an implementation could do wrong."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import equality, peers
from benchmarks.candidates import FLOOR, IMPLEMENTATIONS, Implementation
from benchmarks.common import MeasurementError, NetworkSize, Report
from benchmarks.equality import NETWORK_TESTS, compare, relative_rms, run_tests
from gac.command_line import Parser

CPU = torch.device("cpu")
SIZE = NetworkSize("gac_msresnet18_cifar", width=8, depth=(1, 1, 1), image_size=8, num_classes=3)
IMAGENET_SIZE = NetworkSize("gac_msresnet18", width=8, depth=(1, 1, 1, 1), image_size=32, num_classes=3)
NETWORK = {"training logits", "loss gradients", "running statistics", "evaluation logits"}


@pytest.fixture
def report() -> Report:
    report = Report(Parser("benchmarks.throughput", ""), [], CPU, None)
    report.begin()
    return report


def check(report: Report, implementation: Implementation, T: int = 2, size: NetworkSize = SIZE) -> list[dict]:
    equality.check_networks([implementation], size, [T], report)
    return report.data["agreement"]


@pytest.mark.parametrize("size", [SIZE, IMAGENET_SIZE], ids=["cifar", "imagenet"])
@pytest.mark.parametrize("name", ["spikingjelly", "step-loop"])
@pytest.mark.parametrize("T", [1, 4])
def test_peers_pass_the_gate(name, T, size, report):
    found = check(report, IMPLEMENTATIONS[name], T, size)
    assert {(each["dtype"], each["quantity"]) for each in found} == {("float64", quantity) for quantity in NETWORK}


@pytest.mark.parametrize("name", ["ours-torch", FLOOR])
def test_the_reference_is_compared_with_nothing(name, report):
    assert check(report, IMPLEMENTATIONS[name]) == []


def wrong_surrogate(monkeypatch):
    def backward(ctx, grad):
        return 1.01 * grad, None

    monkeypatch.setattr(peers.Spike, "backward", staticmethod(backward))


def fires_at_another_threshold(monkeypatch):
    def forward(ctx, membrane, constants):
        ctx.save_for_backward(membrane)
        ctx.constants = constants
        return (membrane > 1.01).to(membrane.dtype)

    monkeypatch.setattr(peers.Spike, "forward", staticmethod(forward))


def ungated(monkeypatch):
    monkeypatch.setattr(peers.GatedAttention, "forward", lambda self, x: self.lif(x))


def sees_fewer_frames(monkeypatch):
    """The same logits and gradients; only the running variance knows how many frames there were."""
    forward = peers.layer.SeqToANNContainer.forward

    def once(self, x):
        if not isinstance(self[1], torch.nn.BatchNorm2d) or not torch.equal(x[:, 0], x[:, -1]):
            return forward(self, x)
        return forward(self, x[:, :1]).expand(-1, x.shape[1], -1, -1, -1)

    monkeypatch.setattr(peers.layer.SeqToANNContainer, "forward", once)


def exchanged_convolutions(monkeypatch):
    """Our weights in another order, as if a peer registered its layers in another order than ours."""
    load = equality.load

    def exchanged(network, weights):
        shapes = [weight.shape for weight in weights]
        pairs = [(i, j) for i in range(len(shapes)) for j in range(i) if shapes[i] == shapes[j] and len(shapes[i]) == 4]
        i, j = pairs[-1]
        weights = list(weights)
        if isinstance(network, peers.Network):
            weights[i], weights[j] = weights[j], weights[i]
        return load(network, weights)

    monkeypatch.setattr(equality, "load", exchanged)


@pytest.mark.parametrize(
    ("defect", "quantity"),
    [
        (wrong_surrogate, "loss gradients"),
        (fires_at_another_threshold, "training logits"),
        (ungated, "training logits"),
        (sees_fewer_frames, "running statistics"),
        (exchanged_convolutions, "training logits"),
    ],
)
def test_the_gate_finds_defects_of_a_network(defect, quantity, monkeypatch, report):
    size = dataclasses.replace(SIZE, depth=(2, 1, 1))
    check(report, IMPLEMENTATIONS["step-loop"], size=size)
    defect(monkeypatch)
    with pytest.raises(MeasurementError, match=f"step-loop is not the network of ours-torch at T=2: {quantity} differ"):
        check(report, IMPLEMENTATIONS["step-loop"], size=size)


def test_a_silent_reference_is_refused(monkeypatch, report):
    monkeypatch.setattr(equality, "perturb", lambda network, images: network.stem.norm.bias.data.fill_(-100))
    with pytest.raises(MeasurementError, match="never or always fires"):
        check(report, IMPLEMENTATIONS["step-loop"])


def test_nan_is_different():
    wanted = {"logits": [torch.ones(3), torch.zeros(3)]}
    assert compare("", wanted, wanted, 0.0) == [{"quantity": "logits", "difference": 0.0, "limit": 0.0}]
    for value in (2.0, float("nan")):
        with pytest.raises(MeasurementError, match="a network: logits differ by"):
            compare("a network", {"logits": [torch.ones(3), torch.full((3,), value)]}, wanted, 0.5)
    assert relative_rms(torch.tensor([1.0, 1.1]), torch.tensor([1.0, 1.0])) == pytest.approx(0.1 / 2**0.5)


class TestTheSuiteAsTheGate:
    """What proves the kernels on a GPU, with tests that need none."""

    PASSES = "import pytest\n\n@pytest.mark.here\ndef test_right():\n    print('said')\n"
    FAILS = "@pytest.mark.here\ndef test_wrong():\n    assert False\n"
    SKIPS = "@pytest.mark.here\ndef test_absent():\n    pytest.skip('no')\n"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                PASSES + FAILS,
                r"1 of 2 tests of the kernels did not pass: test_wrong \(failure\); nothing was timed, see",
            ),
            (PASSES + SKIPS, r"1 of 2 tests of the kernels did not pass: test_absent \(skipped\)"),
            ("", "0 of 0 tests of the kernels did not pass"),
            ("import absent_module", "did not pass"),
        ],
        ids=["fails", "skips", "none", "cannot-be-read"],
    )
    def test_only_tests_that_pass_let_anything_be_timed(self, content, message, tmp_path, report):
        path = tmp_path / "test_gate.py"
        path.write_text(content)
        with pytest.raises(MeasurementError, match=message):
            run_tests([str(path)], report, "here")

    def test_their_number_is_reported(self, tmp_path, report, capsys, monkeypatch):
        monkeypatch.setenv("GAC_KERNEL_CACHE", "")
        path = tmp_path / "test_gate.py"
        path.write_text(self.PASSES)
        run_tests([str(path)], report, "here")
        assert report.data["kernel_tests"] == 1
        assert "1 tests of the kernels passed on this device" in capsys.readouterr().out

    def test_they_run_again_only_if_something_has_changed(self, tmp_path, report, capsys, monkeypatch):
        monkeypatch.setenv("GAC_KERNEL_CACHE", str(tmp_path / "cache"))
        path = tmp_path / "test_gate.py"
        path.write_text(self.PASSES)
        for expected in ("passed on this device", "passed on this device before, with these sources"):
            run_tests([str(path)], report, "here")
            assert capsys.readouterr().out.endswith(f"1 tests of the kernels {expected}\n")
            assert report.data.pop("kernel_tests") == 1
        report.environment["torch"] = "another"
        run_tests([str(path)], report, "here")
        assert "before" not in capsys.readouterr().out
        path.write_text(self.PASSES + self.FAILS)
        for _ in range(2):
            with pytest.raises(MeasurementError, match="1 of 2 tests"):
                run_tests([str(path)], report, "here")

    def test_those_of_networks_are_those_of_operations_too(self, tmp_path, report, capsys, monkeypatch):
        monkeypatch.setenv("GAC_KERNEL_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(equality, "ROOT", tmp_path)
        for folder in ("ops", "models"):
            (tmp_path / "tests" / folder).mkdir(parents=True)
            (tmp_path / "tests" / folder / f"test_gate_{folder}.py").write_text(self.PASSES)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = here\n")
        run_tests(["tests/ops", "tests/models/test_gate_models.py"], report, "here")
        assert capsys.readouterr().out.endswith("2 tests of the kernels passed on this device\n")
        run_tests(equality.OPERATION_TESTS, report, "here")
        assert capsys.readouterr().out.endswith(
            "1 tests of the kernels passed on this device before, with these sources\n"
        )

    def test_a_network_on_the_kernels_needs_them(self, monkeypatch, report):
        def fails(paths, report, marker):
            raise MeasurementError("the tests failed")

        monkeypatch.setattr(equality, "run_tests", fails)
        with pytest.raises(MeasurementError, match="the tests failed"):
            check(report, IMPLEMENTATIONS["ours-cupy"])

    def test_they_are_there(self):
        root = Path(__file__).parents[2]
        assert all((root / path).exists() for path in NETWORK_TESTS)
