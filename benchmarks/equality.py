"""The gate before networks are timed: only networks that compute the same may be compared.

A small network of the timed family and T runs in float64, where rounding decides no spike, and in float32 on a case
whose membranes stay away from the threshold; logits, loss gradients and running statistics must be the reference's.
What the kernels compute in the timed precisions is checked operation by operation (``kernels.check_operations``).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import kernels
from benchmarks.candidates import REFERENCE, Implementation, Setting, make_candidate, record_inputs
from benchmarks.common import PRECISIONS, Difference, MeasurementError, NetworkSize, print_line, relative_rms, worst
from gac.execution.cuda_graph import WARM_UP_CALLS

# Of the largest entry of the reference's tensor.
LIMITS = {torch.float64: 1e-8, torch.float32: 2e-3}
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


def check_networks(
    implementations: Sequence[Implementation],
    size: NetworkSize,
    time_steps: Sequence[int],
    precisions: Sequence[str],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Check and print the equality of all implementations; return the comparisons for the JSON file.

    Raises:
        MeasurementError: If something differs by more than its limit, or if a layer of the reference never fires.
    """
    found: list[dict[str, Any]] = []

    def add(implementation: Implementation, T: int, dtype: str, differences: Sequence[Difference]) -> None:
        for each in differences:
            if not each.within:
                raise MeasurementError(
                    f"{implementation.name} is not the network of {REFERENCE.name}: {each.quantity} in {dtype} at T={T}"
                    f" differ by {each.difference:.1e}, limit {each.limit:.0e}; nothing was timed"
                )
            found.append({"implementation": implementation.name, "T": T, "dtype": dtype, **asdict(each)})

    # Large enough for every kind of block and BatchNorm, small enough for a quiet case.
    small = replace(size, width=8, depth=tuple(min(2, n) for n in size.depth), num_classes=min(10, size.num_classes))
    small = replace(small, image_size=8 if size.family == "cifar" else 32)
    for T in dict.fromkeys(time_steps):
        case = max((_make_case(small, T, seed, device) for seed in range(SEEDS)), key=lambda case: case.margin)
        if case.margin == 0:
            raise MeasurementError(f"a spiking layer never or always fires at T={T}, which leaves nothing to compare")
        for each in implementations:
            for dtype in (torch.float64, torch.float32):
                if dtype == torch.float32 or not (each.kernels or each is REFERENCE):
                    add(each, T, str(dtype).removeprefix("torch."), _compare(each, case, small, T, dtype))
            for precision in precisions:
                dtype = PRECISIONS[precision].dtype
                if each.kernels and not each.replayed:
                    checked = kernels.check_operations(list(kernels.OPERATIONS), size, T, [dtype], device, peers=False)
                    add(
                        each,
                        T,
                        PRECISIONS[precision].dtype_name,
                        [replace(d, quantity=f"{what}: {d.quantity}") for what, d in checked],
                    )
                if each.replayed:
                    setting = Setting(small, T, BATCH, precision, "auto", device)
                    add(each, T, PRECISIONS[precision].dtype_name, _compare_replayed(each, setting, case.state))
    for dtype in dict.fromkeys(each["dtype"] for each in found):
        most = max(
            (each for each in found if each["dtype"] == dtype), key=lambda each: each["difference"] / each["limit"]
        )
        what = f"{most['quantity']} {most['difference']:.0e} (limit {most['limit']:.0e}) of {most['implementation']}"
        print_line("equality", f"{dtype}: closest to its limit {what}")
    return found


def _make_case(size: NetworkSize, T: int, seed: int, device: torch.device) -> Case:
    torch.manual_seed(seed)
    reference = REFERENCE.build(size, T).double()
    images = torch.randn(BATCH, 3, size.image_size, size.image_size, dtype=torch.float64)
    labels = torch.randint(size.num_classes, (BATCH,))
    perturb(reference, images)
    reference.to(device)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    neurons = REFERENCE.neurons(reference)
    margin = torch.inf
    for i, (neuron, x) in enumerate(zip(neurons, record_inputs(reference, neurons, images.to(device)), strict=True)):
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


