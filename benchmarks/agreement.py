"""The gate before every timing: only networks that compute the same may be compared.

Whole networks are compared in float64, where rounding decides no spike: equal weights must give equal logits, loss
gradients and running statistics. In lower precision a free-running spiking network is chaotic (one changed spike
changes a quarter of the last layer's), so there each spiking layer is compared alone: it gets what the float64
network fed to its layer, rounded, and must give the spikes and the input gradient of the float64 neuron. Everything
else is the same PyTorch layers in all networks.

The neurons of our networks are checked in every precision that is timed, and where they run fused, what is fused too
(benchmarks/teacher_forcing.py). Where the steps are replayed, they are compared with the steps
(benchmarks/replayed_contender.py). The peers are checked in float32 alone: under autocast their membrane
potentials are half precision, another neuron to the last bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, surrogate
from torch import Tensor, nn

from benchmarks.command_line import MeasurementError
from benchmarks.implementations import LAYOUTS, REFERENCE, Implementation, choose_layout
from benchmarks.network_size import NetworkSize
from benchmarks.recording import record_inputs_of
from benchmarks.replayed_contender import compare_replayed
from benchmarks.teacher_forcing import compare_fused
from gac.execution.device import DTYPES, autocast
from gac.models.ms_resnet import MSResNet
from gac.neuron import PRESETS, LIFNode
from gac.ops import lif

BATCH = 2
SEED = 20
# Of the gate, before the sigmoid.
LARGEST_SCORE = 6.0
# Largest difference, in units of the reference's largest entry.
NETWORK_LIMITS = {
    "training logits": 1e-10,
    "loss gradients": 1e-8,
    "running statistics": 1e-10,
    "evaluation logits": 1e-10,
}
# Rounding of the input gradient, as a root mean square relative to the reference's.
GRADIENT_LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Membranes so close to the threshold that float32 and float64 disagree about the spike.
CHANGED_SPIKES_LIMIT = 1e-6
# Where a surrogate gradient jumps, in |h - threshold|; membranes that rounding may put on either side are left out.
JUMPS = {surrogate.Rect: 0.5}
ROUNDING = 1e-6


@dataclass(frozen=True)
class Agreement:
    """How far an implementation is from the reference in one quantity."""

    implementation: str
    T: int
    dtype: str
    quantity: str
    difference: float
    limit: float


def check_all(
    implementations: Sequence[Implementation],
    size: NetworkSize,
    time_steps: Sequence[int],
    precisions: Sequence[str],
    device: torch.device,
) -> list[Agreement]:
    """Compare implementations with the reference for every T, ours in every precision that will be timed.

    Raises:
        MeasurementError: As :func:`check_agreement`.
    """
    half = [DTYPES[precision] for precision in precisions if precision != "fp32"]
    dtypes = {
        each.name: [torch.float32, *(half if each.neuron_type is REFERENCE.neuron_type else [])]
        for each in implementations
    }
    return [
        agreement
        for T in dict.fromkeys(time_steps)
        for agreement in check_agreement(implementations, size, T, dtypes, device)
    ]


def summary(agreements: Sequence[Agreement]) -> list[str]:
    """Return the largest difference of each quantity with its limit, a line for each dtype."""
    worst: dict[str, dict[str, Agreement]] = {}
    for agreement in agreements:
        of_dtype = worst.setdefault(agreement.dtype, {})
        seen = of_dtype.get(agreement.quantity, agreement)
        of_dtype[agreement.quantity] = max(seen, agreement, key=lambda each: each.difference)
    return [
        f"{dtype}: "
        + ", ".join(f"{name} {each.difference:.0e} (limit {each.limit:.0e})" for name, each in of_dtype.items())
        for dtype, of_dtype in worst.items()
    ]


def check_agreement(
    implementations: Sequence[Implementation],
    size: NetworkSize,
    T: int,
    dtypes: Mapping[str, Sequence[torch.dtype]],
    device: torch.device,
) -> list[Agreement]:
    """Compare implementations with the reference on a batch of 2 random images.

    Args:
        implementations: What to check.
        size: Size of the network that will be timed.
        T: Number of time steps.
        dtypes: Precisions in which to check the neurons, by name of the implementation.
        device: Where it will be timed.

    Raises:
        MeasurementError: If something differs by more than its limit, and if a layer of the reference never fires,
            which would leave nothing to compare.
    """
    torch.manual_seed(SEED)
    reference = REFERENCE.build(size, T).double().to(device)
    images = torch.randn(BATCH, 3, size.image_size, size.image_size, dtype=torch.float64).to(device)
    labels = torch.randint(size.num_classes, (BATCH,)).to(device)
    _roughen(reference, images)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    neuron_inputs = _record_inputs(reference, images)
    # The recording moved the running statistics.
    reference.load_state_dict(state)
    expected = _run(REFERENCE, reference, images, labels)

    found = []
    for implementation in implementations:
        if implementation.float64 and implementation is not REFERENCE:
            network = implementation.build(size, T).double().to(device)
            network.load_state_dict(implementation.translate(state))
            outcome = _run(implementation, network, images, labels)
            for quantity, limit in NETWORK_LIMITS.items():
                wanted = expected[quantity]
                if set(wanted) != {"logits"}:
                    wanted = implementation.translate(wanted)
                difference = _largest_difference(outcome[quantity], wanted)
                found.append(_checked(Agreement(implementation.name, T, "float64", quantity, difference, limit)))
        neurons = implementation.neurons(implementation.build(size, T).to(device))
        for dtype in dtypes[implementation.name]:
            found += _compare_neurons(implementation, neurons, size.family, neuron_inputs, dtype)
            if implementation.neuron_type is REFERENCE.neuron_type:
                reference.load_state_dict(state)
                found += _compare_fused(implementation, reference, size, T, images, dtype)
            if implementation.replayed:
                found += _compare_replayed(implementation, state, size, T, dtype, device)
    return found


@torch.no_grad()
def _roughen(network: MSResNet, images: Tensor) -> None:
    """Take a new network out of its initial state, in which exchanged tensors and wrong gates would hardly show."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor += 0.2 * torch.rand_like(tensor)
    # A new gate is close to 1/2, or high at some times and low at others: too low for the first block to fire. One
    # that is 1 after rounding would put membranes on the threshold, where SpikingJelly fires and the original not.
    gate = network.coding.gate
    gate.temporal.expand.weight.abs_()
    frame = network.train().stem(images)
    scores = gate.temporal(frame)[:, :, None, None, None] * gate.spatial_channel(frame)
    gate.spatial_channel.conv2.weight *= LARGEST_SCORE / scores.abs().max()


