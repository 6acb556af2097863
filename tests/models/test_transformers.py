"""Whatever records, counts or rewrites a network's operations gets the specification; results are the network's."""

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from spikingjelly.activation_based import op_counter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.tensorboard import SummaryWriter

from gac.coding.baselines import BaselineCoding
from gac.coding.gated import GatedAttentionCoding
from gac.errors import InputError
from gac.models import create_model
from gac.models.ms_resnet import MSResNet
from gac.neuron import SURROGATES, LIFNode
from gac.ops import backend as choice
from gac.ops import lif, lif_cpu
from lively import lively

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What depends on shapes is fixed by a recording, as PyTorch says at each of them.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def network(
    coding: str = "gac", backend: str = "torch", name: str = "gac_msresnet18_cifar", surrogate: str | None = None
) -> MSResNet:
    torch.manual_seed(0)
    sizes = {"width": 8, "depth": [1] * (3 if "cifar" in name else 4), "temporal_init": "alive"}
    net = create_model(name, 5, 3, coding=coding, backend="torch", surrogate=surrogate, **sizes)
    lively(net, images(9, 16)).set_backend(backend)
    return net


def images(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def assert_same_network(other: Callable[[Tensor], Tensor], net: MSResNet, batch: int = 2) -> None:
    """Images that the recording did not see give the network's logits, which are others than those of the recording."""
    x = images(1, batch)
    torch.manual_seed(1)
    expected = net(x)
    assert not torch.equal(expected[:, :2], net(images()))
    torch.manual_seed(1)
    assert torch.equal(other(x), expected)


# --- Recording: an example goes in, and what comes out runs on other images and other numbers of them


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("coding", ["gac", "direct", "rate", "latency", "phase"])
def test_jit_trace(coding: str, grad: bool) -> None:
    # SpikingJelly's function for the second surrogate is one that TorchScript cannot save.
    net = network(coding, surrogate="erf" if coding == "direct" else None)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, images(), check_trace=coding != "rate")
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        assert_same_network(loaded, net, batch=3)


@pytest.mark.parametrize(
    ("name", "surrogate"),
    [("gac_msresnet18_cifar", None), ("gac_msresnet18", None), *(("msresnet18_cifar", each) for each in SURROGATES)],
)
def test_a_traced_network_has_the_surrogate_gradient(name: str, surrogate: str | None) -> None:
    net = network("gac" if name.startswith("gac") else "direct", name=name, surrogate=surrogate)
    traced, x = torch.jit.trace(copy.deepcopy(net), images(), check_trace=False), images(1)
    # TorchScript rewrites its graph in the first calls.
    for each in (net, traced, traced, traced):
        each.zero_grad()
        each(x).square().sum().backward()
    for (key, parameter), other in zip(net.named_parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=key)
    assert net.stem.conv.weight.grad.abs().max() > 0


def test_jit_trace_says_that_a_check_is_lost() -> None:
    with pytest.warns(UserWarning, match=r"drops the check that intensities lie in \[0, 1\]"):
        torch.jit.trace(network("rate"), images(), check_trace=False)


@pytest.mark.parametrize("coding", ["gac", "direct", "rate", "latency"])
def test_export_for_any_batch(coding: str) -> None:
    net = network(coding)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (images(),), dynamic_shapes={"x": {0: batch}}, strict=False)
    assert not any("gac" in str(node.target) or "sj" in str(node.target) for node in program.graph.nodes)
    assert_same_network(program.module(), net, batch=3)


def test_export_keeps_the_check_of_intensities() -> None:
    exported = torch.export.export(network("latency"), (images(),)).module()
    with pytest.raises(RuntimeError, match=r"latency coding takes intensities in \[0, 1\]"):
        exported(images() + 1)


def test_export_of_phase_coding_is_refused() -> None:
    with pytest.raises(InputError, match="phase coding cannot be exported"):
        torch.export.export(network("phase"), (images(),))


@pytest.mark.parametrize("grad", [True, False])
def test_make_fx(grad: bool) -> None:
    net = network()
    with torch.set_grad_enabled(grad):
        assert_same_network(make_fx(lambda x: net(x))(images()), net)


def run_onnx(file: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_onnx_of_the_torchscript_exporter(tmp_path: Path) -> None:
    net, file = network(), tmp_path / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (images(),), file, dynamo=False)
    assert {node.domain for node in onnx.load(file).graph.node} == {""}
    x = images(1)
    torch.testing.assert_close(run_onnx(file, x), net(x), rtol=0, atol=1e-6)
    # It holds the number of images as a constant; another one is an error, never a wrong result.
    with pytest.raises(Exception, match=r"FAIL|RUNTIME_EXCEPTION|INVALID_ARGUMENT"):
        run_onnx(file, images(1, batch=5))


