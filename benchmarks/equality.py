"""The gate before networks are timed: only networks that compute the same may be compared.

A small network of the timed family and T runs in float64, where rounding decides no spike, and in float32 on a case
whose membranes stay away from the threshold; logits, loss gradients and running statistics must be the reference's.
What the kernels compute in the timed precisions is checked operation by operation (``kernels.check_operations``).
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from benchmarks import kernels
from benchmarks.candidates import REFERENCE, Implementation, Setting, make_candidate, neurons, record_inputs, what_runs
from benchmarks.common import (
    BY_DTYPE,
    PRECISIONS,
    Difference,
    MeasurementError,
    NetworkSize,
    Report,
    compare,
    relative_rms,
    worst,
)
from gac.execution.cuda_graph import WARM_UP_CALLS
from gac.models.ms_resnet import MSResNet

# Of the largest entry of the reference's tensor.
LIMITS = {torch.float64: 1e-8, torch.float32: 1e-4}
BATCH, SEEDS = 4, 10
# Of the gate, before the sigmoid. Higher, it is 1 after rounding: the membrane is then on the threshold, where
# SpikingJelly fires and the original does not.
LARGEST_SCORE = 6.0
# Of replayed steps: fewer images have larger gradients, which fp16's own first scale would let overflow.
LOSS_SCALE = 128.0


@dataclass
class Case:
    """A float64 reference with all spiking layers active, and how close to the threshold a membrane of it comes."""

    reference: nn.Module
    state: dict[str, Tensor]
    images: Tensor
    labels: Tensor
    margin: float


def begin(
    options: Namespace,
    names: Sequence[str],
    precisions: Sequence[str],
    device: torch.device,
    report: Report,
    **more: Any,
) -> tuple[NetworkSize, list[Implementation], list[str]]:
    """Begin the report of a benchmark of networks; return their size and what of names and precisions can run."""
    size = NetworkSize.from_options(options)
    implementations, precisions, skipped = what_runs(names, precisions, device)
    report.begin(**more, network=asdict(size), skipped=skipped)
    report.line("network", size)
    for name, reason in skipped.items():
        report.line("skipped", f"{name}: {reason}")
    return size, implementations, precisions


def check_networks(
    implementations: Sequence[Implementation],
    size: NetworkSize,
    time_steps: Sequence[int],
    precisions: Sequence[str],
    device: torch.device,
    report: Report,
) -> None:
    """Check and report the equality of all implementations.

    Raises MeasurementError if something differs by more than its limit, or if a layer of the reference never fires.
    """
    found: list[dict[str, Any]] = []
    # Large enough for every kind of block and BatchNorm, small enough for a quiet case.
    depth, image_size = tuple(min(2, blocks) for blocks in size.depth), 8 if size.family == "cifar" else 32
    small = replace(size, width=8, depth=depth, image_size=image_size, num_classes=min(10, size.num_classes))
    for T in dict.fromkeys(time_steps):
        case = max((_make_case(small, T, seed, device) for seed in range(SEEDS)), key=lambda case: case.margin)
        if case.margin == 0:
            raise MeasurementError(f"a spiking layer never or always fires at T={T}, which leaves nothing to compare")
        for each in implementations:
            dtypes = [torch.float32] if each.kernels or each is REFERENCE else [torch.float64, torch.float32]
            compared = [(BY_DTYPE[dtype], _compare(each, case, small, T, dtype)) for dtype in dtypes]
            for name in precisions:
                precision = PRECISIONS[name]
                if each.replayed:
                    setting = Setting(small, T, BATCH, name, "auto", device)
                    compared.append((precision, _compare_replayed(each, setting, case.state)))
                if each.kernels:
                    names = list(kernels.OPERATIONS)
                    checked = kernels.check_operations(names, size, T, [precision.dtype], device, peers=False)
                    compared.append((precision, [replace(d, quantity=f"{what}: {d.quantity}") for what, d in checked]))
                elif not each.names:
                    compared.append((precision, _compare_neuron(each.build(small, T).to(device), precision.dtype)))
            for precision, difference in ((precision, one) for precision, many in compared for one in many):
                if not difference.within:
                    raise MeasurementError(
                        f"{each.name} is not the network of {REFERENCE.name}: {difference.quantity} in"
                        f" {precision.dtype_name} at T={T} differ by {difference.difference:.1e}, limit"
                        f" {difference.limit:.0e}; nothing was timed"
                    )
                place = {"implementation": each.name, "T": T, "dtype": precision.dtype_name}
                found.append({**place, **asdict(difference)})
    for dtype in dict.fromkeys(each["dtype"] for each in found):
        of_dtype = [each for each in found if each["dtype"] == dtype]
        most = max(of_dtype, key=lambda each: each["difference"] / each["limit"])
        what = f"{most['quantity']} {most['difference']:.0e} (limit {most['limit']:.0e}) of {most['implementation']}"
        report.line("equality", f"{dtype}: {len(of_dtype)} comparisons, closest to its limit {what}")
    report.update(agreement=found)


def _make_case(size: NetworkSize, T: int, seed: int, device: torch.device) -> Case:
    torch.manual_seed(seed)
    reference = REFERENCE.build(size, T).double()
    images = torch.randn(BATCH, 3, size.image_size, size.image_size, dtype=torch.float64)
    labels = torch.randint(size.num_classes, (BATCH,))
    perturb(reference, images)
    reference.to(device)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    layers, margin = neurons(reference), torch.inf
    for i, (neuron, x) in enumerate(zip(layers, record_inputs(reference, layers, images.to(device)), strict=True)):
        v, spikes = torch.zeros_like(x[0]), 0
        for t in range(T):
            h = v + (x[t] - v / neuron.tau)
            distance = (h - neuron.v_threshold).abs()
            # To the jumps of ImageNet's surrogate gradient too; on a jump itself both precisions agree.
            jump = (distance - 0.5).abs()
            margin = min(margin, distance.min().item(), jump[jump > 0].min().item())
            v, spikes = h * (h <= neuron.v_threshold), spikes + (h > neuron.v_threshold).sum().item()
        # The gate's output is below 1, CIFAR's threshold: one step of it leaves the first block silent.
        if not (0 < spikes < x.numel() or (T == 1 and i in (1, 2))):
            margin = 0.0
    return Case(reference, state, images.to(device), labels.to(device), margin)


@torch.no_grad()
def perturb(network: nn.Module, images: Tensor) -> None:
    """Take a new network out of its initial state, in which exchanged tensors and wrong gates would hardly show."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor += 0.2 * torch.rand_like(tensor)
    # A new gate is close to 1/2, or high at some times and low at others: too low for the first block to fire.
    gate = network.coding.gate
    gate.temporal.expand.weight.abs_()
    frame = network.train().stem(images)
    scores = gate.temporal(frame)[:, :, None, None, None] * gate.spatial_channel(frame)
    gate.spatial_channel.conv2.weight *= LARGEST_SCORE / scores.abs().max()


