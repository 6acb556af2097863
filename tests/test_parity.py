"""Whole networks against the original implementation, number for number.

Tolerances are those of tests/goldens/README.md: in float64 every spike count is equal; in float32
the quiet cases are compared closely, the others, where rounding decides single spikes, only against gross mistakes.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import monitor, neuron

import parity
from gac.checkpoint.authors import translate
from gac.config import TrainConfig
from gac.models import ms_resnet
from gac.models.fused import forward
from gac.ops import event_conv
from gac.training.optim import make_optimizer

NETS = parity.CASES["nets"]
QUIET = [case for case in parity.CASES["nets"] if case["case"].startswith("quiet")]
OTHERS = [case for case in parity.CASES["nets"] if case["case"] in ("gac_T6_c100", "plain_T6_c100", "T4_64")]


def name(case: dict) -> str:
    return f"{case['net']}-{case['case']}"


class Recorder:
    """Records what the goldens store of one forward pass: spike counts and the outputs of the stages."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.T = net.T
        self.stages: list[torch.Tensor] = []
        modules = [net.stem] + ([net.coding] if net.coding_name == "gac" else [])
        modules += [block for stage in net.stages for block in stage]
        self.hooks = [m.register_forward_hook(lambda _m, _i, y: self.stages.append(y.detach())) for m in modules]
        self.spikes = monitor.OutputMonitor(net, neuron.LIFNode, lambda s: int(s.detach().sum(dtype=torch.float64)))

    def close(self) -> None:
        self.spikes.close()
        for hook in self.hooks:
            hook.remove()

    def batch_first_stages(self) -> list[torch.Tensor]:
        sequences = (y if y.dim() == 5 else y.expand(self.T, *y.shape) for y in self.stages)
        return [y.transpose(0, 1).contiguous() for y in sequences]


def loss_of(logits: torch.Tensor, case: dict) -> torch.Tensor:
    smoothing = 0.0 if case["net"] == "cifar" else 0.1
    return F.cross_entropy(logits.mean(0), torch.tensor(case["labels"]), label_smoothing=smoothing)


def check_layers(recorder: Recorder, gold: dict, mode: str, tolerance: float) -> None:
    recorder.close()
    np.testing.assert_array_equal(recorder.spikes.records, gold[f"{mode}_spike_count"])
    stages = recorder.batch_first_stages()
    assert len(stages) == len(gold["stage_names"])
    norms = np.array([y.double().norm().item() for y in stages])
    unit = parity.rms_unit(gold[f"{mode}_stage_norm"], gold["stage_numel"])
    np.testing.assert_allclose(norms, gold[f"{mode}_stage_norm"], rtol=tolerance)
    means = np.array([y.double().mean().item() for y in stages])
    np.testing.assert_allclose(means / unit, gold[f"{mode}_stage_mean"] / unit, atol=tolerance, rtol=0)
    samples = np.stack([parity.sample(y) for y in stages])
    expected = gold[f"{mode}_stage_sample"]
    np.testing.assert_allclose(samples / unit[:, None], expected / unit[:, None], atol=tolerance, rtol=0)


