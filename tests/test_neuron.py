import math
from typing import get_args

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, monitor, neuron, surrogate
from torch import nn

import gac.neuron
import parity
from gac.errors import InputError
from gac.models.registry import neuron_constants
from gac.neuron import PRESETS, LIFNode, Surrogate, make_parameters

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LIF_CASES = [case["case"] for case in parity.CASES["lif"]]


@pytest.mark.parametrize("case", LIF_CASES)
@pytest.mark.parametrize("step_by_step", [False, True], ids=["multi_step", "step_by_step"])
def test_presets_equal_the_original(case, step_by_step):
    gold = parity.load("lif_cases.npz", case)
    node = LIFNode.from_parameters(PRESETS[case.split(".")[0]], "torch")
    node.store_v_seq = step_by_step
    x = torch.from_numpy(gold["x"]).requires_grad_()
    spikes = node(x)
    np.testing.assert_array_equal(spikes.detach(), gold["spikes"])
    spikes.backward(torch.from_numpy(gold["grad_out"]))
    np.testing.assert_allclose(x.grad, gold["grad_in"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_presets_fire_above_the_threshold_and_not_at_it(dtype, preset, step_mode):
    node = LIFNode.from_parameters(PRESETS[preset], "torch")
    node.step_mode = step_mode
    threshold = torch.tensor(PRESETS[preset].v_threshold, dtype=dtype)
    x = torch.stack(
        [
            torch.nextafter(threshold, torch.tensor(-math.inf, dtype=dtype)),
            threshold,
            torch.nextafter(threshold, torch.tensor(math.inf, dtype=dtype)),
        ]
    )
    spikes = node(x[None])[0] if step_mode == "m" else node(x)
    assert spikes.tolist() == [0, 0, 1]
    assert spikes.dtype == dtype


def test_a_tie_reached_by_integration_does_not_fire():
    # 0.5 * 1 + 0.5 = 1: the potential meets the threshold at the second step only.
    assert LIFNode(backend="torch")(torch.tensor([[1.0], [0.5]])).tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("dtype", "state"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_membrane_is_float32_for_half_precision_input(dtype, state, preset):
    node = LIFNode.from_parameters(PRESETS[preset], "torch")
    spikes = node(torch.randn(3, 5).to(dtype))
    assert (spikes.dtype, node.v.dtype) == (dtype, state)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_membrane_is_float32_under_autocast(preset):
    node = LIFNode.from_parameters(PRESETS[preset], "torch")
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        x = layer(torch.randn(3, 2, 4))
        spikes = node(x)
    assert (x.dtype, spikes.dtype, node.v.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.c_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keeps_state", [True, False])
def test_the_c_kernels_run_half_precision_in_float32(dtype, keeps_state):
    x = (2 * torch.randn(4, 2, 50)).to(dtype)
    results = []
    for backend in ("torch", "c"):
        node = LIFNode.from_parameters(PRESETS["cifar"], backend, keeps_state)
        leaf = x.clone().requires_grad_()
        spikes = node(leaf)
        spikes.float().square().sum().backward()
        results.append((spikes.detach(), leaf.grad, torch.as_tensor(node.v).detach()))
    assert results[1][2].dim() == (2 if keeps_state else 0)
    for torchs, cs in zip(*results, strict=True):
        assert torchs.dtype == cs.dtype
        torch.testing.assert_close(torchs, cs, rtol=1e-2 if torchs is results[0][1] else 0, atol=0)


SURROGATES = [
    surrogate.PiecewiseQuadratic(1.0),
    surrogate.Rect(1.0),
    surrogate.Sigmoid(4.0),
    surrogate.ATan(2.0),
    surrogate.PiecewiseLeakyReLU(),
]


@pytest.mark.parametrize("surrogate_function", SURROGATES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("v_reset", [0.0, 0.25, None])
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("decay_input", [False, True])
def test_equals_spikingjelly_where_no_potential_meets_the_threshold(
    surrogate_function, v_reset, detach_reset, decay_input
):
    arguments = {
        "tau": 2.0,
        "decay_input": decay_input,
        "v_threshold": 0.75,
        "v_reset": v_reset,
        "surrogate_function": surrogate_function,
        "detach_reset": detach_reset,
        "step_mode": "m",
    }
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0)) * 1.5
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for node in (neuron.LIFNode(**arguments), LIFNode(**arguments, backend="torch")):
        leaf = x.clone().requires_grad_()
        spikes = node(leaf)
        (spikes * weight).sum().backward()
        results.append((spikes.detach(), node.v.detach(), leaf.grad))
    (s1, v1, g1), (s2, v2, g2) = results
    assert 0.05 < s1.mean() < 0.95
    assert torch.equal(s1, s2)
    torch.testing.assert_close(v1, v2, atol=1e-6, rtol=0)
    torch.testing.assert_close(g1, g2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("T", [1, 2, 5])
def test_single_steps_equal_the_multi_step_execution(preset, T):
    x = torch.randn(T, 4, 8, generator=torch.Generator().manual_seed(T))
    together, apart = (
        LIFNode.from_parameters(PRESETS[preset], "torch"),
        LIFNode.from_parameters(PRESETS[preset], "torch"),
    )
    functional.set_step_mode(apart, "s")
    spikes = together(x)
    assert torch.equal(spikes, torch.stack([apart(frame) for frame in x]))
    torch.testing.assert_close(together.v, apart.v, atol=1e-6, rtol=0)


def test_state_continues_until_reset_and_carries_gradient():
    node = LIFNode(backend="torch")
    first, second = torch.full((1, 1), 0.75, requires_grad=True), torch.full((1, 1), 0.75)
    assert node(first).item() == 0
    assert node(second).item() == 1
    node.v.sum().backward()
    assert first.grad.abs().item() > 0
    functional.reset_net(node)
    assert node(second).item() == 0


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("start", [1, 1.0])
def test_a_potential_may_be_set_as_a_number(backend, start):
    x = torch.linspace(0, 1, 12).view(3, 1, 4)
    node, whole = LIFNode(backend=backend), LIFNode(backend=backend)
    node.v, whole.v = start, torch.ones(1, 4)
    assert torch.equal(node(x), whole(x))
    assert node(x).any()


def test_another_input_shape_starts_afresh():
    node = LIFNode(backend="torch")
    node(torch.full((1, 2), 0.75))
    assert node(torch.full((1, 3), 0.75)).sum() == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_channels_last_frames_stay_channels_last(preset):
    frames = torch.randn(8, 3, 4, 5).to(memory_format=torch.channels_last)
    spikes = LIFNode.from_parameters(PRESETS[preset], "torch")(frames.unflatten(0, (4, 2)))
    assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_spikingjelly_monitors_see_the_spikes():
    net = nn.Sequential(LIFNode(backend="torch"), LIFNode(backend="torch"))
    with monitor.OutputMonitor(net, neuron.LIFNode) as spikes:
        out = net(torch.randn(4, 2, 3).abs() * 2)
        assert spikes.monitored_layers == ["0", "1"]
        assert torch.equal(spikes["1"][0], out)


@pytest.mark.parametrize("tau", [1.0, 0.5, math.nan, "2"])
def test_a_time_constant_that_does_not_decay_is_refused(tau):
    with pytest.raises(ValueError, match="tau must be a number > 1"):
        LIFNode(tau=tau)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be"):
        LIFNode(backend="triton")


def test_cupy_for_a_tensor_on_the_cpu_is_an_error():
    with pytest.raises(ValueError, match="CUDA device"):
        LIFNode(backend="cupy")(torch.zeros(2, 3))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_kernels_equal_the_torch_backend_call_after_call(neurons_on_kernels, preset, dtype, channels_last):
    frames = torch.randn(2 * 3 * 2, 4, 5, 3, generator=torch.Generator().manual_seed(0)) * 1.5
    if channels_last:
        frames = frames.to(memory_format=torch.channels_last)
    first, second = frames.to(dtype).unflatten(0, (2, 3, 2))
    results = []
    for backend in ("torch", "cupy"):
        node = LIFNode.from_parameters(PRESETS[preset], backend)
        leaves = [x.clone().requires_grad_() for x in (first, second)]
        spikes = torch.cat([node(x) for x in leaves])  # the state and its gradient pass from call to call
        spikes.float().cumsum(0).square().sum().backward()
        results.append((spikes.detach(), node.v.detach(), *(x.grad for x in leaves)))
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    assert torch.equal(results[0][0], results[1][0])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for torchs, kernels in zip(results[0][1:], results[1][1:], strict=True):
        scale = torchs.abs().max().item()
        torch.testing.assert_close(kernels, torchs, atol=tolerance * scale, rtol=0)


def test_a_surrogate_that_the_kernels_lack(neurons_on_kernels, caplog):
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="not Erf"):
        LIFNode(surrogate_function=surrogate.Erf(), backend="cupy")(x)
    with caplog.at_level("INFO", "gac"):
        LIFNode(surrogate_function=surrogate.Erf(), backend="auto")(x)
    assert "torch (the LIF kernels have the surrogates" in caplog.text


# --- Constants chosen one by one


@pytest.mark.parametrize("preset", PRESETS)
def test_the_constants_of_a_preset_make_the_preset(preset: str) -> None:
    made, expected = make_parameters(preset, **neuron_constants("msresnet18_cifar", preset)), PRESETS[preset]
    assert made.flatten() == expected.flatten()
    assert make_parameters(preset) is not expected
    assert make_parameters(preset).flatten() == expected.flatten()
    assert make_parameters(expected, tau=3.0).flatten() == (3.0, *expected.flatten()[1:])
    assert get_args(Surrogate) == tuple(gac.neuron.SURROGATES)


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("name", gac.neuron.SURROGATES)
@pytest.mark.parametrize("tau", [1.25, 3.0, 1e9])
def test_chosen_constants_are_those_of_the_formula(tau: float, name: str, detach_reset: bool) -> None:
    chosen = make_parameters("cifar", tau=tau, v_threshold=0.7, surrogate=name, detach_reset=detach_reset)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    spikes = LIFNode.from_parameters(chosen, "torch")(x)

    function, v, expected = gac.neuron.SURROGATES[name](), torch.zeros(64), []
    y = x.detach().clone().requires_grad_()
    for each in y:
        h = (1 - 1 / tau) * v + each
        s = function(h - 0.7)
        v = (1 - (s.detach() if detach_reset else s)) * h
        expected.append(s)
    expected = torch.stack(expected)
    assert spikes.equal(expected)
    assert 0 < spikes.mean() < 1
    weights = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    spikes.backward(weights)
    expected.backward(weights)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"tau": 1.0}, r"tau must be a number > 1 .* got 1.0; a decay d of the potential is tau = 1 / \(1 - d\)"),
        ({"tau": 0.5}, "tau must be a number > 1"),
        ({"tau": math.nan}, "tau must be a number > 1"),
        ({"tau": math.inf}, "tau must be a number > 1"),
        ({"tau": "2"}, "tau must be a number > 1"),
        ({"v_threshold": 0}, "v_threshold must be a number > 0, got 0"),
        ({"v_threshold": -1.0}, "v_threshold must be a number > 0"),
        ({"v_threshold": math.nan}, "v_threshold must be a number > 0"),
        ({"v_threshold": 1e-60}, "v_threshold must be a number > 0"),
        ({"v_threshold": True}, "v_threshold must be a number > 0"),
        ({"surrogate": "rect"}, r"surrogate must be one of triangle, .*erf \(did you mean rectangle\?\), got 'rect'"),
        ({"surrogate": "PiecewiseQuadratic"}, r"did you mean triangle\?"),
        ({"surrogate": "ATAN"}, r"did you mean atan\?"),
        ({"surrogate": "xyz"}, "surrogate must be one of triangle, .*erf, got 'xyz'"),
        ({"detach_reset": 1}, "detach_reset must be True or False, got 1"),
        ({"neuron": "mnist"}, "neuron must be one of cifar, imagenet, got 'mnist'"),
    ],
)
def test_constants_that_make_no_neuron_are_refused(constants: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_parameters(**{"neuron": "cifar"} | constants)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"v_threshold": math.nan}, "v_threshold must be a finite number, got nan"),
        ({"v_threshold": 1e39}, "v_threshold must be a finite number"),
        ({"v_threshold": "1"}, "v_threshold must be a finite number, got '1'"),
        ({"v_threshold": math.inf, "v_reset": None}, "v_threshold must be a finite number, got inf"),
        ({"v_threshold": torch.ones(2)}, "v_threshold must be a finite number"),
        ({"v_threshold": torch.tensor(1.0, requires_grad=True)}, "v_threshold must be a finite number"),
        ({"v_reset": math.nan}, "v_reset must be a finite number"),
        ({"v_reset": False}, "v_reset must be a finite number"),
        ({"decay_input": "no"}, "decay_input must be True or False, got 'no'"),
        ({"detach_reset": 1}, "detach_reset must be True or False, got 1"),
        ({"store_v_seq": "torch"}, "store_v_seq must be True or False, got 'torch'"),
        ({"surrogate_function": "atan"}, r"must be one of SpikingJelly's, such as surrogate\.ATan\(\), got"),
        ({"surrogate_function": surrogate.ATan}, "surrogate_function must be one of SpikingJelly's"),
    ],
)
def test_arguments_that_spikingjelly_takes_without_a_word_are_refused(argument: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LIFNode(**argument)


def test_numbers_of_other_types_are_numbers() -> None:
    for half in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        node = LIFNode(v_threshold=half, v_reset=-1, tau=2 + half)
        constants = node.v_threshold, node.v_reset, node.tau
        assert [(type(value), value) for value in constants] == [(float, 0.5), (float, -1.0), (float, 2.5)]


@pytest.mark.c_compiler
@pytest.mark.parametrize("backend", ["torch", "c"])
def test_with_an_infinite_threshold_a_neuron_only_integrates(backend: str) -> None:
    node = LIFNode(v_threshold=math.inf, backend=backend)
    x = torch.ones(2, 3, requires_grad=True)
    spikes = node(x)
    (spikes.sum() + node.v.sum()).backward()
    assert spikes.count_nonzero() == 0
    assert torch.equal(node.v, torch.full((3,), 1.5))
    assert torch.equal(x.grad, torch.tensor([[0.5], [1.0]]).expand(2, 3))


@pytest.mark.c_compiler
def test_what_a_subclass_adds_is_done_once_in_half_precision() -> None:
    class Doubled(LIFNode):
        def multi_step_forward(self, x_seq: torch.Tensor) -> torch.Tensor:
            return super().multi_step_forward(2 * x_seq)

    x = torch.full((1, 3), 0.4, dtype=torch.bfloat16)
    assert Doubled(backend="c")(x).count_nonzero() == 0