def _compare(each: Implementation, case: Case, size: NetworkSize, T: int, dtype: torch.dtype) -> list[Difference]:
    case.reference.load_state_dict(case.state)
    network = each.build(size, T).to(case.images.device, dtype)
    network.load_state_dict(each.translate(case.state))
    if each.kernels:
        network.to(memory_format=torch.channels_last)
    with _exact_convolutions():
        wanted = _outcome(REFERENCE, case.reference, case.images, case.labels)
        got = _outcome(each, network, case.images.to(dtype), case.labels)
    differences = []
    for quantity, tensors in wanted.items():
        tensors = tensors if quantity.endswith("logits") else each.translate(tensors)
        if unmatched := tensors.keys() ^ got[quantity].keys():
            raise MeasurementError(f"{each.name}: tensors without a counterpart: {', '.join(sorted(unmatched))}")
        errors = []
        for name, x in tensors.items():
            error, largest = (got[quantity][name].double() - x).abs().max(), x.abs().max()
            # Gradients of convolutions that no spike reaches are zero.
            errors.append(0.0 if error == largest == 0 else error / largest)
        differences.append(Difference(quantity, worst(errors), LIMITS[dtype]))
    return differences


def _compare_neuron(network: MSResNet, dtype: torch.dtype) -> list[Difference]:
    """Compare our neuron without kernels on noise in some dtype with itself in float64."""
    neuron = neurons(network)[0]

    def fire(x: Tensor) -> dict[str, Tensor]:
        functional.reset_net(neuron)
        return {"spikes": neuron(x)}

    noise = torch.randn(network.T, BATCH, 8, 8, 8, device=network.head.weight.device)
    return compare(fire, fire, {"x of a neuron": noise.to(dtype).requires_grad_()})


def _outcome(each: Implementation, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, Tensor]]:
    time = 1 if each.batch_first else 0
    logits = network.train()(images)
    network.zero_grad()
    F.cross_entropy(logits.mean(time), labels).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}
    statistics = {name: buffer.double().clone() for name, buffer in network.named_buffers()}
    with torch.no_grad():
        evaluated = network.eval()(images)
    return {
        "training logits": {"logits": logits.detach().movedim(time, 0)},
        "loss gradients": gradients,
        "running statistics": statistics,
        "evaluation logits": {"logits": evaluated.movedim(time, 0)},
    }


def _compare_replayed(each: Implementation, setting: Setting, weights: Mapping[str, Tensor]) -> list[Difference]:
    """Compare replayed steps with as many called ones; they should be equal to the bit.

    The limits are those of rounding all the same, in case a library chooses another algorithm while it is captured.
    """
    results = []
    with _exact_convolutions():
        for implementation in (each, replace(each, replayed=False)):
            torch.manual_seed(0)
            candidate = make_candidate(implementation, setting, weights)
            fp16, device = setting.precision == "fp16", setting.device.type
            candidate.scaler = torch.amp.GradScaler(device, LOSS_SCALE, enabled=fp16)
            parameters = list(candidate.network.parameters())
            # The first replayed step makes the steps of its warm-up too.
            for _ in range(1 if implementation.replayed else 1 + WARM_UP_CALLS):
                candidate.train_step()
            before = [parameter.detach().clone() for parameter in parameters]
            result = {"loss": [candidate.train_step().clone()]}
            result["gradients"] = [parameter.grad.clone() for parameter in parameters]
            result["weights' change"] = [now.detach() - then for now, then in zip(parameters, before, strict=True)]
            result["running statistics"] = [buffer.clone() for buffer in candidate.network.buffers()]
            candidate.rest()
            candidate.start_evaluation()
            candidate.eval_step()
            with torch.no_grad():
                for parameter in parameters:
                    parameter *= 1.1
            results.append(result | {"logits": [candidate.eval_step().clone()]})
    got, wanted = results
    limit = PRECISIONS[setting.precision].rounding
    errors = {
        name: worst(relative_rms(a.double(), b.double()) for a, b in zip(got[name], wanted[name], strict=True))
        for name in wanted
    }
    return [Difference(f"replayed: {name}", error, limit) for name, error in errors.items()]


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    # Rounding, and a sum in another order, may change a spike, and a changed spike the rest of the network.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