def check_case(
    case: dict, dtype: torch.dtype, tolerance: dict[str, float], backend: str = "torch", hooks: bool = True
) -> None:
    """Compare a network with the goldens; without hooks, which prevent fusing, its inner layers are not compared."""
    precision = "f64" if dtype == torch.float64 else "f32"
    gold = parity.load(case["file"], case["case"])
    gold |= {k.removeprefix(f"{precision}."): v for k, v in gold.items() if k.startswith(f"{precision}.")}

    net, images = parity.network(case, dtype)
    net.set_backend(backend)
    net.eval()
    recorder = Recorder(net) if hooks else None
    with torch.no_grad():
        logits = net(images)
    if hooks:
        check_layers(recorder, gold, "eval", tolerance["stages"])
    np.testing.assert_allclose(logits.transpose(0, 1), gold["eval_logits"], atol=tolerance["logits"], rtol=0)
    assert abs(loss_of(logits, case).item() - gold["eval_loss"]) < tolerance["loss"]

    images.requires_grad_()
    net.train()
    recorder = Recorder(net) if hooks else None
    logits = net(images)
    if hooks:
        check_layers(recorder, gold, "train", tolerance["stages"])
    loss = loss_of(logits, case)
    loss.backward()
    np.testing.assert_allclose(logits.detach().transpose(0, 1), gold["train_logits"], atol=tolerance["logits"], rtol=0)
    assert abs(loss.item() - gold["train_loss"]) < tolerance["loss"]

    parameters = dict(net.named_parameters())
    names = [translate(str(key)) for key in gold["param_names"]]
    assert sorted(names) == sorted(parameters)
    gradients = [parameters[key].grad for key in names] + [images.grad]
    for kind in ("norm", "mean", "sample"):
        gold[f"grad_{kind}"] = np.concatenate([gold[f"grad_{kind}"], gold[f"input_grad_{kind}"][None]])
    unit = parity.rms_unit(gold["grad_norm"], np.append(gold["param_numel"], images.numel()))
    norms = np.array([g.double().norm().item() for g in gradients])
    np.testing.assert_allclose(norms, gold["grad_norm"], rtol=tolerance["gradients"])
    means = np.array([g.double().mean().item() for g in gradients])
    np.testing.assert_allclose(means / unit, gold["grad_mean"] / unit, atol=tolerance["gradients"], rtol=0)
    samples = np.stack([parity.sample(g) for g in gradients])
    expected = gold["grad_sample"]
    np.testing.assert_allclose(samples / unit[:, None], expected / unit[:, None], atol=tolerance["gradients"], rtol=0)

    buffers = dict(net.named_buffers())
    statistics = [buffers[translate(str(key))] for key in gold["buffer_names"]]
    unit = parity.rms_unit(gold["buffer_norm"], gold["buffer_numel"])
    norms = np.array([b.double().norm().item() for b in statistics])
    np.testing.assert_allclose(norms, gold["buffer_norm"], rtol=tolerance["statistics"])
    samples = np.stack([parity.sample(b) for b in statistics])
    np.testing.assert_allclose(
        samples / unit[:, None], gold["buffer_sample"] / unit[:, None], atol=tolerance["statistics"], rtol=0
    )
    assert all(b == 1 for key, b in buffers.items() if key.endswith("num_batches_tracked"))


# Others have the same networks but for the head, at T = 2 and 6, and on smaller images.
REPEATS = ("gac_T6_c10", "gac_T4_c100", "imagenet34-T4_224")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow if {c["case"], name(c)} & {*REPEATS} else []) for c in NETS],
    ids=[name(c) for c in NETS],
)
def test_float64_equals_the_original(case):
    # Half of this file's time: images of 32 x 32 to 224 x 224, of which the quiet cases' 8 x 8 say nothing.
    tolerance = {"logits": 1e-10, "loss": 1e-11, "stages": 1e-10, "statistics": 1e-10, "gradients": 1e-9}
    check_case(case, torch.float64, tolerance)


FLOAT32 = {"logits": 1e-5, "loss": 1e-5, "stages": 2e-5, "statistics": 1e-5, "gradients": 2e-4}


@pytest.mark.parametrize("case", QUIET, ids=name)
def test_float32_equals_the_original_where_no_spike_is_a_matter_of_rounding(case):
    check_case(case, torch.float32, FLOAT32)


@pytest.mark.parametrize(
    "case", [c for c in QUIET if name(c) in ("cifar-quiet_gac_T6", "imagenet18-quiet_T4_32")], ids=name
)
def test_the_cuda_kernels_equal_the_original_in_whole_networks(case, neurons_on_kernels):
    check_case(case, torch.float32, FLOAT32, backend="cupy")


@pytest.mark.parametrize("case", [c for c in QUIET if name(c) == "cifar-quiet_gac_T6"], ids=name)
def test_the_fused_network_equals_the_original(case, neurons_on_kernels, monkeypatch):
    # Slow at any T: at each barrier of the batch statistics, of 64 to 512 channels, every thread changes its stack.
    runs = []
    monkeypatch.setattr(ms_resnet.fused, "forward", lambda net, x: runs.append(net) or forward(net, x))
    check_case(case, torch.float32, FLOAT32, backend="cupy", hooks=False)
    assert len(runs) == 2