def _compare(
    implementation: Implementation, case: Case, size: NetworkSize, T: int, dtype: torch.dtype
) -> list[Difference]:
    case.reference.load_state_dict(case.state)
    network = implementation.build(size, T).to(case.images.device, dtype)
    network.load_state_dict(implementation.translate(case.state))
    if implementation.kernels:
        network.to(memory_format=torch.channels_last)
    with _exact_convolutions():
        wanted = _outcome(REFERENCE, case.reference, case.images, case.labels)
        got = _outcome(implementation, network, case.images.to(dtype), case.labels)
    differences = []
    for quantity, tensors in wanted.items():
        if not quantity.endswith("logits"):
            tensors = implementation.translate(tensors)
        if tensors.keys() != got[quantity].keys():
            unmatched = ", ".join(sorted(tensors.keys() ^ got[quantity].keys()))
            raise MeasurementError(f"{implementation.name}: tensors without a counterpart: {unmatched}")
        errors = [
            (got[quantity][name].double() - x).abs().max() / x.abs().max().clamp(min=1e-30)
            for name, x in tensors.items()
        ]
        differences.append(Difference(quantity, worst(errors), LIMITS[dtype]))
    return differences


def _outcome(implementation: Implementation, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict]:
    logits = implementation.time_first(network.train()(images))
    network.zero_grad()
    F.cross_entropy(logits.mean(0), labels).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}
    statistics = {name: buffer.double().clone() for name, buffer in network.named_buffers()}
    with torch.no_grad():
        evaluated = implementation.time_first(network.eval()(images))
    return {
        "training logits": {"logits": logits.detach()},
        "loss gradients": gradients,
        "running statistics": statistics,
        "evaluation logits": {"logits": evaluated},
    }


def _compare_replayed(
    implementation: Implementation, setting: Setting, weights: Mapping[str, Tensor]
) -> list[Difference]:
    """Compare replayed steps with as many called ones; they should be equal to the bit.

    The limits are those of rounding all the same, in case that a library chooses another algorithm while it is captured.
    """
    results: list[dict[str, list[Tensor]]] = []
    with _exact_convolutions():
        for each in (implementation, replace(implementation, replayed=False)):
            torch.manual_seed(0)
            candidate = make_candidate(each, setting, weights)
            candidate.scaler = torch.amp.GradScaler(
                setting.device.type, LOSS_SCALE, enabled=setting.precision == "fp16"
            )
            # The first replayed step makes the warm-up's steps too.
            for _ in range(1 if each.replayed else 1 + WARM_UP_CALLS):
                candidate.train_step()
            before = [parameter.detach().clone() for parameter in candidate.network.parameters()]
            loss = candidate.train_step().clone()
            parameters = list(candidate.network.parameters())
            gradients = [parameter.grad.clone() for parameter in parameters]
            change = [now.detach() - then for now, then in zip(parameters, before, strict=True)]
            statistics = [buffer.clone() for buffer in candidate.network.buffers()]
            candidate.rest()
            candidate.start_evaluation()
            candidate.eval_step()
            with torch.no_grad():
                for parameter in parameters:
                    parameter *= 1.1
            logits = candidate.eval_step().clone()
            results.append(
                {
                    "loss": [loss],
                    "gradients": gradients,
                    "weights' change": change,
                    "running statistics": statistics,
                    "logits": [logits],
                }
            )
    limit = PRECISIONS[setting.precision].rounding
    return [
        Difference(
            f"replayed: {name}",
            worst(relative_rms(a.double(), b.double()) for a, b in zip(got, results[1][name], strict=True)),
            limit,
        )
        for name, got in results[0].items()
    ]


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Let convolutions be deterministic and without TF32: a sum in another order may change a spike, and that the rest."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
