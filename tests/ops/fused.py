"""What the tests of the fused operations share: neurons, cases, inputs, and the comparison with the reference.

The reference is run twice. In the operation's dtype and with the statistics that the kernels computed, its spikes are
the kernels' bit for bit. In float64, with autograd through the statistics as well, it gives the gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from gac.ops import batch_norm, lif
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.neuron import LIFParameters

EPS = 1e-5

CIFAR = LIFParameters(2.0, False, 1.0, 0.0, False, surrogate.PiecewiseQuadratic(alpha=1.0))
IMAGENET = LIFParameters(4 / 3, False, 0.5, 0.0, True, surrogate.Rect(alpha=1.0))
# With tau = 3 products and sums round: a fused multiply-add would decide some spikes differently.
SOFT = LIFParameters(3.0, True, 0.2, None, False, surrogate.ATan(alpha=2.0))
NONZERO = LIFParameters(3.0, True, 0.2, -0.3, False, surrogate.Sigmoid(alpha=4.0))
NEURONS = {"cifar": CIFAR, "imagenet": IMAGENET, "soft": SOFT, "nonzero": NONZERO}

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative to the largest gradient: rounding of the order of operations (fp32), of the stored result, and for
# residual_lif of what the first pass leaves to the second.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    """One instantiation of the kernels and the frame [B, C, H, W] to try it on."""

    T: int
    dtype_name: str
    neuron_name: str
    frame: tuple[int, int, int, int]

    def __str__(self) -> str:
        return f"T{self.T}-{self.dtype_name}-{self.neuron_name}-{'x'.join(map(str, self.frame))}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def neuron(self) -> LIFParameters:
        return NEURONS[self.neuron_name]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.T, *self.frame)


# Every T, dtype, neuron and reset with a vector of channels a thread, of fewer where C % 8 is not 0, down to one.
CASES = [
    Case(1, "fp32", "cifar", (3, 8, 3, 4)),
    Case(1, "fp16", "imagenet", (2, 16, 3, 5)),
    Case(2, "bf16", "soft", (2, 6, 3, 5)),
    Case(2, "fp32", "imagenet", (2, 1, 7, 5)),
    Case(4, "fp16", "imagenet", (2, 20, 4, 3)),
    Case(4, "fp32", "nonzero", (2, 7, 3, 5)),
    Case(6, "bf16", "cifar", (2, 7, 3, 3)),
    Case(6, "fp16", "cifar", (1, 24, 5, 5)),
    Case(6, "fp32", "cifar", (2, 48, 3, 3)),  # 12 threads for a row: 8 of a block are idle
    Case(6, "fp32", "cifar", (1, 8, 1, 1)),
    Case(6, "fp32", "cifar", (1, 520, 2, 3)),  # more channels than a block of threads takes
    Case(8, "fp16", "cifar", (2, 8, 3, 3)),
    Case(8, "fp32", "soft", (1, 8, 3, 5)),
    Case(16, "bf16", "nonzero", (1, 8, 3, 3)),
    Case(16, "fp32", "imagenet", (2, 8, 2, 3)),
]
# Every T once and every dtype, for operations whose time steps are those of another that all CASES test.
_FEWER = {(1, "fp32"), (2, "bf16"), (4, "fp16"), (6, "fp32"), (6, "fp16"), (6, "bf16"), (8, "fp16"), (16, "fp32")}
FEWER_CASES = [case for case in CASES if (case.T, case.dtype_name) in _FEWER]
DEFAULT = Case(6, "fp32", "cifar", (2, 8, 3, 4))

LAYOUTS = ("channels_last", "contiguous", "transposed", "expanded")


def normal(shape: Sequence[int], seed: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * deviation + mean


def activations(case: Case, device: str, seed: int = 0, layout: str = "channels_last") -> Tensor:
    """Return normally distributed [T, B, C, H, W]."""
    return laid_out(normal(case.shape, seed, 0.5, 2.0).to(device, case.dtype), layout)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return ``x`` [..., C, H, W] in a memory layout; "expanded" repeats the first image of all."""
    if layout == "channels_last":
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:, :1].expand(x.shape)
    return x


SHORTCUTS = ("plain", "normalized")


def leaves_of_sum(case: Case, shortcut: str, device: str, layout: str = "channels_last") -> tuple[Tensor, ...]:
    """Return y, weight, bias and shortcut of a residual sum, and weight and bias of a shortcut that is normalised."""
    C = case.frame[1]
    y, added = (activations(case, device, seed, layout) for seed in (0, 1))
    of_shortcut = parameters_of_norm(C, device, seed=1) if shortcut == "normalized" else ()
    return y, *parameters_of_norm(C, device), added, *of_shortcut


def is_channels_last(x: Tensor) -> bool:
    """Return whether ``x`` [..., C, H, W] has channels innermost and all else in order."""
    return x.movedim(-3, -1).is_contiguous()


