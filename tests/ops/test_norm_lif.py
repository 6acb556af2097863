"""BatchNorm and LIF in one pass: the kernels against the reference (see tests/ops/fused.py)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from gac.errors import InputError
from gac.ops import norm_lif
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.neuron import LIFParameters
from ops import fused
from ops.fused import CASES, CIFAR, DEFAULT, DTYPES, NONZERO, Case


def layer(function: Callable, statistics: Callable[..., BatchNormTransform], neuron: LIFParameters) -> fused.Operation:
    """Return ``function`` (norm_lif or its reference) as one of y, weight and bias."""
    return lambda y, weight, bias: (function(y, statistics(y, weight, bias), neuron),)


def leaves_of(case: Case, device: str, layout: str = "channels_last") -> tuple[Tensor, Tensor, Tensor]:
    return fused.activations(case, device, layout=layout), *fused.parameters_of_norm(case.frame[1], device)


def assert_kernels_equal_reference(leaves: tuple[Tensor, ...], neuron: LIFParameters, fixed: bool = False) -> None:
    statistics = fused.fixed_statistics if fixed else fused.kernel_statistics
    kernels = layer(norm_lif.norm_lif, statistics, neuron)
    (spikes,) = kernels(*leaves)
    assert spikes.dtype == leaves[0].dtype
    assert fused.is_channels_last(spikes)
    fused.assert_has_spikes_and_silence(spikes)
    assert torch.equal(spikes, *layer(norm_lif.reference, statistics, neuron)(*leaves))
    exact_statistics = fused.fixed_statistics if fixed else fused.reference_statistics
    reference = layer(norm_lif.reference, exact_statistics, neuron)
    fused.assert_gradients_equal(kernels, reference, leaves, fused.incoming_gradients(spikes))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_length_dtype_and_neuron(case: Case, device: str) -> None:
    assert_kernels_equal_reference(leaves_of(case, device), case.neuron)


@pytest.mark.parametrize("layout", fused.LAYOUTS)
def test_every_memory_layout(layout: str, device: str) -> None:
    assert_kernels_equal_reference(leaves_of(DEFAULT, device, layout), CIFAR)


def test_fixed_statistics_have_no_gradient(device: str) -> None:
    y, weight, bias = leaves_of(DEFAULT, device)
    assert_kernels_equal_reference((y, weight, bias), CIFAR, fixed=True)


@pytest.mark.parametrize("neuron", ["cifar", "imagenet"])
def test_ties_at_thresholds_and_window_ends(neuron: str, device: str) -> None:
    case = replace(DEFAULT, neuron_name=neuron)
    y = fused.dyadic(case.shape, device, case.dtype)
    leaves = y, *fused.dyadic_parameters(case.frame[1], device)
    assert_kernels_equal_reference(leaves, case.neuron, fixed=True)
    normalization = fused.fixed_statistics(*leaves)
    fused.assert_ties(lambda neuron: norm_lif.norm_lif(y, normalization, neuron), case.neuron)


def test_spikes_are_bit_equal_where_products_round(device: str) -> None:
    # The second step is within some units in the last place of the threshold: a fused multiply-add would show.
    first = fused.normal((64, 1, 8, 8), 0).double().clamp(max=0.0)
    h = NONZERO.decay * NONZERO.v_reset + NONZERO.gain * first + NONZERO.bias
    second = (NONZERO.v_threshold - NONZERO.bias - NONZERO.decay * h) / NONZERO.gain
    y = torch.stack((first, second)).float().to(device)
    leaves = y, *fused.dyadic_parameters(1, device)
    (spikes,) = layer(norm_lif.norm_lif, fused.fixed_statistics, NONZERO)(*leaves)
    fused.assert_has_spikes_and_silence(spikes[1])
    assert torch.equal(spikes, *layer(norm_lif.reference, fused.fixed_statistics, NONZERO)(*leaves))


def test_unaligned_parameters(device: str) -> None:
    y, weight, bias = leaves_of(DEFAULT, device)
    unaligned = torch.cat([weight[:1], weight])[1:]
    assert unaligned.data_ptr() % 16 != 0
    assert_kernels_equal_reference((y, unaligned, bias), CIFAR)


def test_gradient_of_a_sum(device: str) -> None:
    leaves = leaves_of(DEFAULT, device)
    kernels = layer(norm_lif.norm_lif, fused.kernel_statistics, CIFAR)
    ones = torch.ones(DEFAULT.shape, device=device)
    _, expected = fused.run(kernels, leaves, [ones])
    _, found = fused.run(kernels, leaves, [ones[:1, :1, :1, :1, :1].expand(ones.shape)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_keeps_nothing_but_its_inputs(device: str) -> None:
    y, weight, bias = (leaf.requires_grad_() for leaf in leaves_of(DEFAULT, device))
    normalization = fused.kernel_statistics(y, weight, bias)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm_lif.norm_lif(y, normalization, CIFAR)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (y, *normalization.tensors)]


def test_gradients_do_not_share_memory(device: str) -> None:
    fused.assert_gradients_do_not_share_memory(
        layer(norm_lif.norm_lif, fused.kernel_statistics, CIFAR), leaves_of(DEFAULT, device)
    )


def test_opcheck(device: str, half: str) -> None:
    case = replace(DEFAULT, dtype_name=half)
    leaves = leaves_of(case, device, "contiguous")
    normalization = fused.kernel_statistics(*leaves)
    constants = CIFAR.flatten()
    y, *tensors = (t.requires_grad_(i < 3) for i, t in enumerate((leaves[0], *normalization.tensors)))
    torch.library.opcheck(torch.ops.gac.norm_lif.default, (y, *tensors, True, False, *constants))
    y, *tensors = (tensor.detach() for tensor in (y, *tensors))
    (grad,) = fused.incoming_gradients(y)
    torch.library.opcheck(torch.ops.gac.norm_lif_backward_sums.default, (grad, y, *tensors, *constants))
    sums = torch.ones(2, case.frame[1], device=device)
    torch.library.opcheck(torch.ops.gac.norm_lif_backward_input.default, (grad, y, *tensors, sums, 0.125, *constants))


def test_second_derivative_is_refused(device: str) -> None:
    fused.assert_no_second_derivative(
        layer(norm_lif.norm_lif, fused.kernel_statistics, CIFAR), leaves_of(DEFAULT, device)
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_casts_nothing(dtype: str, device: str) -> None:
    leaves = leaves_of(DEFAULT, device)
    fused.assert_autocast_casts_nothing(
        layer(norm_lif.norm_lif, fused.kernel_statistics, CIFAR), leaves, device, DTYPES[dtype]
    )


# --- Bad input


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((0, 2, 8, 3, 3), torch.float32, r"input of BatchNorm and LIF must be .* got shape \[0, 2, 8, 3, 3\]"),
        ((4, 0, 8, 3, 3), torch.float32, r"must be a non-empty \[T, B, C, H, W\], got shape \[4, 0, 8, 3, 3\]"),
        ((4, 8, 3, 3), torch.float32, r"must be a non-empty \[T, B, C, H, W\], got shape \[4, 8, 3, 3\]"),
        ((17, 1, 8, 1, 1), torch.float32, "take up to 16 time steps, got 17; use backend='torch'"),
        ((4, 1, 8, 1, 1), torch.float64, r"got torch\.float64; use backend='torch'"),
    ],
    ids=["no-time", "no-image", "rank", "T", "float64"],
)
def test_bad_input(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    normalization = fused.fixed_statistics(torch.ones(1), torch.ones(8), torch.ones(8))
    with pytest.raises(InputError, match=message) as error:
        norm_lif.norm_lif(torch.ones(shape, dtype=dtype), normalization, CIFAR)
    assert "\n" not in str(error.value)


def test_unsupported_surrogate() -> None:
    normalization = fused.fixed_statistics(torch.ones(1), torch.ones(8), torch.ones(8))
    with pytest.raises(InputError, match="not Erf; use another surrogate or backend='torch'"):
        norm_lif.norm_lif(torch.ones(4, 1, 8, 1, 1), normalization, replace(CIFAR, surrogate=surrogate.Erf()))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight", torch.ones(7), r"weight must be a contiguous float32 \[C=8\] on cpu, got \[7\]"),
        ("bias", torch.ones(8, dtype=torch.float16), r"bias must be .* got \[8\], torch.float16"),
        ("mean", torch.ones(16)[::2], r"mean must be a contiguous"),
        ("inverse_std", torch.ones(8, 1), r"inverse_std must be .* got \[8, 1\]"),
    ],
)
def test_a_normalisation_that_does_not_fit(name: str, tensor: Tensor, message: str) -> None:
    normalization = fused.fixed_statistics(torch.ones(1), torch.ones(8), torch.ones(8))
    with pytest.raises(InputError, match=message):
        norm_lif.norm_lif(torch.ones(4, 1, 8, 1, 1), replace(normalization, **{name: tensor}), CIFAR)
