"""What counts as watching or rewriting operations, and what a repeated computation remembers of it."""

from collections.abc import Callable

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gac.neuron import PRESETS, LIFNode
from gac.ops import lif, lif_cpu
from gac.ops.watchers import watched, watched_as_before

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


class Subclass(Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        return function(*args, **(kwargs or {}))


def seen_in(run: Callable[[Callable[[Tensor], Tensor]], object]) -> bool:
    """Return what ``watched`` says in the function that ``run`` gets."""
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(watched(x))
        return x * 2.0

    run(function)
    return seen[0]


def under(mode: object) -> Callable:
    def run(function: Callable[[Tensor], Tensor]) -> None:
        with mode:
            function(torch.ones(2))

    return run


def test_nothing_watches_plain_tensors() -> None:
    assert not watched(torch.ones(2))
    assert not watched(nn.Parameter(torch.ones(2)))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
        assert not watched(torch.ones(2))
    assert not seen_in(lambda f: torch.compile(f, backend="eager")(torch.ones(2)))


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda f: torch.jit.trace(f, torch.ones(2)), id="trace"),
        pytest.param(lambda f: make_fx(f)(torch.ones(2)), id="make_fx"),
        pytest.param(lambda f: torch.func.vmap(f)(torch.ones(2)), id="vmap"),
        pytest.param(lambda f: torch.func.grad(lambda x: f(x).sum())(torch.ones(2)), id="grad"),
        pytest.param(lambda f: torch.func.functionalize(f)(torch.ones(2)), id="functionalize"),
        pytest.param(lambda f: f(torch.ones(2).as_subclass(Subclass)), id="subclass"),
        pytest.param(under(FakeTensorMode()), id="fake"),
        pytest.param(under(FunctionMode()), id="function mode"),
        pytest.param(under(FlopCounterMode(display=False)), id="dispatch mode"),
        pytest.param(under(forward_ad.dual_level()), id="forward mode"),
    ],
)
def test_whoever_watches_is_noticed(run: Callable) -> None:
    assert seen_in(run)
    assert not watched(torch.ones(2))


@pytest.mark.parametrize("strict", [True, False])
def test_export_is_noticed(strict: bool) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (2.0 if watched(x) else 3.0)

    exported = torch.export.export(Module(), (torch.ones(2),), strict=strict).module()
    assert exported(torch.ones(2)).tolist() == [2.0, 2.0]


def test_a_repeated_computation_is_watched_as_before() -> None:
    with watched_as_before(True):
        assert watched(torch.ones(2))
    with FlopCounterMode(display=False), watched_as_before(False):
        assert not watched(torch.ones(2))
    assert not watched(torch.ones(2))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_neuron_in_place_steps_aside(preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    node = LIFNode.from_parameters(PRESETS[preset], keeps_state=False)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = node(x)
    assert 0 < expected.mean() < 1
    monkeypatch.setattr(lif_cpu, "lif_cpu", lambda *_: pytest.fail("in place"))
    for run in (make_fx(node)(x), torch.jit.trace(node, x, check_trace=False)):
        assert torch.equal(run(x), expected)
    assert torch.equal(torch.compile(node, backend="eager", fullgraph=True)(x), expected)
    with FlopCounterMode(display=False):
        assert torch.equal(node(x), expected)


@pytest.mark.parametrize("v_reset", [0.0, 0.25, None])
@pytest.mark.parametrize("kind", [surrogate.PiecewiseQuadratic, surrogate.Rect, surrogate.Sigmoid, surrogate.ATan])
def test_a_traced_neuron_has_the_surrogate_gradient(kind: type, v_reset: float | None) -> None:
    neuron = LIFNode(v_reset=v_reset, surrogate_function=kind(alpha=1.5)).lif_parameters()
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 1.5
    traced = torch.jit.trace(lambda x: lif.reference(x, 0.0, neuron)[0], x)
    results = []
    for function in (traced, lambda x: lif.reference(x, 0.0, neuron)[0]):
        leaf = x.clone().requires_grad_()
        spikes = function(leaf)
        spikes.cumsum(0).square().sum().backward()
        results.append((spikes.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_neurons_with_other_constants_compile_in_one_process() -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 1.5
    torch._dynamo.reset()
    kinds = (surrogate.PiecewiseQuadratic(1.0), surrogate.Rect(2.0), surrogate.PiecewiseQuadratic(0.5))
    for kind, tau, v_threshold, v_reset in zip(
        kinds, (2.0, 4 / 3, 3.0), (1.0, 0.5, 0.75), (0.0, 0.25, 0.5), strict=True
    ):
        node = LIFNode(tau, False, v_threshold, v_reset, kind)
        node.keeps_state = False
        compiled = torch.compile(node, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), node(x))
        node.v_threshold *= 2
        assert torch.equal(compiled(x), node(x))
