"""The fused execution against the modules one by one; the kernels run on the CPU (tests/cuda_on_cpu) or on a GPU."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, monitor, neuron, surrogate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from cuda_on_cpu.launcher import KernelsOnCpu
from devices import KERNELS
from gac.execution.environment import describe_backend
from gac.models import create_model, fused
from gac.models.ms_resnet import MSBlock, MSResNet
from gac.neuron import LIFNode
from gac.ops import backend
from gac.ops.cuda import launch
from gac.ops.cuda.compiler import Kernel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=KERNELS)
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run: see ``KERNELS``."""
    if request.param == "cpu":
        request.getfixturevalue("neurons_on_kernels")
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched so far."""
    names = []
    launch_kernel = launch.launch

    def record(kernel: Kernel, *arguments: object) -> None:
        names.append(kernel.instance.partition("<")[0])
        launch_kernel(kernel, *arguments)

    monkeypatch.setattr(launch, "launch", record)
    return names


def network(name: str = "gac_msresnet18_cifar", seed: int = 0, T: int = 3, **options: object) -> MSResNet:
    """Return a small network whose BatchNorms do something and whose layers all fire."""
    torch.manual_seed(seed)
    depth = [1, 1, 1] if "cifar" in name else [1, 1, 1, 1]
    net = create_model(name, 5, T, **{"width": 8, "depth": depth, "temporal_init": "alive"} | options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
    return net


def images(device: str, batch: int = 4, side: int = 16) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(7)).to(device)


def train_step(net: MSResNet, x: Tensor) -> Tensor:
    net.zero_grad()
    logits = net(x)
    F.cross_entropy(logits.mean(0), torch.arange(len(x), device=x.device) % 5).backward()
    return logits.detach()


def assert_same_gradients(net: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for (key, p), q in zip(net.named_parameters(), expected.parameters(), strict=True):
        scale = q.grad.abs().max().item()
        largest = (p.grad - q.grad).abs().max().item()
        assert largest <= tolerance * max(scale, 1e-8), f"{key}: {largest:.1e} of {scale:.1e}"


# --- The whole network


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["gac_msresnet18_cifar", "gac_msresnet18"])
def test_both_executions_are_one_network(name: str, seed: int, device: str, launched: list[str]) -> None:
    # Seeds at which no membrane is so close to its threshold that rounding decides the spike.
    net = network(name, seed).to(device, memory_format=torch.channels_last)
    plain = copy.deepcopy(net)
    plain.set_backend("torch")
    x = images(device)
    logits = train_step(net, x)
    ran_fused = set(launched)
    expected = train_step(plain, x)
    assert {"gate_lif_forward", "norm_lif_forward", "residual_lif_forward", "residual_lif_pool_forward"} <= ran_fused
    assert "lif_forward" not in ran_fused
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert_same_gradients(net, plain, 5e-5)
    for (key, a), b in zip(net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=key)
    with torch.inference_mode():
        torch.testing.assert_close(net.eval()(x), plain.eval()(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("surrogate", "detach_reset"), [("rectangle", False), ("atan", True), ("erf", False)])
def test_chosen_constants_give_the_same_in_both(
    surrogate: str, detach_reset: bool, device: str, launched: list[str]
) -> None:
    constants = {"tau": 3.0, "v_threshold": 0.6, "surrogate": surrogate, "detach_reset": detach_reset}
    net = network(width=4, **constants).to(device)
    plain = copy.deepcopy(net)
    plain.set_backend("torch")
    x = images(device, batch=2, side=8)
    logits = train_step(net, x)
    assert ("norm_lif_forward" in launched) is (surrogate != "erf")
    expected = train_step(plain, x)
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert_same_gradients(net, plain, 5e-5)


@pytest.mark.parametrize("gate", ["temporal", "spatial_channel"])
def test_an_ablation_of_the_gate_runs_fused(gate: str, device: str, launched: list[str]) -> None:
    net = network(gate=gate, width=4).to(device)
    plain = copy.deepcopy(net)
    plain.set_backend("torch")
    x = images(device, batch=2, side=8)
    logits = train_step(net, x)
    assert "gate_lif_forward" in launched
    expected = train_step(plain, x)
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert_same_gradients(net, plain, 5e-5)


@pytest.mark.parametrize("coding", ["direct", "rate", "latency", "phase"])
def test_every_coding_runs_fused(coding: str, device: str, launched: list[str]) -> None:
    net = network(coding=coding).to(device)
    plain = copy.deepcopy(net)
    plain.set_backend("torch")
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)
    torch.manual_seed(2)
    logits = net.eval()(x)
    assert "residual_lif_forward" in launched
    torch.manual_seed(2)
    torch.testing.assert_close(logits, plain.eval()(x), rtol=0, atol=1e-6)


def test_sequences_run_fused_behind_the_coding(device: str, launched: list[str]) -> None:
    net = network().to(device)
    plain = copy.deepcopy(net)
    plain.set_backend("torch")
    x = torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)
    logits = net(x)
    assert "residual_lif_forward" in launched
    assert "gate_lif_forward" not in launched
    torch.testing.assert_close(logits, plain(x), rtol=0, atol=1e-6)


def test_a_frozen_batch_norm_stays_as_it_is(device: str) -> None:
    net = network().to(device)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    plain = copy.deepcopy(net)
    plain.set_backend("torch")
    before = {key: buffer.clone() for key, buffer in net.named_buffers()}
    x = images(device)
    torch.testing.assert_close(train_step(net, x), train_step(plain, x), rtol=0, atol=1e-6)
    assert_same_gradients(net, plain, 5e-5)
    for key, buffer in net.named_buffers():
        assert torch.equal(buffer, before[key]), key


def test_evaluation_with_another_epsilon_in_each_batch_norm(device: str) -> None:
    net = network().to(device).eval()
    for i, module in enumerate(module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        module.eps = 0.1 * (i + 1)
    plain = copy.deepcopy(net)
    plain.set_backend("torch")
    x = images(device)
    with torch.no_grad():
        logits, expected = net(x), plain(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", ["conv1", "conv2", "shortcut"])
def test_one_frozen_batch_norm_of_a_block(part: str, device: str) -> None:
    net = network().to(device)
    norm = net.stages[0][0].get_submodule(part).norm.eval()
    norm.running_mean.fill_(0.1)
    plain = copy.deepcopy(net)
    plain.set_backend("torch")
    x = images(device)
    # The two of a residual sum are in one mode, or the modules run.
    assert (fused.obstacle(net, x) is None) is (part == "conv1")
    torch.testing.assert_close(train_step(net, x), train_step(plain, x), rtol=0, atol=1e-6)
    assert_same_gradients(net, plain, 5e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"momentum": None},
        {"track_running_stats": False},
        {"num_batches_tracked": None},
        {"num_batches_tracked": torch.tensor(0, dtype=torch.int32)},
    ],
    ids=["average", "untracked", "uncounted", "int32"],
)
def test_running_statistics_of_other_kinds(changed: dict, device: str) -> None:
    net = network().to(device)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, value in changed.items():
                setattr(module, name, value.to(device, copy=True) if isinstance(value, Tensor) else value)
    plain = copy.deepcopy(net)
    plain.set_backend("torch")
    for seed in range(2):
        x = images(device) + seed
        torch.testing.assert_close(train_step(net, x), train_step(plain, x), rtol=0, atol=1e-6)
    for (key, a), b in zip(net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiles_without_graph_breaks(mode: str, device: str, request: pytest.FixtureRequest) -> None:
    # Of the C kernels a compiler sees nothing: it compiles the modules, whose results are others by rounding.
    in_c = request.node.callspec.params["device"] == "c"
    net = network(width=4).to(device).train(mode == "train")  # too narrow for convolutions by events
    eager = copy.deepcopy(net)
    # On the CPU inductor would compute what the kernels' shim computes with other rounding, in minutes.
    compiled = torch.compile(net, backend="aot_eager" if device == "cpu" else "inductor", fullgraph=True)
    x = images(device)
    logits, expected = compiled(x), eager(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6 if in_c else 0 if device == "cpu" else 1e-2)
    if mode == "train" and device == "cpu":
        logits.logsumexp(-1).sum().backward()
        expected.logsumexp(-1).sum().backward()
        assert_same_gradients(net, eager, 5e-5 if in_c else 0.0)
        for (key, a), b in zip(net.named_buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if in_c else 0, msg=key)


def test_a_training_step_reads_no_value_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "cupy_status", lambda device: backend.Status(True, "fake tensors run nowhere"))
    with FakeTensorMode():
        net, x = network(), torch.randn(4, 3, 16, 16)
        assert fused.obstacle(net, x) is not None
        net.set_backend("cupy")
        assert fused.obstacle(net, x) is None
        loss = net(x).logsumexp(-1).sum()
        loss.backward()
        assert net.stem.conv.weight.grad.shape == (8, 3, 3, 3)
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.c_kernels
def test_evaluation_in_c_is_the_same_in_any_number_of_threads() -> None:
    net, x, before = network(width=32).eval(), images("cpu"), torch.get_num_threads()
    net.set_backend("c")
    try:
        logits = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                logits.append(net(x))
    finally:
        torch.set_num_threads(before)
    assert logits[0].std() > 0.01
    assert all(torch.equal(each, logits[0]) for each in logits[1:])


@pytest.mark.c_compiler
def test_images_in_half_precision_reach_the_c_kernels() -> None:
    scores = []
    for choice in ("c", "torch"):
        net = network(coding="direct", backend=choice).eval()
        with torch.autocast("cpu", torch.bfloat16):
            scores.append(net(images("cpu").bfloat16()))
    assert scores[0].std() > 0
    assert torch.equal(*scores)


@pytest.mark.c_kernels
def test_autocast_in_c_leaves_the_stream_in_float32() -> None:
    net, x = network(width=16).eval(), images("cpu")
    net.set_backend("c")
    seen = []
    net.stages[1][0].lif2.register_forward_hook(lambda _, inputs, spikes: seen.extend([inputs[0].dtype, spikes.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = train_step(net.train(), x)
    assert seen == [torch.float32] * 2
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_spikes_normalised_values_and_membranes_are_kept_once(device: str) -> None:
    net = network(width=16).to(device, memory_format=torch.channels_last)

    def kept_bytes(backend: str) -> int:
        net.set_backend(backend)
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = net(images(device, batch=2))
        assert logits.requires_grad
        parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
        return sum(size for pointer, size in storages.items() if pointer not in parameters)

    # For a layer that follows a BatchNorm: convolution output and spikes, instead of these and the normalised values.
    assert kept_bytes("auto") < 0.75 * kept_bytes("torch")


# --- Layer by layer: a free-running spiking network is chaotic, so each layer is compared on what it got itself


@dataclass
class Passed:
    """What went through a module in a training step: input, output, and the loss's gradients of both."""

    input: Tensor
    output: Tensor
    grad_input: Tensor | None = None
    grad_output: Tensor | None = None