def test_onnx_for_any_batch(tmp_path: Path) -> None:
    net, file = network(), tmp_path / "network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (images(),), file, dynamo=True, verbose=False, dynamic_shapes=({0: Dim("batch")},))
    assert {node.domain for node in onnx.load(file).graph.node} == {""}
    for batch in (2, 5):
        x = images(1, batch)
        torch.testing.assert_close(run_onnx(file, x), net(x), rtol=0, atol=1e-6)


def test_tensorboard_draws_the_graph(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(network(), images())
    assert next(tmp_path.iterdir()).stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["network", "coding", "baseline", "neuron"])
def test_symbolic_tracing_is_refused(kind: str) -> None:
    parts = {"network": network, "coding": lambda: GatedAttentionCoding(3, 3), "neuron": LIFNode}
    parts["baseline"] = lambda: BaselineCoding("rate", 3)
    with pytest.raises(InputError, match=r"torch.fx.symbolic_trace cannot follow .* use torch.export.export"):
        torch.fx.symbolic_trace(nn.Sequential(parts[kind]()))


# --- Watching


@pytest.mark.parametrize("training", [True, False])
def test_counted_operations_are_those_of_the_specification(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for _ in range(2):
        counters = [op_counter.ACCounter(), op_counter.MACCounter(), op_counter.MemoryAccessCounter()]
        counters += [op_counter.FlopCounter(), op_counter.SynOpCounter()]
        net = network().train(training)
        with op_counter.DispatchCounterMode(counters), torch.no_grad():
            net(images())
        counts.append([each.get_total() for each in counters])
        monkeypatch.setattr(lif_cpu, "lif_cpu", lif.reference)
        monkeypatch.setattr(LIFNode, "_multi_step_torch", lambda self, x, v: lif.reference(x, v, self.lif_parameters()))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_a_watched_network_gives_what_it_gives_alone(neurons_on_kernels) -> None:
    for backend in ("torch", "auto", "cupy"):
        net = network(backend=backend)
        expected = net(images())
        with op_counter.DispatchCounterMode([op_counter.MACCounter()]):
            assert torch.equal(net(images()), expected)


def test_gradients_by_torch_func() -> None:
    net, x = network(), images()
    parameters = dict(net.named_parameters())
    state = dict(net.named_buffers())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, (values, state), (x,)).square().sum()

    found = torch.func.grad(loss)(parameters)
    net(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


# --- Compiling


@pytest.mark.parametrize(
    ("coding", "training", "backend"),
    [
        ("gac", True, "aot_eager"),
        ("gac", False, "eager"),
        ("rate", False, "eager"),
        ("latency", True, "eager"),
        pytest.param("gac", True, "inductor", marks=pytest.mark.slow),
        pytest.param("gac", False, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compile_makes_one_graph(coding: str, training: bool, backend: str) -> None:
    net = network(coding).train(training)
    expected = copy.deepcopy(net)
    # Another order of float32 operations could change a spike, and with it everything behind it.
    precision = torch.float64 if backend == "inductor" else torch.float32
    net, expected, x = net.to(precision), expected.to(precision), images(1).to(precision)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    torch.manual_seed(1)
    ours = compiled(x)
    torch.manual_seed(1)
    theirs = expected(x)
    atol = 1e-9 if backend == "inductor" else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, parameter), other in zip(net.named_parameters(), expected.parameters(), strict=True):
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-5 * scale, msg=name)
    for (name, buffer), other in zip(net.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_compile_for_cuda_makes_one_graph_of_the_kernels(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with fake tensors, so that it needs no GPU; autograd's own trace of the backward pass would need one."""
    monkeypatch.setattr(choice, "cupy_status", lambda device: choice.Status(device.type == "cuda", "faked"))
    graphs = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable:
        names = [str(node.target).removesuffix(".default") for node in graph.graph.nodes]
        graphs.append({name: names.count(name) for name in names if name.startswith("gac.")})
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode(), torch.device("cuda"):
        net = network(backend="auto").train(training)
        logits = torch.compile(net, backend=keep, fullgraph=True)(torch.randn(2, 3, 16, 16))
    assert (logits.device.type, logits.shape) == ("cuda", (3, 2, 5))
    kernels = {"gac.gate_lif": 1, "gac.norm_lif": 3, "gac.residual_lif": 2, "gac.residual_lif_pool": 1}
    # A block has two normalisations, and here each block's shortcut has one.
    assert graphs == [kernels | {"gac.batch_statistics": 9} if training else kernels]