def _record_inputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return what each spiking layer gets in a training forward pass, [T, B, C, H, W]."""

    def check_rate(module: nn.Module, _: tuple[Tensor], spikes: Tensor) -> None:
        # The gate's output is below 1, CIFAR's threshold: one step of it leaves the first block silent.
        silent_by_design = module in neurons[1:3] and len(spikes) == 1
        if not (silent_by_design or 0 < spikes.mean().item() < 1):
            layer = f"spiking layer {neurons.index(module) + 1} of {len(neurons)}"
            raise MeasurementError(f"{layer} never or always fires at T={len(spikes)}, which leaves nothing to compare")

    neurons = REFERENCE.neurons(network)
    handles = [neuron.register_forward_hook(check_rate) for neuron in neurons]
    inputs = record_inputs_of(network, neurons, images)
    for handle in handles:
        handle.remove()
    return inputs


def _run(
    implementation: Implementation, network: nn.Module, images: Tensor, labels: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors behind each of NETWORK_LIMITS by name; logits are [T, B, K]."""
    logits = implementation.time_first(network.train()(images))
    F.cross_entropy(logits.mean(0), labels).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    statistics = {name: buffer.double().clone() for name, buffer in network.named_buffers()}
    with torch.no_grad():
        evaluated = implementation.time_first(network.eval()(images))
    return {
        "training logits": {"logits": logits.detach()},
        "loss gradients": gradients,
        "running statistics": statistics,
        "evaluation logits": {"logits": evaluated},
    }


