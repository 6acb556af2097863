"""Fused execution in the precision of training, layer by layer beside the float64 modules (teacher forcing).

A free-running spiking network is chaotic in low precision, and what a fused kernel computes is no module's work only.
So the whole network runs as it is trained, but every convolution (and the stem, both attentions and the head) is
forced: whatever it gets, it returns what the float64 network's returned, and in the backward pass a given gradient.
What is between two of them, the work of the fused kernels, then starts from equal tensors; its results are what reaches
the next forced module, and in the backward pass what comes back to the one before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from benchmarks.candidates import REFERENCE
from benchmarks.common import PRECISIONS, NetworkSize
from benchmarks.equality import perturb
from gac.execution.device import autocast
from gac.models import fused
from gac.models.batch_norm import BatchNorm2d
from gac.models.ms_resnet import MSResNet
from gac.neuron import LIFNode

# A block with an identity shortcut, blocks with a normalised one, and the last block.
SIZE = NetworkSize("gac_msresnet18", width=8, depth=(2, 1, 1, 1), image_size=32, num_classes=3)
T = 2
# Membranes so close to the threshold that the precision of what comes before it decides about the spike.
CHANGED_SPIKES_LIMIT = 1e-6
# Entries that may be off by more than rounding: a changed spike changes its neuron's gradient at up to 16 time steps,
# and so does rounding across a jump of the surrogate gradient (Rect has two).
EXEMPT = 16 * CHANGED_SPIKES_LIMIT
# Of results in a precision, as a relative root mean square.
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Difference:
    """How far something is from its reference in one quantity, and how far it may be."""

    quantity: str
    difference: float
    limit: float

    @property
    def within(self) -> bool:
        """Whether the limit holds; it never does for NaN."""
        return self.difference <= self.limit


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    """Return the root mean square of the difference relative to that of ``wanted``; 0 where both are zero.

    The largest differences do not count, as many as EXEMPT has of all entries.
    """
    error, size = (got - wanted).square(), wanted.square().sum()
    exempt = error.flatten().topk(int(EXEMPT * error.numel())).values.sum()
    error = (error.sum() - exempt).clamp(min=0)
    return 0.0 if error == size == 0 else (error / size).sqrt().item()


def worst(differences: Iterable[float]) -> float:
    """Return the largest, NaN if there is one, which ``max`` would lose."""
    return torch.tensor(list(differences)).max().item()


@dataclass
class _Trace:
    """What reached the forced modules, by name: inputs, and gradients of outputs."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def compare_fused(
    network: MSResNet, reference: MSResNet, images: Tensor, dtype: torch.dtype, context: AbstractContextManager
) -> list[Difference]:
    """Compare a network's fused execution with the float64 modules, forced as this file describes.

    Args:
        network: What runs fused, with the reference's weights in float32.
        reference: The same network in float64, whose modules run one by one. Gradients and running statistics of both
            change.
        images: Float64 images [B, 3, H, W].
        dtype: Type of the activations in the precision.
        context: The precision's autocast.

    Returns:
        The largest difference of each kind over a training pass and one with the running statistics: spikes, other
        activations, gradients of activations, gradients of BatchNorm's parameters, running statistics. Empty if the
        network does not run fused.
    """
    if fused.obstacle(network, images.float()) is not None:
        return []
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    outputs, inputs = _record(reference, images)
    # The recording moved the running statistics.
    reference.load_state_dict(state)
    forced = {name: _rounded(output, dtype) for name, output in outputs.items()}
    grads = {name: _rounded(torch.randn_like(x), dtype) for name, x in inputs.items()}
    changed = spikes = 0
    activations, gradients, norm_gradients = [], [], []
    for training in (True, False):
        with _rounded_stream(reference, dtype):
            wanted = _run(reference.train(training), images, forced, grads)
        with context:
            got = _run(network.train(training), images.float(), forced, grads)
        for name, x in wanted.inputs.items():
            if ((x == 0) | (x == 1)).all():
                changed += int((got.inputs[name].double() != x).sum())
                spikes += x.numel()
            else:
                activations.append(relative_rms(got.inputs[name].double(), x))
        gradients += [relative_rms(got.gradients[name].double(), grad) for name, grad in wanted.gradients.items()]
        norm_gradients += _differences(_norm_gradients, network, reference)
    rounding, exact = ROUNDING[dtype], ROUNDING[torch.float32]
    statistics = _differences(_running_statistics, network, reference)
    return [
        Difference("share of changed spikes", changed / spikes, max(CHANGED_SPIKES_LIMIT, 1 / spikes)),
        Difference("other activations", worst(activations), rounding),
        Difference("gradients", worst(gradients), rounding),
        Difference("BatchNorm gradients", worst(norm_gradients), rounding),
        Difference("running statistics", worst(statistics), exact),
    ]