def parameters_of_norm(channels: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return weight and bias [C] of a BatchNorm, all different."""
    return normal([channels], seed + 100, 1.0, 0.25).to(device), normal([channels], seed + 200, 0.4, 0.3).to(device)


# --- BatchNormTransform(y, weight, bias) in three ways


def kernel_statistics(y: Tensor, weight: Tensor, bias: Tensor) -> BatchNormTransform:
    """Return the normalisation by the batch's statistics as the kernels compute them."""
    return BatchNormTransform(weight, bias, *batch_norm.batch_statistics(y.detach(), EPS), True)


def reference_statistics(y: Tensor, weight: Tensor, bias: Tensor) -> BatchNormTransform:
    """Return the same in plain torch, differentiable."""
    mean, variance, _ = batch_norm.reference_moments(y)
    return BatchNormTransform(weight, bias, mean, (variance + EPS).rsqrt(), True)


def fixed_statistics(y: Tensor, weight: Tensor, bias: Tensor) -> BatchNormTransform:
    """Return a normalisation that does not depend on ``y``, as in evaluation; by powers of two, so nothing rounds."""
    return BatchNormTransform(weight, bias, torch.full_like(bias, 0.25), torch.full_like(bias, 2.0), False)


# --- Comparison

Operation = Callable[..., Sequence[Tensor]]


def run(function: Operation, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> tuple[list, list]:
    """Return the outputs of ``function(*leaves)``, and the leaves' gradients for those of the outputs that are given.

    A gradient arrives in the layout that it has here, whatever that of the output is.
    """
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    with_gradient = [i for i, gradient in enumerate(gradients) if gradient is not None]
    incoming = [gradients[i].to(outputs[i].dtype) for i in with_gradient]
    return list(outputs), list(torch.autograd.grad([outputs[i] for i in with_gradient], leaves, incoming))


def seeing_stored(reference: Operation, dtype: torch.dtype) -> Operation:
    """Return a float64 reference whose LIF layers see their input rounded to ``dtype``, as it is stored.

    Otherwise half precision carries some neurons over the threshold. The gradient passes the rounding unchanged.
    """
    layer = lif.reference

    def layer_on_stored(x_seq: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        return layer(x_seq + (x_seq.to(dtype).to(x_seq) - x_seq).detach(), *others)

    def wrapped(*leaves: Tensor) -> Sequence[Tensor]:
        with mock.patch.object(lif, "reference", layer_on_stored):
            return reference(*leaves)

    return wrapped


def assert_has_spikes_and_silence(spikes: Tensor) -> None:
    assert 0.02 < spikes.float().mean() < 0.98, "the case should have spikes and silence"


def assert_gradients_equal(
    fused: Operation,
    reference: Operation,
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    allowed: Sequence[Tensor | float] | None = None,
) -> None:
    """Compare with the reference in float64: gradients within TOLERANCE, for the same spikes (the last output).

    ``allowed``: errors of each leaf's gradient beside that.
    """
    outputs, found = run(fused, leaves, gradients)
    exact_outputs, expected = run(reference, [leaf.double() for leaf in leaves], gradients)
    if set(outputs[-1].unique().tolist()) <= {0.0, 1.0}:
        assert torch.equal(outputs[-1].double(), exact_outputs[-1]), "the case should have no neuron at the threshold"
    for leaf, gradient, exact, more in zip(leaves, found, expected, allowed or [0.0] * len(leaves), strict=True):
        assert gradient.dtype == leaf.dtype
        if leaf.ndim >= 4:
            assert is_channels_last(gradient)
        scale = exact.abs().max().item()
        assert scale > 0
        # The parameters' gradients are float32, and as exact for activations in half precision.
        error = (gradient.double() - exact).abs() - more
        assert error.max() <= TOLERANCE[leaf.dtype] * scale, f"off by {error.max() / scale:.3g} of the largest"


def incoming_gradients(*outputs: Tensor) -> list[Tensor]:
    """Return random gradients of outputs, in the contiguous layout."""
    return [normal(output.shape, 7 + i).to(output) for i, output in enumerate(outputs)]


def dyadic(shape: Sequence[int], device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return channels_last multiples of 1/4 in [-1, 2]: with ``fixed_statistics`` they meet thresholds exactly."""
    values = torch.randint(-4, 9, tuple(shape), generator=torch.Generator().manual_seed(seed)) / 4
    return laid_out(values.to(device, dtype), "channels_last")


def dyadic_parameters(channels: int, device: str) -> tuple[Tensor, Tensor]:
    """Return weight 1/2 and bias 1/4 of a BatchNorm of which, with ``fixed_statistics``, nothing remains: z = y."""
    return torch.full([channels], 0.5, device=device), torch.full([channels], 0.25, device=device)


def assert_ties(layer: Callable[[LIFParameters], Tensor], neuron: LIFParameters) -> None:
    """Assert that some neurons of ``layer``, which returns spikes, stay silent exactly at the threshold."""
    just_below = replace(neuron, v_threshold=neuron.v_threshold - 2.0**-16)
    assert layer(just_below).sum() > layer(neuron).sum()


# --- What every operation promises


def assert_gradients_do_not_share_memory(function: Operation, leaves: Sequence[Tensor]) -> None:
    """Assert that writing to one leaf's .grad, as an optimiser may, changes no other."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    # Autograd may copy what it makes the .grad; this is what it got.
    given = torch.autograd.grad(outputs, leaves, incoming_gradients(*outputs), retain_graph=True)
    assert len({gradient.data_ptr() for gradient in given}) == len(given)
    torch.autograd.backward(outputs, incoming_gradients(*outputs))
    expected = [leaf.grad.clone() for leaf in leaves]
    for written, gradient in zip(leaves, expected, strict=True):
        written.grad.add_(1.0)
        gradient.add_(1.0)
        torch.testing.assert_close([leaf.grad for leaf in leaves], expected, rtol=0, atol=0)


def assert_no_second_derivative(function: Operation, leaves: Sequence[Tensor]) -> None:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, incoming_gradients(*outputs), create_graph=True)
    with pytest.raises(NotImplementedError, match="none of second order"):
        sum(gradient.sum() for gradient in gradients).backward()


def assert_autocast_casts_nothing(
    function: Operation, leaves: Sequence[Tensor], device: str, autocast_dtype: torch.dtype
) -> None:
    """Assert that outputs and gradients of float32 leaves are the same to the bit under autocast."""
    gradients = incoming_gradients(*function(*leaves))
    expected = run(function, leaves, gradients)
    with torch.autocast(device, autocast_dtype):
        found = run(function, leaves, gradients)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