def _largest_difference(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    if got.keys() != wanted.keys():
        raise MeasurementError(f"tensors without a counterpart: {', '.join(sorted(got.keys() ^ wanted.keys()))}")
    return max(_relative_difference(got[name], wanted[name]) for name in wanted)


def _relative_difference(got: Tensor, wanted: Tensor) -> float:
    error, largest = (got - wanted).abs().max().item(), wanted.abs().max().item()
    if math.isnan(error) or math.isnan(largest):
        # max() over the tensors would lose a NaN.
        return math.inf
    if largest == 0:
        # Gradients of convolutions that no spike reaches.
        return 0.0 if error == 0 else math.inf
    return error / largest


def _compare_neurons(
    implementation: Implementation,
    neurons: Sequence[nn.Module],
    family: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Agreement]:
    T = len(inputs[0])
    exact = LIFNode.from_parameters(PRESETS[family], "torch")
    changed = spikes = 0
    squared_error = squared_size = 0.0
    for neuron, recorded in zip(neurons, inputs, strict=True):
        x_seq = recorded.to(dtype)
        grad_spikes = torch.randn_like(x_seq)
        ambiguous = _near_a_jump(exact, x_seq.double())
        wanted, wanted_grad = _run_neuron(exact, x_seq.double(), grad_spikes.double())
        for memory_format in (torch.contiguous_format, torch.channels_last):
            ordered = x_seq.flatten(0, 1).contiguous(memory_format=memory_format).unflatten(0, x_seq.shape[:2])
            got, got_grad = map(
                implementation.time_first,
                _run_neuron(neuron, implementation.time_first(ordered), implementation.time_first(grad_spikes)),
            )
            differs = got.double() != wanted
            changed += int(differs.sum())
            spikes += differs.numel()
            # A changed spike changes the gradient of its neuron at all times.
            same = ~(differs | ambiguous).any(0)
            squared_error += ((got_grad.double() - wanted_grad) * same).square().sum().item()
            squared_size += (wanted_grad * same).square().sum().item()
    name = str(dtype).removeprefix("torch.")
    # A single unlucky spike in a small network proves nothing.
    limit = max(CHANGED_SPIKES_LIMIT, 1 / spikes)
    return [
        _checked(Agreement(implementation.name, T, name, "share of changed spikes", changed / spikes, limit)),
        _checked(
            Agreement(
                implementation.name,
                T,
                name,
                "neurons' gradients",
                (squared_error / squared_size) ** 0.5,
                GRADIENT_LIMITS[dtype],
            )
        ),
    ]


def _compare_fused(
    implementation: Implementation,
    reference: MSResNet,
    size: NetworkSize,
    T: int,
    images: Tensor,
    dtype: torch.dtype,
) -> list[Agreement]:
    precision = _precision(dtype)
    layout = choose_layout(implementation, precision, "auto", images.device)
    network = implementation.build(size, T)
    network.load_state_dict(reference.state_dict())
    network.to(images.device, memory_format=LAYOUTS[layout])
    context = autocast(images.device, "off" if precision == "fp32" else precision)
    name = str(dtype).removeprefix("torch.")
    return [
        _checked(Agreement(implementation.name, T, name, each.quantity, each.difference, each.limit))
        for each in compare_fused(network, reference, images, dtype, context)
    ]


def _compare_replayed(
    implementation: Implementation,
    state: Mapping[str, Tensor],
    size: NetworkSize,
    T: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Agreement]:
    precision = _precision(dtype)
    layout = choose_layout(implementation, precision, "auto", device)
    name = str(dtype).removeprefix("torch.")
    return [
        _checked(Agreement(implementation.name, T, name, each.quantity, each.difference, each.limit))
        for each in compare_replayed(implementation, size, T, precision, layout, state, device)
    ]


def _precision(dtype: torch.dtype) -> str:
    return next((name for name, half in DTYPES.items() if half == dtype), "fp32")


def _near_a_jump(exact: LIFNode, x_seq: Tensor) -> Tensor:
    """Return where, [T, ...], rounding decides on which side of a jump of the surrogate gradient a membrane is."""
    jump = JUMPS.get(type(exact.surrogate_function))
    if jump is None:
        return torch.zeros_like(x_seq, dtype=torch.bool)
    distances: list[Tensor] = []

    def record(_: nn.Module, arguments: tuple[Tensor]) -> None:
        distances.append((arguments[0].abs() - jump).abs())

    # The reference asks the surrogate at every time step.
    handle = exact.surrogate_function.register_forward_pre_hook(record)
    with torch.no_grad():
        lif.reference(x_seq, 0.0, exact.lif_parameters())
    handle.remove()
    distance = torch.stack(distances)
    # On the jump itself all precisions agree: such membranes are exact.
    return (distance > 0) & (distance < ROUNDING)


def _run_neuron(neuron: nn.Module, x_seq: Tensor, grad_spikes: Tensor) -> tuple[Tensor, Tensor]:
    """Return spikes and input gradient of a fresh sequence in the neuron's own layout."""
    functional.reset_net(neuron)
    x_seq = x_seq.detach().requires_grad_()
    spikes = neuron(x_seq)
    (grad,) = torch.autograd.grad(spikes, x_seq, grad_spikes)
    functional.reset_net(neuron)
    return spikes.detach(), grad


def _checked(agreement: Agreement) -> Agreement:
    # Written so that NaN fails.
    if not agreement.difference <= agreement.limit:
        raise MeasurementError(
            f"{agreement.implementation} is not the network of {REFERENCE.name}: {agreement.quantity} in"
            f" {agreement.dtype} at T={agreement.T} differ by {agreement.difference:.1e}, limit {agreement.limit:.0e};"
            " nothing was timed"
        )
    return agreement
