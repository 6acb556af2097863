"""Residual sum and LIF in one pass: the kernels against the reference (see tests/ops/fused.py)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from gac.errors import InputError
from gac.ops import residual_lif
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.neuron import LIFParameters
from ops import fused
from ops.fused import CIFAR, DEFAULT, DTYPES, FEWER_CASES, SHORTCUTS, Case, leaves_of_sum

NO_NEURON = None


def block_end(
    function: Callable, statistics: Callable[..., BatchNormTransform], neuron: LIFParameters
) -> fused.Operation:
    """Return ``function`` (residual_lif or its reference) as one of y, weight, bias, shortcut, perhaps with BatchNorm.

    It gives membrane stream and spikes, or only the membrane stream where there is no neuron.
    """

    def operation(y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        of_shortcut = statistics(shortcut, *parameters) if parameters else None
        outputs = function(y, statistics(y, weight, bias), shortcut, of_shortcut, neuron)
        return outputs if neuron != NO_NEURON else outputs[:1]

    return operation


def assert_kernels_equal_reference(
    leaves: tuple[Tensor, ...], neuron: LIFParameters, fixed: bool = False, without: int | None = None
) -> None:
    """``without``: the output that gets no gradient."""
    statistics = fused.fixed_statistics if fixed else fused.kernel_statistics
    kernels = block_end(residual_lif.residual_lif, statistics, neuron)
    outputs = kernels(*leaves)
    for output, expected in zip(outputs, block_end(residual_lif.reference, statistics, neuron)(*leaves), strict=True):
        assert output.dtype == leaves[0].dtype
        assert fused.is_channels_last(output)
        assert torch.equal(output, expected)
    gradients = fused.incoming_gradients(*outputs)
    if without is not None:
        gradients[without] = None
    if neuron != NO_NEURON:
        fused.assert_has_spikes_and_silence(outputs[1])
    exact_statistics = fused.fixed_statistics if fixed else fused.reference_statistics
    reference = fused.seeing_stored(block_end(residual_lif.reference, exact_statistics, neuron), leaves[0].dtype)
    fused.assert_gradients_equal(kernels, reference, leaves, gradients)


@pytest.mark.parametrize("case", FEWER_CASES, ids=str)
def test_every_length_dtype_and_neuron(case: Case, device: str) -> None:
    # Each kind of shortcut with every other case; both with the default one, below.
    shortcut = SHORTCUTS[FEWER_CASES.index(case) % 2]
    assert_kernels_equal_reference(leaves_of_sum(case, shortcut, device), case.neuron)


@pytest.mark.parametrize("neuron", [fused.SOFT, fused.NONZERO], ids=["soft", "nonzero"])
def test_neurons_with_a_gain_and_a_bias(neuron: LIFParameters, device: str) -> None:
    assert_kernels_equal_reference(leaves_of_sum(DEFAULT, "normalized", device), neuron)


@pytest.mark.parametrize("without", [None, 0, 1], ids=["both", "only-spikes", "only-membrane"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_every_combination_of_gradients(shortcut: str, without: int | None, device: str) -> None:
    assert_kernels_equal_reference(leaves_of_sum(DEFAULT, shortcut, device), CIFAR, without=without)


@pytest.mark.parametrize("layout", fused.LAYOUTS)
def test_every_memory_layout(layout: str, device: str) -> None:
    assert_kernels_equal_reference(leaves_of_sum(DEFAULT, "normalized", device, layout), CIFAR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_without_a_neuron(shortcut: str, dtype: str, device: str) -> None:
    leaves = leaves_of_sum(replace(DEFAULT, dtype_name=dtype), shortcut, device)
    assert_kernels_equal_reference(leaves, NO_NEURON)
    y, weight, bias, added = leaves[:4]
    normalization = fused.kernel_statistics(y, weight, bias)
    assert residual_lif.residual_lif(y, normalization, added, None, NO_NEURON)[1] is None


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_fixed_statistics_have_no_gradient(shortcut: str, device: str) -> None:
    assert_kernels_equal_reference(leaves_of_sum(DEFAULT, shortcut, device), CIFAR, fixed=True)


@pytest.mark.parametrize("neuron", ["cifar", "imagenet"])
def test_ties_at_thresholds_and_window_ends(neuron: str, device: str) -> None:
    case = replace(DEFAULT, neuron_name=neuron)
    y, shortcut = (fused.dyadic(case.shape, device, case.dtype, seed) for seed in (0, 1))
    leaves = y, *fused.dyadic_parameters(case.frame[1], device), shortcut / 2
    assert_kernels_equal_reference(leaves, case.neuron, fixed=True)
    normalization = fused.fixed_statistics(*leaves[:3])
    fused.assert_ties(
        lambda neuron: residual_lif.residual_lif(y, normalization, leaves[3], None, neuron)[1], case.neuron
    )


@pytest.mark.parametrize("dtype", ["fp16"])
def test_spikes_are_those_of_the_stored_membrane(dtype: str, device: str) -> None:
    # 1 + 2^-12 is above the threshold; stored in half precision it is the threshold, and the neuron is silent.
    shape = (1, 1, 8, 1, 1)
    y, shortcut = torch.full(shape, 2.0**-12, device=device).half(), torch.ones(shape, device=device).half()
    weight, mean = torch.ones(8, device=device), torch.zeros(8, device=device)
    normalization = BatchNormTransform(weight, mean, mean, weight, False)
    for function in (residual_lif.residual_lif, residual_lif.reference):
        membrane, spikes = function(y, normalization, shortcut, None, CIFAR)
        assert membrane.unique().tolist() == [1.0]
        assert spikes.sum() == 0


def test_one_tensor_as_shortcut_and_input(device: str) -> None:
    y, weight, bias, *_ = leaves_of_sum(DEFAULT, "plain", device)

    def doubled(function: Callable, statistics: Callable) -> fused.Operation:
        return lambda y, weight, bias: function(y, statistics(y, weight, bias), y, None, CIFAR)

    kernels = doubled(residual_lif.residual_lif, fused.kernel_statistics)
    reference = fused.seeing_stored(doubled(residual_lif.reference, fused.reference_statistics), y.dtype)
    leaves = y, weight, bias
    fused.assert_gradients_equal(kernels, reference, leaves, fused.incoming_gradients(*kernels(*leaves)))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_gradients_do_not_share_memory(shortcut: str, device: str) -> None:
    # A plain shortcut's gradient is that of the sum: it must not be the gradient of y.
    kernels = block_end(residual_lif.residual_lif, fused.kernel_statistics, CIFAR)
    fused.assert_gradients_do_not_share_memory(kernels, leaves_of_sum(DEFAULT, shortcut, device))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_keeps_only_what_the_backward_pass_reads(shortcut: str, device: str) -> None:
    y, weight, bias, added, *of_shortcut = (leaf.requires_grad_() for leaf in leaves_of_sum(DEFAULT, shortcut, device))
    normalization = fused.kernel_statistics(y, weight, bias)
    shortcut_normalization = fused.kernel_statistics(added, *of_shortcut) if of_shortcut else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        membrane, _ = residual_lif.residual_lif(y, normalization, added, shortcut_normalization, CIFAR)
    sequences = [tensor.data_ptr() for tensor in kept if tensor.ndim == 5]
    wanted = [membrane, y, added] if of_shortcut else [membrane, y]
    assert sequences == [tensor.data_ptr() for tensor in wanted]


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_opcheck(shortcut: str, device: str, half: str) -> None:
    case = replace(DEFAULT, dtype_name=half)
    y, weight, bias, added, *of_shortcut = leaves_of_sum(case, shortcut, device, "contiguous")
    tensors = fused.kernel_statistics(y, weight, bias).tensors
    shortcut_tensors = fused.kernel_statistics(added, *of_shortcut).tensors if of_shortcut else (None,) * 4
    constants = CIFAR.flatten()
    leaves = [tensor.clone().requires_grad_() for tensor in (y, weight, bias, added)]
    for with_spikes in (True, False):
        torch.library.opcheck(
            torch.ops.gac.residual_lif.default,
            (*leaves[:3], *tensors[2:], leaves[3], *shortcut_tensors, True, False, with_spikes, *constants),
        )
    grad_membrane, grad_spikes = fused.incoming_gradients(y, y)
    weight, _, *statistics = tensors
    shortcut_weight, _, *shortcut_statistics = shortcut_tensors
    kept = added if of_shortcut else None
    for incoming in [(grad_membrane, grad_spikes), (None, grad_spikes), (grad_membrane, None)]:
        torch.library.opcheck(
            torch.ops.gac.residual_lif_backward_sums.default,
            (*incoming, added, y, *statistics, kept, *shortcut_statistics, *constants),
        )
    sums = torch.ones(3 if of_shortcut else 2, case.frame[1], device=device)
    torch.library.opcheck(
        torch.ops.gac.residual_lif_backward_inputs.default,
        (grad_spikes, y, weight, *statistics, kept, shortcut_weight, *shortcut_statistics, sums, 0.125),
    )


def test_second_derivative_is_refused(device: str) -> None:
    kernels = block_end(residual_lif.residual_lif, fused.kernel_statistics, CIFAR)
    fused.assert_no_second_derivative(kernels, leaves_of_sum(DEFAULT, "normalized", device))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_casts_nothing(dtype: str, device: str) -> None:
    kernels = block_end(residual_lif.residual_lif, fused.kernel_statistics, CIFAR)
    fused.assert_autocast_casts_nothing(kernels, leaves_of_sum(DEFAULT, "normalized", device), device, DTYPES[dtype])


# --- Bad input

GOOD = torch.ones(4, 2, 8, 1, 1)


@pytest.mark.parametrize(
    ("y", "shortcut", "message"),
    [
        (GOOD[:0], GOOD, r"input of the residual sum must be .* got shape \[0, 2, 8, 1, 1\]"),
        (GOOD[0], GOOD, r"input of the residual sum must be .* got shape \[2, 8, 1, 1\]"),
        (GOOD, GOOD[0], r"shortcut must be a non-empty .* got shape \[2, 8, 1, 1\]"),
        (GOOD, GOOD[:, :1], r"shortcut must be \[4, 2, 8, 1, 1\], .* like the other input, got \[4, 1, 8, 1, 1\]"),
        (GOOD, GOOD.half(), r"shortcut must be .* torch.float32, on cpu .* got .* torch.float16, on cpu"),
        (GOOD.new_ones(17, 1, 8, 1, 1), GOOD.new_ones(17, 1, 8, 1, 1), "take up to 16 time steps, got 17"),
        (GOOD.double(), GOOD.double(), r"got torch\.float64; use backend='torch'"),
    ],
    ids=["empty", "rank", "shortcut-rank", "shortcut-shape", "shortcut-dtype", "T", "float64"],
)
def test_bad_input(y: Tensor, shortcut: Tensor, message: str) -> None:
    normalization = fused.fixed_statistics(y, torch.ones(8), torch.ones(8))
    with pytest.raises(InputError, match=message) as error:
        residual_lif.residual_lif(y, normalization, shortcut, None, CIFAR)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [{"from_batch": True}, {"synchronized": True}], ids=lambda other: next(iter(other)))
def test_two_kinds_of_statistics_are_refused(other: dict) -> None:
    normalization = fused.fixed_statistics(GOOD, torch.ones(8), torch.ones(8))
    with pytest.raises(InputError, match="both be in training or both in evaluation mode") as error:
        residual_lif.residual_lif(GOOD, normalization, GOOD, replace(normalization, **other), CIFAR)
    assert "\n" not in str(error.value)


def test_float64_is_refused_without_a_neuron() -> None:
    normalization = fused.fixed_statistics(GOOD, torch.ones(8), torch.ones(8))
    with pytest.raises(InputError, match=r"got torch\.float64; use backend='torch'"):
        residual_lif.residual_lif(GOOD.double(), normalization, GOOD.double(), None, NO_NEURON)


def test_unsupported_surrogate() -> None:
    normalization = fused.fixed_statistics(GOOD, torch.ones(8), torch.ones(8))
    with pytest.raises(InputError, match="not Erf; use another surrogate or backend='torch'"):
        residual_lif.residual_lif(GOOD, normalization, GOOD, None, replace(CIFAR, surrogate=surrogate.Erf()))
