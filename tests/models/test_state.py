"""Nothing of a call stays in a network: threads, copies and files of it do not see each other's sequences."""

import copy
import gc
import io
import operator
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from spikingjelly.activation_based import base, functional, monitor, neuron
from torch import Tensor, nn

from gac.coding.gated import GatedAttentionCoding
from gac.models import create_model
from gac.models.ms_resnet import MSResNet
from gac.neuron import LIFNode
from lively import lively

pytestmark = pytest.mark.usefixtures("one_thread")
THREADS = 4


@pytest.fixture(params=["modules", "fused"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "modules":
        return "torch"
    request.getfixturevalue("neurons_on_kernels")
    return "cupy"


def network(backend: str = "torch", coding: str = "gac", **options: object) -> MSResNet:
    torch.manual_seed(0)
    sizes = {"width": 8, "depth": [1, 1, 1], "temporal_init": "alive"}
    net = create_model("gac_msresnet18_cifar", 5, 3, coding=coding, backend="torch", **sizes | options)
    lively(net, torch.rand(16, 3, 8, 8)).set_backend(backend)
    assert not torch.equal(net(images(0)), net(images(1)))
    return net.train()


def images(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def tensors_kept_by(module: nn.Module) -> list[str]:
    """Return the names of the tensors in the module's memories and attributes but for parameters and buffers."""
    found = [name for name, value in base.named_memories(module) if isinstance(value, Tensor)]
    for name, each in module.named_modules():
        found += [f"{name}.{key}" for key, value in vars(each).items() if isinstance(value, Tensor)]
    return found


def living_tensors() -> int:
    """Return how many tensors Python holds; those of an autograd graph belong to what the graph belongs to."""
    # What one collection frees may have been all that held on to more.
    while gc.collect():
        pass
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Let garbage collection, and ``living_tensors``, pass over what other tests have left, which takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def together(call: Callable[[int], Tensor]) -> list[Tensor]:
    """Return the results of ``call`` for each thread's number, the calls running at once, many times over."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(call, list(range(THREADS)) * 4))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("coding", ["gac", "direct", "latency", "phase"])
def test_threads_that_share_a_network_get_what_they_would_alone(coding: str) -> None:
    net = network(coding=coding).eval()
    expected = [net(images(i)) for i in range(THREADS)]
    assert all(logits.std() > 0.01 for logits in expected)
    # All threads are past their beginnings when the first goes on.
    barrier = threading.Barrier(THREADS)

    def wait(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        barrier.wait(timeout=20)

    net.stem.register_forward_hook(wait)
    for i, logits in enumerate(together(lambda i: net(images(i)))):
        assert torch.equal(logits, expected[i % THREADS])


def test_threads_have_gradients_of_their_own() -> None:
    net = network().eval()

    def input_gradient(i: int) -> Tensor:
        x = images(i).requires_grad_()
        return torch.autograd.grad(net(x).sum(), x)[0]

    expected = [input_gradient(i) for i in range(THREADS)]
    for i, gradient in enumerate(together(input_gradient)):
        assert torch.equal(gradient, expected[i % THREADS])


def test_threads_share_the_fused_network_too(neurons_on_kernels) -> None:
    # The kernels' scheduler on the CPU has one set of threads: the calls take turns at every kernel.
    net = network("cupy").eval()
    expected = [net(images(i)) for i in range(THREADS)]
    for i, logits in enumerate(together(lambda i: net(images(i)))):
        assert torch.equal(logits, expected[i % THREADS])


def test_threads_with_monitors_and_hooks() -> None:
    net = network().eval()
    expected = [net(images(i)) for i in range(THREADS)]
    spikes = monitor.OutputMonitor(net, neuron.LIFNode, lambda s: int(s.sum()))
    net.stages[0].register_forward_hook(lambda module, inputs, output: None)
    found = together(lambda i: net(images(i)))
    assert len(spikes.records) == len(found) * sum(isinstance(m, LIFNode) for m in net.modules())
    for i, logits in enumerate(found):
        assert torch.equal(logits, expected[i % THREADS])


@pytest.mark.parametrize(
    ("coding", "training"),
    [("gac", True), ("gac", False), ("direct", True), ("rate", False), ("latency", True), ("phase", False)],
)
def test_no_tensor_of_a_call_stays(coding: str, training: bool, backend: str, only_new_objects: None) -> None:
    net = network(backend, coding).train(training)
    before = living_tensors()
    logits = net(images())
    assert tensors_kept_by(net) == []
    assert living_tensors() > before
    del logits
    assert living_tensors() == before


@pytest.mark.parametrize("other", [LIFNode(), neuron.LIFNode(step_mode="m"), neuron.IFNode(step_mode="m")])
def test_no_tensor_stays_on_a_neuron_that_replaces_another(other: nn.Module) -> None:
    net = network()
    net.stages[0][0].lif1 = copy.deepcopy(other)
    first = net.eval()(images())
    assert tensors_kept_by(net) == []
    net(images(1))
    assert torch.equal(net(images()), first)


def test_sequences_after_single_steps_start_afresh() -> None:
    net = network(coding="direct").eval()
    expected = net(images())
    functional.set_step_mode(net, "s")
    net(images(1))
    assert tensors_kept_by(net) != []
    functional.set_step_mode(net, "m")
    assert torch.equal(net(images()), expected)
    assert tensors_kept_by(net) == []


def test_a_network_that_was_called_is_copied_and_saved_as_one_that_was_not() -> None:
    fresh, called = network(), network()
    called(images()).sum()
    called.load_state_dict(fresh.state_dict())
    copied, pickled = copy.deepcopy(called), pickle.loads(pickle.dumps(called))
    sizes = []
    for net in (fresh, called):
        file = io.BytesIO()
        torch.save(net, file)
        sizes.append(file.tell())
    assert sizes[1] == sizes[0]
    for net in (copied, pickled):
        assert torch.equal(net.eval()(images()), fresh.eval()(images()))


def test_potentials_that_were_asked_for_are_kept() -> None:
    net, single = network(), network()
    net.lif.store_v_seq = True
    recorded = monitor.AttributeMonitor("v_seq", pre_forward=False, net=net, instance=LIFNode)
    logits = net(images())
    assert torch.equal(logits, single(images()))
    assert net.lif.v_seq.shape[:2] == (3, 2)
    assert torch.equal(recorded["lif"][0], net.lif.v_seq)
    assert tensors_kept_by(net) == ["lif.v_seq"]


class TestGatedAttentionCoding:
    @pytest.mark.parametrize("node", [None, neuron.LIFNode(step_mode="m")])
    def test_no_tensor_stays(self, node: nn.Module | None) -> None:
        coding = GatedAttentionCoding(3, 4, temporal_init="alive", neuron=copy.deepcopy(node))
        x = torch.randn(2, 4, 5, 5) + 1
        first = coding(x)
        assert first.std() > 0
        assert tensors_kept_by(coding) == []
        assert torch.equal(coding(x), first)

    def test_threads(self) -> None:
        coding = GatedAttentionCoding(3, 4, temporal_init="alive")
        frames = [torch.randn(1 + i, 4, 5, 5) + 1 for i in range(THREADS)]
        expected = [coding(x) for x in frames]
        for i, output in enumerate(together(lambda i: coding(frames[i]))):
            assert torch.equal(output, expected[i % THREADS])


class TestANeuronByItself:
    def test_keeps_its_state(self) -> None:
        node, x = LIFNode(), torch.full((2, 3), 0.55)
        whole = LIFNode()(torch.cat([x] * 3))
        assert torch.equal(torch.cat([node(x) for _ in range(3)]), whole)
        assert whole.sum() > 0
        node.reset()
        assert node.v == 0.0


def test_a_spawned_process_gets_the_network_after_a_call() -> None:
    # A result that needs a gradient belongs to a graph, which no process can hand to another.
    net = network().requires_grad_(False)
    net(images(1))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(operator.call, net, images()).result()
    assert torch.equal(found, network().requires_grad_(False)(images()))