@pytest.mark.c_compiler
@pytest.mark.parametrize("case", QUIET, ids=name)
def test_c_kernels_and_events_equal_the_original(case, monkeypatch):
    runs, events = [], []
    convolve = event_conv._forward
    monkeypatch.setattr(ms_resnet.fused, "forward", lambda net, x: runs.append(net) or forward(net, x))
    monkeypatch.setattr(event_conv, "_forward", lambda *given: events.append(convolve(*given)) or events[-1])
    check_case(case, torch.float32, FLOAT32, backend="c", hooks=False)
    assert len(runs) == 2
    # Layers of full width, few of whose inputs spike; index is None where the convolution was dense after all.
    assert any(index is not None for _, index, _ in events)


@pytest.mark.parametrize("case", OTHERS, ids=name)
def test_float32_stays_near_the_original_where_rounding_decides_spikes(case):
    gold = parity.load(case["file"], case["case"])
    net, images = parity.network(case, torch.float32)
    for mode, spikes, logits_by, loss_by in (("eval", 0.01, 0.5, 0.05), ("train", 0.05, 2.0, 0.2)):
        recorder = Recorder(net.train(mode == "train"))
        with torch.no_grad():
            logits = net(images)
        recorder.close()
        np.testing.assert_allclose(recorder.spikes.records, gold[f"f32.{mode}_spike_count"], rtol=spikes)
        norms = [y.norm().item() for y in recorder.batch_first_stages()]
        np.testing.assert_allclose(norms, gold[f"f32.{mode}_stage_norm"], rtol=0.05)
        np.testing.assert_allclose(logits.transpose(0, 1), gold[f"f32.{mode}_logits"], atol=logits_by, rtol=0)
        assert abs(loss_of(logits, case).item() - gold[f"f32.{mode}_loss"]) < loss_by


def optimizer_of(net: torch.nn.Module, case: dict) -> torch.optim.SGD:
    config = TrainConfig(learning_rate=case["lr"], momentum=case["momentum"], weight_decay=case["weight_decay"])
    return make_optimizer(net.parameters(), config, torch.device("cpu"))


@pytest.mark.parametrize("case", [c for c in parity.CASES["sgd"] if "quiet" in c["case"]], ids=name)
def test_sgd_steps_stay_near_the_original_in_float32(case):
    gold = parity.load(case["file"], case["case"])
    net, images = parity.network(case, torch.float32)
    optimizer = optimizer_of(net, case)
    for step in range(case["steps"]):
        optimizer.zero_grad()
        loss = loss_of(net(images), case)
        loss.backward()
        optimizer.step()
        # From the second step on, rounding decides spikes.
        assert abs(loss.item() - gold["f32.loss"][step]) < (1e-5 if step == 0 else 0.2)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if "quiet" in c["case"] else pytest.mark.slow) for c in parity.CASES["sgd"]],
    ids=[name(c) for c in parity.CASES["sgd"]],
)
def test_sgd_steps_equal_the_original_in_float64(case):
    gold = parity.load(case["file"], case["case"])
    gold |= {k.removeprefix("f64."): v for k, v in gold.items() if k.startswith("f64.")}
    net, images = parity.network(case, torch.float64)
    optimizer = optimizer_of(net, case)
    net.train()
    for step in range(case["steps"]):
        recorder = Recorder(net)
        optimizer.zero_grad()
        loss = loss_of(net(images), case)
        loss.backward()
        optimizer.step()
        recorder.close()
        assert abs(loss.item() - gold["loss"][step]) < 1e-9
        np.testing.assert_array_equal(recorder.spikes.records, gold["step_spike_count"][step])

    recorder = Recorder(net.eval())
    with torch.no_grad():
        logits = net(images)
    recorder.close()
    np.testing.assert_allclose(logits.transpose(0, 1), gold["eval_logits"], atol=1e-9, rtol=0)
    np.testing.assert_array_equal(recorder.spikes.records, gold["eval_spike_count"])
    for kind, tensors in (("param", dict(net.named_parameters())), ("buffer", dict(net.named_buffers()))):
        found = [tensors[translate(str(key))] for key in gold[f"{kind}_names"]]
        unit = parity.rms_unit(gold[f"{kind}_norm"], gold[f"{kind}_numel"])[:, None]
        norms = np.array([t.detach().norm().item() for t in found])
        np.testing.assert_allclose(norms, gold[f"{kind}_norm"], rtol=1e-9)
        samples = np.stack([parity.sample(t) for t in found])
        np.testing.assert_allclose(samples / unit, gold[f"{kind}_sample"] / unit, atol=1e-9, rtol=0)
