"""The last residual sum, LIF and average in one pass: the kernels against the reference (see tests/ops/fused.py)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from gac.errors import InputError
from gac.ops import residual_lif, residual_lif_pool
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.neuron import LIFParameters
from ops import fused
from ops.fused import CIFAR, DEFAULT, DTYPES, FEWER_CASES, SHORTCUTS, Case, leaves_of_sum


def pool(function: Callable, statistics: Callable[..., BatchNormTransform], neuron: LIFParameters) -> fused.Operation:
    """Return ``function`` (residual_lif_pool or its reference) as one of what ``leaves_of_sum`` gives."""

    def operation(y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, *parameters: Tensor) -> tuple[Tensor]:
        of_shortcut = statistics(shortcut, *parameters) if parameters else None
        return (function(y, statistics(y, weight, bias), shortcut, of_shortcut, neuron),)

    return operation


KERNELS = pool(residual_lif_pool.residual_lif_pool, fused.kernel_statistics, CIFAR)


def exact_mean(y: Tensor, *others: object) -> Tensor:
    """Return the rates of the reference's spikes from float64, rounded to float32 and to the dtype of ``y``."""
    # torch's float32 mean multiplies by 1/n on a GPU, which need not be the nearest number.
    _, spikes = residual_lif.reference(y, *others)
    return spikes.double().mean((-2, -1)).float().to(y.dtype)


def assert_kernels_equal_reference(leaves: tuple[Tensor, ...], neuron: LIFParameters, fixed: bool = False) -> None:
    y, statistics = leaves[0], fused.fixed_statistics if fixed else fused.kernel_statistics
    kernels = pool(residual_lif_pool.residual_lif_pool, statistics, neuron)
    (rates,) = kernels(*leaves)
    assert rates.dtype == y.dtype
    assert rates.shape == y.shape[:3]
    assert rates.is_contiguous()
    fused.assert_has_spikes_and_silence(rates)
    assert torch.equal(rates, pool(exact_mean, statistics, neuron)(*leaves)[0])
    exact_statistics = fused.fixed_statistics if fixed else fused.reference_statistics
    reference = fused.seeing_stored(pool(residual_lif_pool.reference, exact_statistics, neuron), y.dtype)
    fused.assert_gradients_equal(kernels, reference, leaves, fused.incoming_gradients(rates))


@pytest.mark.parametrize("case", FEWER_CASES, ids=str)
def test_every_length_dtype_and_neuron(case: Case, device: str) -> None:
    # Each kind of shortcut with every other case; both with the default one, below.
    shortcut = SHORTCUTS[FEWER_CASES.index(case) % 2]
    assert_kernels_equal_reference(leaves_of_sum(case, shortcut, device), case.neuron)


@pytest.mark.parametrize("kind", ["PiecewiseQuadratic", "Rect", "Sigmoid", "ATan"])
@pytest.mark.parametrize("detach_reset", [False, True], ids=["reset", "detached"])
@pytest.mark.parametrize("v_reset", [0.0, -0.25, None], ids=["zero", "nonzero", "soft"])
def test_every_neuron(v_reset: float | None, detach_reset: bool, kind: str, device: str) -> None:
    neuron = LIFParameters(3.0, True, 0.5, v_reset, detach_reset, getattr(surrogate, kind)(alpha=1.5))
    assert_kernels_equal_reference(leaves_of_sum(DEFAULT, "plain", device), neuron)


@pytest.mark.parametrize("layout", fused.LAYOUTS)
def test_every_memory_layout(layout: str, device: str) -> None:
    assert_kernels_equal_reference(leaves_of_sum(DEFAULT, "normalized", device, layout), CIFAR)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_fixed_statistics_have_no_gradient(shortcut: str, device: str) -> None:
    assert_kernels_equal_reference(leaves_of_sum(DEFAULT, shortcut, device), CIFAR, fixed=True)


@pytest.mark.parametrize("neuron", ["cifar", "imagenet"])
def test_ties_at_thresholds_and_window_ends(neuron: str, device: str) -> None:
    case = replace(DEFAULT, neuron_name=neuron)
    y, shortcut = (fused.dyadic(case.shape, device, case.dtype, seed) for seed in (0, 1))
    leaves = y, *fused.dyadic_parameters(case.frame[1], device), shortcut / 2
    assert_kernels_equal_reference(leaves, case.neuron, fixed=True)
    rates_of = residual_lif_pool.residual_lif_pool
    fused.assert_ties(lambda neuron: pool(rates_of, fused.fixed_statistics, neuron)(*leaves)[0], case.neuron)