def _forced_modules(network: MSResNet) -> dict[str, nn.Module]:
    gate = network.coding.gate
    names = {module: name for name, module in network.named_modules()}
    convolutions = [module for module in network.stages.modules() if isinstance(module, nn.Conv2d)]
    modules = (network.stem, gate.temporal, gate.spatial_channel, *convolutions, network.head)
    return {names[module]: module for module in modules}


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).double()


@torch.no_grad()
def _record(reference: MSResNet, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return outputs and inputs of the modules that will be forced, in a free training pass."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name], inputs[name] = output.clone(), arguments[0].clone()

        return record

    with _hooks(module.register_forward_hook(hook(name)) for name, module in _forced_modules(reference).items()):
        reference.train()(images)
    return outputs, inputs


class _Force(torch.autograd.Function):
    """Replaces a module: its output is ``forced``, its input's gradient ``grad_input``, whatever reaches it."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        forced: Tensor,
        grad_input: Tensor,
        trace: _Trace,
        name: str,
    ) -> Tensor:
        ctx.trace, ctx.name, ctx.grad_input = trace, name, torch.empty_like(x).copy_(grad_input)
        trace.inputs[name] = x.detach()
        return forced

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        ctx.trace.gradients[ctx.name] = grad_output
        return ctx.grad_input, None, None, None, None


def _run(network: MSResNet, images: Tensor, forced: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> _Trace:
    """Return what the forced modules got in a forward and a backward pass; parameters have gradients afterwards."""
    trace = _Trace()

    def hook(name: str) -> Callable[..., Tensor]:
        def force(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # In the type and memory order of what it replaces.
            value = torch.empty_like(output, requires_grad=False).copy_(forced[name])
            return _Force.apply(arguments[0], value, grads[name], trace, name)

        return force

    network.zero_grad()
    with _hooks(module.register_forward_hook(hook(name)) for name, module in _forced_modules(network).items()):
        # Without a gradient of the images the stem would be constant.
        network(images.clone().requires_grad_()).sum().backward()
    return trace


@contextmanager
def _rounded_stream(reference: MSResNet, dtype: torch.dtype) -> Iterator[None]:
    """Round the membrane stream to the dtype in which the fused execution stores it; gradients pass as they are."""

    def round_output(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (_rounded(output, dtype) - output).detach()

    stream = (reference.coding, *(block for stage in reference.stages for block in stage))
    with _hooks(module.register_forward_hook(round_output) for module in stream):
        yield


@contextmanager
def _hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


def _norms(network: MSResNet) -> list[BatchNorm2d]:
    return [module for module in network.stages.modules() if isinstance(module, BatchNorm2d)]


def _norm_gradients(network: MSResNet) -> list[Tensor]:
    parameters = [parameter for norm in _norms(network) for parameter in (norm.weight, norm.bias)]
    # Where none arrived it was zero.
    return [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]


def _running_statistics(network: MSResNet) -> list[Tensor]:
    return [buffer for norm in _norms(network) for buffer in (norm.running_mean, norm.running_var)]


def _differences(tensors: Callable[[MSResNet], list[Tensor]], network: MSResNet, reference: MSResNet) -> list[float]:
    pairs = zip(tensors(network), tensors(reference), strict=True)
    return [relative_rms(got.double(), wanted) for got, wanted in pairs]


def compare(
    backend: str = "cupy", device: str = "cpu", precision: str = "fp16", size: NetworkSize = SIZE, T: int = T
) -> list[Difference]:
    torch.manual_seed(0)
    reference = REFERENCE.build(size, T).double()
    images = torch.randn(2, 3, size.image_size, size.image_size, dtype=torch.float64)
    perturb(reference, images)
    network = REFERENCE.build(size, T)
    network.load_state_dict(reference.state_dict())
    network.set_backend(backend)
    network.to(device, memory_format=torch.channels_last)
    context = autocast(torch.device(device), "off" if precision == "fp32" else precision)
    return compare_fused(network, reference.to(device), images.to(device), PRECISIONS[precision], context)


def failed() -> set[str]:
    return {each.quantity for each in compare() if not each.within}


def test_passes_the_kernels(neurons_on_kernels):
    found = compare()
    assert len(found) == 5
    assert all(each.within for each in found), found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("network", ["gac_msresnet18_cifar", "gac_msresnet18"])
@pytest.mark.gpu
def test_passes_the_kernels_on_a_gpu(network, precision):
    depth = (2, 1, 1) if "cifar" in network else (2, 1, 1, 1)
    found = compare("cupy", "cuda", precision, NetworkSize(network, 64, depth, 32, 10), T=6)
    assert len(found) == 5
    assert all(each.within for each in found), found


def test_says_nothing_of_a_network_that_runs_its_modules():
    assert compare(backend="torch") == []


def scaled(name: str):
    """The fused operation ``name``, whose input's gradient is wrong by 1 percent."""
    operation = getattr(fused, name)

    def wrong(y, *others):
        return operation(y.detach() + 1.01 * (y - y.detach()), *others)

    return wrong


@pytest.mark.parametrize("name", ["norm_lif", "residual_lif", "residual_lif_pool", "gate_lif"])
def test_finds_wrong_gradients(name, neurons_on_kernels, monkeypatch):
    monkeypatch.setattr(fused, name, scaled(name))
    assert "gradients" in failed()


def test_finds_wrong_constants(neurons_on_kernels, monkeypatch):
    right = LIFNode.kernel_parameters

    def wrong(neuron):
        return replace(right(neuron), tau=1.36) if neuron.backend == "cupy" else right(neuron)

    monkeypatch.setattr(LIFNode, "kernel_parameters", wrong)
    assert "share of changed spikes" in failed()


def test_finds_a_norm_in_the_wrong_place(neurons_on_kernels, monkeypatch):
    residual = fused.residual_lif

    def wrong(y, normalization, *others):
        exchanged = type(normalization)(**{**vars(normalization), "bias": normalization.weight})
        return residual(y, exchanged, *others)

    monkeypatch.setattr(fused, "residual_lif", wrong)
    assert {"share of changed spikes", "other activations"} <= failed()


def test_finds_statistics_that_do_not_move(neurons_on_kernels, monkeypatch):
    norm = type(REFERENCE.build(SIZE, T).stages[0][0].conv1.norm)
    normalization = norm.normalization

    def still(self, y, inverse_std):
        kept = self.running_mean.clone(), self.running_var.clone()
        found = normalization(self, y, inverse_std)
        self.running_mean.copy_(kept[0])
        self.running_var.copy_(kept[1])
        return found

    monkeypatch.setattr(norm, "normalization", still)
    assert "running statistics" in failed()


def test_finds_another_normalisation_in_evaluation(neurons_on_kernels, monkeypatch):
    norm = type(REFERENCE.build(SIZE, T).stages[0][0].conv1.norm)
    normalization = norm.normalization

    def of_the_batch(self, y, inverse_std):
        return normalization(self.train(), y, inverse_std)

    monkeypatch.setattr(norm, "normalization", of_the_batch)
    assert {"share of changed spikes", "gradients", "running statistics"} <= failed()


def test_a_few_in_a_million_may_be_off():
    wanted = torch.randn(1000, 1000, dtype=torch.float64)
    got = wanted.clone()
    allowed = int(EXEMPT * wanted.numel())
    got.view(-1)[:allowed] += 10
    assert relative_rms(got, wanted) == 0
    got.view(-1)[allowed] += 10
    assert relative_rms(got, wanted) == pytest.approx(0.01, rel=0.01)
