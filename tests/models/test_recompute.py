"""Activation checkpointing: the same training in less memory, by the modules and by the fused execution."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import base
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from gac.models import create_model
from gac.models.ms_resnet import MSBlock, MSResNet
from gac.neuron import PRESETS


@pytest.fixture(params=["modules", "fused"])
def execution(request: pytest.FixtureRequest) -> str:
    """Which execution runs: the modules one by one, or the kernels, compiled for the CPU."""
    if request.param == "fused":
        request.getfixturevalue("neurons_on_kernels")
    return request.param


def networks(**options: object) -> tuple[MSResNet, MSResNet]:
    """Return a small network and a copy that checkpoints its activations."""
    torch.manual_seed(0)
    net = create_model(
        "gac_msresnet18_cifar", 5, **{"T": 3, "width": 8, "depth": [2, 1, 1], "temporal_init": "alive"} | options
    ).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
    checkpointed = copy.deepcopy(net)
    checkpointed.set_checkpoint_activations(True)
    return net, checkpointed


def train_step(net: MSResNet, x: Tensor) -> Tensor:
    net.zero_grad()
    logits = net(x)
    F.cross_entropy(logits.mean(0), torch.arange(len(x)) % 5).backward()
    return logits.detach()


def assert_same(net: MSResNet, expected: MSResNet) -> None:
    """Compare gradients, buffers and the neurons' states, bit for bit."""
    for (key, p), q in zip(net.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    for (key, a), b in zip(net.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(a, b[1]), key
    for (key, a), (_, b) in zip(base.named_memories(net), base.named_memories(expected), strict=True):
        assert type(a) is type(b), key
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, key


@pytest.mark.parametrize(("precision", "coding"), [(torch.float32, "gac"), (torch.bfloat16, "direct")])
def test_nothing_but_memory_differs(precision: torch.dtype, coding: str, execution: str) -> None:
    net, checkpointed = networks(coding=coding)
    for seed in range(2):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            expected, logits = train_step(net, x), train_step(checkpointed, x)
        assert expected.std() > 0.01
        assert torch.equal(logits, expected)
        assert_same(checkpointed, net)
    assert net.stages[0][0].conv1.norm.num_batches_tracked == 2


def test_less_is_kept_for_the_backward_pass(execution: str) -> None:
    def kept_bytes(net: MSResNet) -> int:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = net(torch.randn(2, 3, 16, 16))
        assert logits.requires_grad
        parameters = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
        return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)

    net, checkpointed = networks(coding="direct", width=16, depth=[3, 3, 2])
    # A block's input, and its spikes where they are computed before the block begins, instead of all inside it.
    assert kept_bytes(checkpointed) < 0.5 * kept_bytes(net)


def test_what_was_computed_again_is_gone_after_the_backward_pass(execution: str) -> None:
    # A neuron that kept the second computation's membrane potential would keep all that led to it.
    _, checkpointed = networks()
    activations = []
    for block in (*checkpointed.stages[0], *checkpointed.stages[1]):
        block.conv1.conv.register_forward_hook(
            lambda _module, _inputs, output: activations.append(StorageWeakRef(output.untyped_storage()))
        )
    train_step(checkpointed, torch.randn(2, 3, 16, 16))
    assert len(activations) == 6
    assert all(activation.expired() for activation in activations)


def test_a_layer_with_a_hook_runs_by_itself_and_is_still_right(execution: str) -> None:
    net, checkpointed = networks()
    for each in (net, checkpointed):
        for neuron in (each.stages[0][1].lif1, each.stages[1][0].lif2):
            neuron.register_forward_hook(lambda *_: None)
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(train_step(checkpointed, x), train_step(net, x))
    assert_same(checkpointed, net)


def test_frozen_statistics_stay(execution: str) -> None:
    net, checkpointed = networks()
    for each in (net, checkpointed):
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    before = {key: buffer.clone() for key, buffer in checkpointed.named_buffers()}
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(train_step(checkpointed, x), train_step(net, x))
    assert_same(checkpointed, net)
    assert all(torch.equal(buffer, before[key]) for key, buffer in checkpointed.named_buffers())


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_changes_before_the_backward_pass(training: bool, execution: str) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    nets = networks()
    for net in nets:
        logits = net.train(training)(x)
        net.train(not training)
        F.cross_entropy(logits.mean(0), torch.arange(4)).backward()
        assert all(module.training is not training for module in net.modules())
    assert_same(nets[1], nets[0])


def test_evaluation_computes_once(execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, checkpointed = networks()
    refuse: Callable = lambda *_, **__: pytest.fail("checkpointed without a backward pass to come")  # noqa: E731
    monkeypatch.setattr("gac.models.recompute.checkpoint", refuse)
    x = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(checkpointed.eval()(x), net.eval()(x))


def test_a_block_begins_again_from_the_state_it_began_with() -> None:
    # Without MSResNet, which resets its neurons: the second call goes on from the first's membrane potentials.
    torch.manual_seed(0)
    block = MSBlock(4, 4, 1, PRESETS["cifar"], "torch").train()
    checkpointed = copy.deepcopy(block)
    checkpointed.checkpoint_activations = True
    x = torch.randn(2, 3, 2, 4, 6, 6) * 2
    results = []
    for each in (block, checkpointed):
        with torch.no_grad():
            each(x[0])
        inputs = x[1].clone().requires_grad_()
        output = each(inputs)
        output.square().sum().backward()
        results.append((output, inputs.grad, [p.grad for p in each.parameters()]))
    (output, gradient, weights), (other, other_gradient, other_weights) = results
    assert torch.equal(output, other)
    assert torch.equal(gradient, other_gradient)
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def test_a_counter_round_the_forward_pass_only() -> None:
    net, checkpointed = networks()
    x = torch.randn(4, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        loss = checkpointed(x).logsumexp(-1).sum()
    loss.backward()
    net(x).logsumexp(-1).sum().backward()
    assert counter.get_total_flops() > 0
    for (key, a), b in zip(checkpointed.named_parameters(), net.parameters(), strict=True):
        scale = b.grad.abs().max().item()
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5 * scale, msg=key)


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    net, checkpointed = networks(T=2, depth=[1, 1, 1], coding="direct")
    compiled = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 8, 8)
    logits, expected = compiled(x), net(x)
    assert torch.equal(logits, expected)
    for each in (logits, expected):
        each.logsumexp(-1).sum().backward()
    for (key, a), b in zip(checkpointed.named_parameters(), net.parameters(), strict=True):
        scale = b.grad.abs().max().item()
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5 * scale, msg=key)
    for (key, a), b in zip(checkpointed.named_buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=key)