def record(net: MSResNet, x: Tensor, amp: torch.dtype | None) -> dict[str, Passed]:
    """Train a step and return what passed the convolutions of the blocks and the head, which fusion calls."""
    passed: dict[str, Passed] = {}

    def forward(name: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            passed[name] = Passed(inputs[0].detach(), output.detach())

        return hook

    def backward(name: str) -> Callable:
        def hook(_module: nn.Module, grad_input: tuple[Tensor], grad_output: tuple[Tensor]) -> None:
            passed[name].grad_input, passed[name].grad_output = grad_input[0], grad_output[0]

        return hook

    for name, module in net.named_modules():
        if name == "head" or (name.startswith("stages") and isinstance(module, nn.Conv2d)):
            module.register_forward_hook(forward(name))
            module.register_full_backward_hook(backward(name))
    with torch.autocast(x.device.type, amp, enabled=amp is not None):
        logits = net(x)
    # Scaled as a loss is in half precision, whose gradients would be subnormal otherwise.
    (128 * F.cross_entropy(logits.float().mean(0), torch.arange(len(x), device=x.device))).backward()
    return passed


def exactly(tensor: Tensor, T: int) -> Tensor:
    return tensor.double().unflatten(0, (T, -1)).requires_grad_()


def error(got: Tensor, wanted: Tensor, valid: Tensor) -> float:
    """Return the root mean square of the error relative to that of ``wanted``, over the neurons that are valid."""
    difference = (got.double().view_as(wanted) - wanted) * valid
    return ((difference.square().sum() / (wanted * valid).square().sum()) ** 0.5).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gac_msresnet18_cifar", "gac_msresnet18"])
def test_every_layer_against_the_modules_in_float64(name: str, dtype: str, device: str, launched: list[str]) -> None:
    T = 3
    # Rounding of the stored gradient and, in half precision, of the membrane stream.
    limit = {"fp32": 2e-6, "fp16": 2e-3, "bf16": 1.6e-2}[dtype]
    net = network(name, T=T).to(device, memory_format=torch.channels_last)
    exact = copy.deepcopy(net).double()
    exact.set_backend("torch")
    # 32 pixels: 2 x 2 remain at the end of the ImageNet network.
    passed = record(net, images(device, side=32), None if dtype == "fp32" else DTYPES[dtype])
    assert "residual_lif_backward_sums" in launched
    checked = []

    def check(layer: str, spikes: Tensor, recorded: Tensor, leaf: Tensor, outputs: dict[Tensor, Tensor], y: Passed):
        changed = recorded.double().view_as(spikes) != spikes
        # A spike that rounding decides otherwise is rare; it changes the gradients of its own neuron at all times.
        assert changed.double().mean().item() <= {"fp32": 0.0, "fp16": 2e-3, "bf16": 1.5e-2}[dtype], layer
        valid = ~changed.any(0)
        gradients = [gradient.double().view_as(output) for output, gradient in outputs.items()]
        (wanted,) = torch.autograd.grad(list(outputs), leaf, gradients, retain_graph=True)
        assert wanted.abs().max() > 0
        assert error(y.grad_output, wanted, valid) < limit, layer
        checked.append(layer)

    names = [f"stages.{i}.0" for i in range(len(net.stages))]
    for name, following in zip(names, [*names[1:], None], strict=True):
        block = exact.get_submodule(name)
        # BatchNorm, then LIF.
        conv1, conv2 = passed[f"{name}.conv1.conv"], passed[f"{name}.conv2.conv"]
        y = exactly(conv1.output, T)
        spikes = block.lif2(functional.seq_to_ann_forward(y, block.conv1.norm))
        check(f"{name}.lif2", spikes, conv2.input, y, {spikes: conv2.grad_input}, conv1)
        # Two BatchNorms, residual sum, rounding (whose gradient is 1), then LIF.
        shortcut = passed[f"{name}.shortcut.conv"]
        y, added = exactly(conv2.output, T), exactly(shortcut.output, T)
        membrane = functional.seq_to_ann_forward(y, block.conv2.norm)
        membrane = membrane + functional.seq_to_ann_forward(added, block.shortcut.norm)
        membrane = membrane + (membrane.to(conv2.output.dtype).double() - membrane).detach()
        if following is None:
            spikes = exact.lif(membrane)
            rates = spikes.mean((-2, -1))
            # A layer without recorded spikes: the rates show them.
            outputs, recorded = {rates: passed["head"].grad_input}, passed["head"].input.to(rates)
            torch.testing.assert_close(recorded, rates.detach(), rtol=0, atol=max(limit, 1e-3))
            recorded = spikes.detach()
        else:
            spikes = exact.get_submodule(following).lif1(membrane)
            next_conv, next_shortcut = passed[f"{following}.conv1.conv"], passed[f"{following}.shortcut.conv"]
            assert error(next_shortcut.input, membrane.detach(), torch.ones(())) < limit
            outputs, recorded = {membrane: next_shortcut.grad_input, spikes: next_conv.grad_input}, next_conv.input
        check(f"{name}.sum", spikes, recorded, y, outputs, conv2)
        check(f"{name}.shortcut", spikes, recorded, added, outputs, shortcut)
    assert len(checked) == 3 * len(names)


# --- Hooks and what else takes the modules one by one


def test_a_monitor_on_neurons_sees_the_spikes_of_the_fused_network(device: str, launched: list[str]) -> None:
    net = network().to(device).eval()
    x = images(device)
    expected = net(x)
    assert "lif_forward" not in launched
    with monitor.OutputMonitor(net, neuron.LIFNode) as seen:
        logits = net(x)
        assert len(seen.records) == len(seen.monitored_layers) == 8
        assert all(((s == 0) | (s == 1)).all() for s in seen.records)
        assert all(0 < s.mean() < 1 for s in seen.records[3:])
    assert torch.equal(logits, expected)
    launched.clear()
    assert torch.equal(net(x), expected)
    assert "lif_forward" not in launched


@pytest.mark.parametrize("layer", ["coding.lif", "stages.0.0.lif1", "stages.0.0.lif2", "stages.1.0.lif1", "lif"])
def test_a_hook_on_one_neuron_leaves_the_others_fused(layer: str, device: str, launched: list[str]) -> None:
    net = network().to(device)
    plain = copy.deepcopy(net)
    x = images(device)
    expected = train_step(plain, x)
    fused_kernels = {name: launched.count(name) for name in launched}
    launched.clear()
    seen = []
    net.get_submodule(layer).register_forward_hook(lambda _module, _inputs, spikes: seen.append(spikes))
    torch.testing.assert_close(train_step(net, x), expected, rtol=0, atol=1e-6)
    assert_same_gradients(net, plain, 5e-5)
    assert [s.shape[0] for s in seen] == [3]
    now = {name: launched.count(name) for name in launched}
    others = {"norm_lif_forward", "residual_lif_forward", "residual_lif_pool_forward"} - {
        "residual_lif_pool_forward" if layer == "lif" else ""
    }
    # The layer alone, and with one side of the gate its other side too.
    assert now["lif_forward"] == (2 if layer in ("coding.lif", "stages.0.0.lif1") else 1)
    assert all(now[name] >= fused_kernels[name] - 1 for name in others)


@pytest.mark.parametrize(
    "layer",
    [
        "stages.0",
        *(f"stages.0.0{part}" for part in ("", ".conv1", ".conv2.norm", ".shortcut", ".shortcut.norm")),
        "stages.0.1.shortcut",
    ],
)
def test_a_hook_on_what_is_bypassed_runs_the_modules(layer: str, device: str, launched: list[str]) -> None:
    # Of the first two blocks, the first one's shortcut is a convolution.
    net = network(depth=[2, 1, 1]).to(device).eval()
    x, calls = images(device, batch=2, side=8), []
    handle = net.get_submodule(layer).register_forward_hook(lambda *_: calls.append(layer))
    net(x)
    assert calls == [layer]
    assert not any(name.startswith("residual") for name in launched)
    handle.remove()
    net(x)
    assert calls == [layer]
    assert "residual_lif_forward" in launched


@pytest.mark.parametrize("layer", ["stages.0.0", "stages.0.0.conv1.norm", "stages.0.1.shortcut", "coding", "lif"])
def test_a_forward_put_in_place_of_a_modules_own_is_called(layer: str, device: str) -> None:
    net, calls = network(depth=[2, 1, 1]).to(device).eval(), []
    module = net.get_submodule(layer)
    forward = module.forward

    def instead(*inputs: Tensor, **options: object) -> Tensor:
        calls.append(layer)
        return forward(*inputs, **options)

    module.forward = instead
    net(images(device, batch=2, side=8))
    assert calls == [layer]


def test_a_dropout_put_before_the_head_is_called(device: str, launched: list[str]) -> None:
    net = network().to(device)
    net.dropout = nn.Dropout(1.0)
    logits = net(images(device))
    assert torch.equal(logits, net.head.bias.expand_as(logits))
    assert "residual_lif_pool_forward" in launched


def test_hooks_on_all_modules_run_the_modules(device: str, launched: list[str]) -> None:
    net = network().to(device)
    called = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        net(images(device))
    finally:
        handle.remove()
    assert set(net.modules()) - called <= {m for m in net.modules() if isinstance(m, nn.ModuleList)} | _surrogates(net)
    assert "residual_lif_forward" not in launched


def _surrogates(net: MSResNet) -> set[nn.Module]:
    return {module.surrogate_function for module in net.modules() if isinstance(module, LIFNode)}


def _convert(net: MSResNet) -> None:
    for block in net.stages[0]:
        block.conv1.norm = nn.BatchNorm2d(16)


def _subclass(net: MSResNet) -> None:
    net.lif = type("Own", (LIFNode,), {})()


def _single_steps(net: MSResNet) -> None:
    functional.set_step_mode(net, "s")


def _other_block(net: MSResNet) -> None:
    net.stages[1][0].__class__ = type("Own", (MSBlock,), {})


def _other_convolution(net: MSResNet) -> None:
    net.stages[1][0].conv1 = nn.Conv2d(16, 32, 3, 2, 1)


def _other_stage(net: MSResNet) -> None:
    net.stages[0] = type("Own", (nn.Sequential,), {})(*net.stages[0])


@pytest.mark.parametrize(
    "change",
    [_convert, _subclass, _single_steps, _other_block, _other_convolution, _other_stage, MSResNet.double],
    ids=lambda change: change.__name__,
)
def test_what_fusion_does_not_know_runs_by_modules(change: Callable, device: str) -> None:
    net = network(coding="direct").to(device)
    x = images(device)
    assert fused.obstacle(net, x) is None
    change(net)
    assert fused.obstacle(net, x.double() if change is MSResNet.double else x) is not None


@pytest.mark.parametrize("part", ["coding", "coding.gate"])
def test_a_gate_of_ones_own_is_called(part: str, device: str, launched: list[str]) -> None:
    net, calls = network().to(device), []
    module = net.get_submodule(part)

    def forward(self: nn.Module, *inputs: Tensor) -> Tensor:
        calls.append(part)
        return type(self).__mro__[1].forward(self, *inputs)

    module.__class__ = type("Own", (type(module),), {"forward": forward})
    net(images(device))
    assert calls == [part]
    assert "gate_lif_forward" not in launched
    assert "residual_lif_forward" in launched


def test_more_than_16_steps_run_by_modules(device: str, launched: list[str]) -> None:
    net = network(T=17).to(device)
    assert net(images(device)).shape == (17, 4, 5)
    assert "lif_forward" in launched
    assert "norm_lif_forward" not in launched


def test_the_torch_backend_launches_nothing(kernels_on_cpu: KernelsOnCpu, launched: list[str]) -> None:
    net = network(backend="torch")
    train_step(net, images("cpu"))
    assert launched == []


def test_a_single_value_per_channel_is_refused_in_training(device: str) -> None:
    net = network(T=1).to(device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        net(images(device, batch=1, side=4))


def _one_backend(net: MSResNet) -> None:
    net.stages[1][0].lif2.backend = "torch"


def _one_alpha(net: MSResNet) -> None:
    net.stages[2][0].lif1.surrogate_function.alpha = -1.0


def _one_surrogate(net: MSResNet) -> None:
    net.stages[2][0].lif1.surrogate_function = surrogate.Erf()


def _one_that_does_not_spike(net: MSResNet) -> None:
    net.stages[0][0].lif2.surrogate_function.set_spiking_mode(False)


def _half_a_norm(net: MSResNet) -> None:
    net.stages[0][0].conv2.norm.half()


def _no_running_statistics(net: MSResNet) -> None:
    net.stages[0][0].conv2.norm.running_mean = None


def _average(net: MSResNet) -> None:
    net.stages[0][0].conv1.norm.momentum = None


def _hook_on_a_norm(net: MSResNet) -> None:
    net.stages[0][0].conv1.norm.register_forward_hook(lambda *_: None)


def _backward_hook_on_a_block(net: MSResNet) -> None:
    net.stages[2][0].register_full_backward_hook(lambda *_: None)


def _more_steps(net: MSResNet) -> None:
    net.T = 17


@pytest.mark.parametrize(
    "change",
    [
        *(_one_backend, _one_alpha, _one_surrogate, _one_that_does_not_spike, _half_a_norm, _no_running_statistics),
        *(_hook_on_a_norm, _backward_hook_on_a_block, _more_steps),
    ],
    ids=lambda change: change.__name__,
)
def test_what_changes_between_two_calls_counts_at_the_next(change: Callable, device: str) -> None:
    net = network(coding="direct").to(device)
    x = images(device, batch=2, side=8)
    before = copy.deepcopy(net)
    for mode in (True, False):
        net.train(mode)
        net(x)
        assert fused.obstacle(net, x) is None
    change(net)
    assert fused.obstacle(net, x) is not None
    assert fused.obstacle(before, x) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_convert, "stages.0.0.conv1.norm is of class BatchNorm2d, not gac's BatchNorm2d"),
        (_subclass, "lif is of class Own, not gac's LIFNode"),
        (_average, "stages.0.0.conv1.norm has no momentum or does not track running statistics"),
        (_more_steps, "the network has more than 16 time steps"),
    ],
)
def test_why_layers_run_one_by_one_is_said_once(
    change: Callable, reason: str, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = network(coding="direct")
    change(net)
    net.to(device).eval()
    fused._log_once.cache_clear()
    caplog.set_level("INFO", logger="gac")
    for _ in range(2):
        net(images(device, batch=2, side=8))
    said = [record for record in caplog.records if "one by one" in record.getMessage()]
    assert [record.getMessage() for record in said] == [
        f"{device}: layers run one by one, more slowly, because {reason}"
    ]
    assert said[0].levelname == ("WARNING" if device == "cuda" else "INFO")
    assert reason in describe_backend(net, torch.device(device))["backend_reason"]


def test_a_cuda_device_without_the_fused_walk_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(coding="direct")
    _convert(net)
    log = fused._log_once
    log.cache_clear()
    x = images("cpu")
    monkeypatch.setattr(fused, "_log_once", lambda device_type, explanation: log("cuda", explanation))
    fused.report(net, fused.obstacle(net, x), x)
    assert caplog.messages == [
        "cuda: layers run one by one, more slowly, because stages.0.0.conv1.norm is of class BatchNorm2d, not gac's"
        " BatchNorm2d"
    ]


@pytest.mark.parametrize(
    ("name", "block"),
    [("msresnet104", "stages.0.0"), ("maxresnet18_cifar", "stages.1.0")],
)
def test_a_network_that_pools_is_not_called_somebodys_own(name: str, block: str, device: str) -> None:
    net, x = network(name).to(device).eval(), images(device)
    reason = "makes its maps smaller by pooling, which the fused execution does not have"
    explanation = f"layers run one by one, more slowly, because {block} {reason}"
    assert fused.explain(net, fused.obstacle(net, x), x) == explanation


def test_nothing_else_is_blamed_where_neurons_run_in_torch(device: str) -> None:
    net, x = network(coding="direct", backend="torch").to(device).eval(), images(device)
    _more_steps(net)
    found = fused.obstacle(net, x)
    assert found is not None
    assert fused.explain(net, found, x) == ""


@pytest.mark.parametrize("kind", ["one", "all", "own forward"])
def test_nothing_is_logged_of_hooks(kind: str, device: str, caplog: pytest.LogCaptureFixture) -> None:
    net = network().to(device).eval()
    if kind == "own forward":
        norm = net.stages[1][0].conv1.norm
        norm.forward = norm.forward
    else:
        owner = net.stages[1][0] if kind == "one" else nn.modules.module
        register = owner.register_forward_hook if kind == "one" else owner.register_module_forward_hook
        handle = register(lambda *_: None)
    caplog.set_level("INFO", logger="gac")
    try:
        net(images(device, batch=2, side=8))
        reason = describe_backend(net, torch.device(device))["backend_reason"]
    finally:
        if kind != "own forward":
            handle.remove()
    assert "one by one" not in caplog.text
    assert "layers run one by one, more slowly, because" in reason


def test_nothing_is_said_of_what_was_asked_for(device: str, caplog: pytest.LogCaptureFixture) -> None:
    nets = [network(), network(backend="torch"), network(coding="direct", activation="relu")]
    caplog.set_level("INFO", logger="gac")
    for net in nets:
        net.to(device).eval()(images(device, batch=2, side=8))
    assert "one by one" not in caplog.text


@pytest.mark.parametrize("apart", ["reset value", "v_reset"])
def test_the_potential_that_neurons_start_from_is_theirs(apart: str, device: str) -> None:
    net = network().to(device)
    x = images(device, batch=2, side=8)
    before = net(x)
    if apart == "reset value":
        net.stages[0][0].lif2.set_reset_value("v", 0.4)
    else:
        # SpikingJelly's reset value, from which neurons start, stays what it was.
        net.lif.v_reset = -0.5
    modules = copy.deepcopy(net)
    modules.set_backend("torch")
    logits = net(x)
    torch.testing.assert_close(logits, modules(x))
    assert not torch.equal(logits, before)


def test_constants_that_change_between_two_calls_count_at_the_next(device: str) -> None:
    net = network(width=4).to(device).eval()
    x = images(device, batch=2, side=8)
    with torch.no_grad():
        first = net(x)
        for neuron_ in (module for module in net.modules() if isinstance(module, LIFNode)):
            neuron_.v_threshold = 0.25
        second = net(x)
        plain = copy.deepcopy(net)
        plain.set_backend("torch")
        assert not torch.equal(first, second)
        torch.testing.assert_close(second, plain(x), rtol=0, atol=1e-6)