@pytest.mark.parametrize("dtype", ["fp16"])
def test_spikes_are_those_of_the_rounded_sum(dtype: str, device: str) -> None:
    # 1 + 2^-12 is above the threshold; in half precision it is the threshold, and the neuron is silent.
    shape = (1, 1, 8, 1, 1)
    y, shortcut = torch.full(shape, 2.0**-12, device=device).half(), torch.ones(shape, device=device).half()
    weight, mean = torch.ones(8, device=device), torch.zeros(8, device=device)
    normalization = BatchNormTransform(weight, mean, mean, weight, False)
    for function in (residual_lif_pool.residual_lif_pool, residual_lif_pool.reference):
        assert function(y, normalization, shortcut, None, CIFAR).sum() == 0
        assert function(y, normalization, shortcut * 1.25, None, CIFAR).unique().tolist() == [1.0]


def test_gradient_of_a_sum(device: str) -> None:
    leaves = leaves_of_sum(DEFAULT, "plain", device)
    ones = torch.ones(DEFAULT.shape[:3], device=device)
    _, expected = fused.run(KERNELS, leaves, [ones])
    _, found = fused.run(KERNELS, leaves, [ones[:1, :1, :1].expand(ones.shape)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_gradients_do_not_share_memory(shortcut: str, device: str) -> None:
    fused.assert_gradients_do_not_share_memory(KERNELS, leaves_of_sum(DEFAULT, shortcut, device))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_keeps_only_what_it_was_given(shortcut: str, device: str) -> None:
    leaves = [leaf.requires_grad_() for leaf in leaves_of_sum(DEFAULT, shortcut, device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        KERNELS(*leaves)
    assert [tensor.data_ptr() for tensor in kept if tensor.ndim == 5] == [leaves[0].data_ptr(), leaves[3].data_ptr()]


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_opcheck(shortcut: str, device: str, half: str) -> None:
    case = replace(DEFAULT, dtype_name=half)
    y, weight, bias, added, *of_shortcut = leaves_of_sum(case, shortcut, device, "contiguous")
    statistics = fused.kernel_statistics(y, weight, bias).tensors[2:]
    shortcut_tensors = fused.kernel_statistics(added, *of_shortcut).tensors if of_shortcut else (None,) * 4
    constants = CIFAR.flatten()
    y, weight, bias, added = (tensor.clone().requires_grad_() for tensor in (y, weight, bias, added))
    terms = (y, weight, bias, *statistics, added, *shortcut_tensors)
    torch.library.opcheck(torch.ops.gac.residual_lif_pool.default, (*terms, True, False, *constants))
    grad = fused.normal(case.shape[:3], 7).to(y)
    terms = tuple(None if tensor is None else tensor.detach() for tensor in terms)
    torch.library.opcheck(torch.ops.gac.residual_lif_pool_backward_sums.default, (grad, *terms, *constants))


def test_second_derivative_is_refused(device: str) -> None:
    fused.assert_no_second_derivative(KERNELS, leaves_of_sum(DEFAULT, "normalized", device))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_casts_nothing(dtype: str, device: str) -> None:
    leaves = leaves_of_sum(DEFAULT, "normalized", device)
    fused.assert_autocast_casts_nothing(KERNELS, leaves, device, DTYPES[dtype])


# --- Bad input: the terms of the sum are checked as in residual_lif

GOOD = torch.ones(4, 2, 8, 1, 1)


@pytest.mark.parametrize(
    ("shortcut", "neuron", "message"),
    [
        (GOOD[:, :1], CIFAR, r"shortcut must be \[4, 2, 8, 1, 1\], .* like the other input, got \[4, 1, 8, 1, 1\]"),
        (GOOD, replace(CIFAR, surrogate=surrogate.Erf()), "not Erf; use another surrogate or backend='torch'"),
    ],
    ids=["shortcut", "surrogate"],
)
def test_bad_input(shortcut: Tensor, neuron: LIFParameters, message: str) -> None:
    normalization = fused.fixed_statistics(GOOD, torch.ones(8), torch.ones(8))
    with pytest.raises(InputError, match=message) as error:
        residual_lif_pool.residual_lif_pool(GOOD, normalization, shortcut, None, neuron)
    assert "\n" not in str(error.value)
