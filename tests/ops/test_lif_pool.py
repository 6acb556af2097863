"""The last LIF layer and its average: the kernels against the reference (see tests/ops/fused.py)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from gac.errors import InputError
from gac.ops import lif_pool
from gac.ops.neuron import LIFParameters
from ops import fused
from ops.fused import CIFAR, DEFAULT, DTYPES, FEWER_CASES, Case


def pool(function: Callable, neuron: LIFParameters) -> fused.Operation:
    """Return ``function`` (lif_pool or its reference) as one of x."""
    return lambda x: (function(x, neuron),)


def exact_rates(x: Tensor, neuron: LIFParameters) -> Tensor:
    """Return the reference's rates from float64, rounded to float32 and to the dtype of ``x``."""
    # torch's float32 mean multiplies by 1/n on a GPU, which need not be the nearest number.
    return lif_pool.reference(x.double(), neuron).float().to(x.dtype)


def assert_kernels_equal_reference(x: Tensor, neuron: LIFParameters) -> None:
    (rates,) = pool(lif_pool.lif_pool, neuron)(x)
    assert rates.dtype == x.dtype
    assert rates.shape == x.shape[:3]
    assert rates.is_contiguous()
    fused.assert_has_spikes_and_silence(rates)
    assert torch.equal(rates, exact_rates(x, neuron))

    def as_stored(x: Tensor) -> tuple[Tensor]:
        exact = lif_pool.reference(x, neuron)
        return (exact + (exact.float().to(rates.dtype) - exact).detach(),)

    fused.assert_gradients_equal(pool(lif_pool.lif_pool, neuron), as_stored, [x], fused.incoming_gradients(rates))


@pytest.mark.parametrize("case", FEWER_CASES, ids=str)
def test_every_length_dtype_and_neuron(case: Case, device: str) -> None:
    assert_kernels_equal_reference(fused.activations(case, device), case.neuron)


@pytest.mark.parametrize("kind", ["PiecewiseQuadratic", "Rect", "Sigmoid", "ATan"])
@pytest.mark.parametrize("detach_reset", [False, True], ids=["reset", "detached"])
@pytest.mark.parametrize("v_reset", [0.0, -0.25, None], ids=["zero", "nonzero", "soft"])
def test_every_neuron(v_reset: float | None, detach_reset: bool, kind: str, device: str) -> None:
    neuron = LIFParameters(3.0, True, 0.5, v_reset, detach_reset, getattr(surrogate, kind)(alpha=1.5))
    assert_kernels_equal_reference(fused.activations(DEFAULT, device), neuron)


@pytest.mark.parametrize("layout", fused.LAYOUTS)
def test_every_memory_layout(layout: str, device: str) -> None:
    assert_kernels_equal_reference(fused.activations(DEFAULT, device, layout=layout), CIFAR)


@pytest.mark.parametrize("neuron", ["cifar", "imagenet"])
def test_ties_at_thresholds_and_window_ends(neuron: str, device: str) -> None:
    case = replace(DEFAULT, neuron_name=neuron)
    x = fused.dyadic(case.shape, device, case.dtype)
    assert_kernels_equal_reference(x, case.neuron)
    fused.assert_ties(lambda neuron: lif_pool.lif_pool(x, neuron), case.neuron)


def test_gradient_of_a_sum(device: str) -> None:
    x = fused.activations(DEFAULT, device)
    ones = torch.ones(DEFAULT.shape[:3], device=device)
    _, expected = fused.run(pool(lif_pool.lif_pool, CIFAR), [x], [ones])
    _, found = fused.run(pool(lif_pool.lif_pool, CIFAR), [x], [ones[:1, :1, :1].expand(ones.shape)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_keeps_nothing_but_its_input(device: str) -> None:
    x = fused.activations(DEFAULT, device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lif_pool.lif_pool(x, CIFAR)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_opcheck(device: str, half: str) -> None:
    x = fused.activations(replace(DEFAULT, dtype_name=half), device, layout="contiguous")
    constants = CIFAR.flatten()
    torch.library.opcheck(torch.ops.gac.lif_pool.default, (x.clone().requires_grad_(), *constants))
    (grad,) = fused.incoming_gradients(lif_pool.lif_pool(x, CIFAR))
    torch.library.opcheck(torch.ops.gac.lif_pool_backward.default, (grad, x, *constants))


def test_second_derivative_is_refused(device: str) -> None:
    fused.assert_no_second_derivative(pool(lif_pool.lif_pool, CIFAR), [fused.activations(DEFAULT, device)])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_casts_nothing(dtype: str, device: str) -> None:
    fused.assert_autocast_casts_nothing(
        pool(lif_pool.lif_pool, CIFAR), [fused.activations(DEFAULT, device)], device, DTYPES[dtype]
    )


# --- Bad input


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((0, 2, 8, 3, 3), torch.float32, r"input of LIF and pooling must be .* got shape \[0, 2, 8, 3, 3\]"),
        ((4, 2, 8, 0, 3), torch.float32, r"must be a non-empty \[T, B, C, H, W\], got shape \[4, 2, 8, 0, 3\]"),
        ((4, 8, 3, 3), torch.float32, r"must be a non-empty \[T, B, C, H, W\], got shape \[4, 8, 3, 3\]"),
        ((17, 1, 8, 1, 1), torch.float32, "take up to 16 time steps, got 17; use backend='torch'"),
        ((4, 1, 8, 1, 1), torch.float64, r"got torch\.float64; use backend='torch'"),
    ],
    ids=["no-time", "no-pixel", "rank", "T", "float64"],
)
def test_bad_input(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        lif_pool.lif_pool(torch.ones(shape, dtype=dtype), CIFAR)
    assert "\n" not in str(error.value)


def test_unsupported_surrogate() -> None:
    with pytest.raises(InputError, match="not Erf; use another surrogate or backend='torch'"):
        lif_pool.lif_pool(torch.ones(4, 1, 8, 1, 1), replace(CIFAR, surrogate=surrogate.Erf()))
