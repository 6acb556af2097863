"""Statistics of BatchNorm: the kernels against the reference and torch (two processes: test_fused_operators.py)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuda_on_cpu.launcher import ORDERS, KernelsOnCpu
from gac.errors import InputError
from gac.ops import batch_norm
from gac.ops.batch_norm import BatchNormTransform
from gac.ops.cuda import launch
from ops import fused
from ops.fused import DTYPES


def assert_moments_equal_reference(y: Tensor, mean_error: float = 1e-6, variance_error: float = 3e-6) -> None:
    """Compare with the reference in float64.

    Args:
        y: Activations.
        mean_error: Allowed error of the mean, relative to the sum of mean and standard deviation.
        variance_error: Allowed error of the variances, relative to themselves.
    """
    mean, variance, unbiased = batch_norm.batch_moments(y).double()
    exact_mean, exact_variance, exact_unbiased = batch_norm.reference_moments(y.double())
    assert ((mean - exact_mean).abs() / (exact_mean.abs() + exact_variance.sqrt())).max() <= mean_error
    torch.testing.assert_close(variance, exact_variance, rtol=variance_error, atol=0)
    torch.testing.assert_close(unbiased, exact_unbiased, rtol=variance_error, atol=0)


# --- The specification


def test_reference_is_torchs_batch_norm() -> None:
    y = fused.normal((3, 2, 8, 3, 4), 0, 1.0, 2.0).double()
    weight, bias = (parameter.double() for parameter in fused.parameters_of_norm(8, "cpu"))
    normalization = fused.reference_statistics(y, weight, bias)
    expected = F.batch_norm(y.flatten(0, 1), None, None, weight, bias, training=True, eps=fused.EPS)
    torch.testing.assert_close(batch_norm.reference(y, normalization), expected.unflatten(0, y.shape[:2]))


# --- The kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 8, 1, 2), (6, 2, 48, 5, 4), (16, 1, 8, 9, 9), (4, 2, 7, 3, 5), (2, 2, 1, 9, 7)],
    ids=str,
)
@pytest.mark.parametrize("layout", fused.LAYOUTS)
def test_moments(shape: tuple[int, ...], dtype: str, layout: str, device: str) -> None:
    y = fused.laid_out(fused.normal(shape, 0, 1.0, 2.0).to(device, DTYPES[dtype]), layout)
    assert_moments_equal_reference(y)


def test_moments_of_more_channels_than_a_block_has_lanes(device: str) -> None:
    assert_moments_equal_reference(fused.normal((1, 1, 2080, 2, 2), 0, 1.0, 2.0).to(device))


def test_moments_of_more_blocks_than_the_second_stage_has_threads(
    kernels_on_cpu: KernelsOnCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_BLOCKS_IN_TESTS", 70)
    assert_moments_equal_reference(fused.normal((6, 2, 48, 8, 8), 0, 1.0, 2.0))


def test_mean_that_is_large_against_the_deviations(device: str) -> None:
    y = fused.normal((6, 4, 8, 16, 16), 0, 1e4).to(device)
    assert_moments_equal_reference(y, variance_error=1e-4)
    naive = y.square().mean((0, 1, 3, 4)) - y.mean((0, 1, 3, 4)).square()
    exact = batch_norm.reference_moments(y.double())[1]
    assert ((naive - exact).abs() > 0.1 * exact).any(), "sums of squares should fail here"


def test_outlier_in_the_first_row(device: str) -> None:
    # The deviations that are added up in float32 are taken from it.
    y = fused.normal((6, 4, 8, 16, 16), 0).to(device)
    y[0, 0, :, 0, 0] = 1e4
    assert_moments_equal_reference(y, mean_error=1e-5, variance_error=1e-3)


def test_constant_channel(device: str) -> None:
    y = fused.normal((6, 4, 8, 5, 5), 0).to(device)
    y[:, :, 3] = 1000.1
    mean, variance, unbiased = batch_norm.batch_moments(y)
    assert mean[3] == y[0, 0, 3, 0, 0]
    assert 0 <= variance[3] <= unbiased[3] < 1e-8
    _, inverse_std = batch_norm.batch_statistics(y, fused.EPS)
    assert inverse_std[3].item() == pytest.approx(fused.EPS**-0.5, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, -1], ids=["first", "last"])
def test_what_is_not_finite_shows_in_all_moments(value: float, position: int, device: str) -> None:
    y = fused.normal((2, 2, 8, 3, 3), 0).to(device)
    y[position, position, 3, position, position] = value
    moments = batch_norm.batch_moments(y)
    assert not moments[:, 3].isfinite().any()
    assert moments[:, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_total_of_partials(device: str) -> None:
    # More blocks than the 32 that share a channel, more channels than the 32 side by side.
    partials = fused.normal((70, 3, 33), 0).to(device)
    second, third = (fused.normal([33], seed).to(device) for seed in (1, 2))
    expected = partials.double().sum(0) * torch.stack((torch.ones_like(second), second, third))
    totals = batch_norm.total_of_partials(partials, second, third)
    torch.testing.assert_close(totals.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch_norm.total_of_partials(partials[:, :2].contiguous(), second), totals[:2])


@pytest.mark.parametrize("C", [8, 200])
def test_statistics_are_torchs(C: int, device: str) -> None:
    module = nn.BatchNorm2d(C, momentum=0.3).to(device)
    running_mean, running_var = fused.normal([C], 1).to(device), fused.normal([C], 2).abs().to(device)
    module.running_mean.copy_(running_mean)
    module.running_var.copy_(running_var)
    batches = torch.zeros_like(module.num_batches_tracked)
    for seed in (3, 4):
        y = fused.normal((2, 2, C, 3, 4), seed, 1.0, 2.0).to(device)
        expected = module(y.flatten(0, 1)).unflatten(0, y.shape[:2])
        mean, inverse_std = batch_norm.batch_statistics(y, module.eps, 0.3, running_mean, running_var, batches)
        found = batch_norm.reference(y, BatchNormTransform(module.weight, module.bias, mean, inverse_std, True))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running_mean, module.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running_var, module.running_var, rtol=1e-6, atol=1e-6)
    assert batches == module.num_batches_tracked == 2


def test_statistics_are_those_of_the_moments(device: str) -> None:
    y = fused.normal((4, 2, 33, 5, 3), 0, 1.0, 2.0).to(device)
    found, expected = ([torch.zeros(33, device=device), torch.ones(33, device=device)] for _ in range(2))
    statistics = batch_norm.batch_statistics(y, 1e-5, 0.3, *found)
    specified = batch_norm.reference_statistics(batch_norm.batch_moments(y), 1e-5, 0.3, *expected)
    assert torch.equal(statistics[0], specified[0])
    torch.testing.assert_close([statistics[1], *found], [specified[1], *expected], rtol=3e-7, atol=1e-7)
    assert all(map(torch.equal, batch_norm.batch_statistics(y, 1e-5), statistics))


def test_statistics_of_moments_that_are_given(device: str) -> None:
    moments = torch.tensor([[1.0, -2.0], [3.0, 0.0], [4.0, 1.0]], device=device)
    before = moments.clone()
    running_mean, running_var = torch.zeros(2, device=device), torch.ones(2, device=device)
    mean, inverse_std = batch_norm.reference_statistics(moments, 1.0, 0.5, running_mean, running_var)
    assert mean.tolist() == [1.0, -2.0]
    assert inverse_std.tolist() == [0.5, 1.0]
    assert running_mean.tolist() == [0.5, -1.0]
    assert running_var.tolist() == [2.5, 1.0]
    assert torch.equal(batch_norm.reference_statistics(moments, 1.0)[1], inverse_std)
    assert torch.equal(moments, before)


def test_repeats_bit_for_bit_in_every_order(kernels_on_cpu: KernelsOnCpu) -> None:
    y = fused.normal((6, 2, 48, 5, 4), 0)
    results = []
    for order in (*ORDERS, ORDERS[0]):
        kernels_on_cpu.order = order
        results.append(batch_norm.batch_moments(y))
    assert all(torch.equal(result, results[0]) for result in results)


def test_opcheck(device: str) -> None:
    y = fused.normal((4, 2, 8, 3, 3), 0).to(device)
    torch.library.opcheck(torch.ops.gac.batch_moments.default, (y,))
    running = torch.zeros(8, device=device), torch.ones(8, device=device), torch.tensor(0, device=device)
    for statistics in (running, (None, None, None)):
        torch.library.opcheck(torch.ops.gac.batch_statistics.default, (y, *statistics, 1e-5, 0.1))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 0, 8, 3, 3), r"BatchNorm's input must be a non-empty \[T, B, C, H, W\], got shape \[4, 0, 8, 3, 3\]"),
        ((4, 8, 3, 3), r"BatchNorm's input must be a non-empty \[T, B, C, H, W\], got shape \[4, 8, 3, 3\]"),
        ((17, 1, 8, 1, 1), "take up to 16 time steps, got 17"),
    ],
    ids=["empty", "rank", "T"],
)
def test_bad_input(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        batch_norm.batch_moments(torch.ones(shape))
    assert "\n" not in str(error.value)


def test_float64_is_refused(device: str) -> None:
    with pytest.raises(InputError, match=r"got torch\.float64; use backend='torch'"):
        batch_norm.batch_moments(torch.ones(4, 2, 8, 3, 3, dtype=torch.float64, device=device))


@pytest.mark.parametrize("which", [0, 1], ids=["mean", "variance"])
@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(7), torch.zeros(8, 2)[:, 0], torch.zeros(8, dtype=torch.float64)],
    ids=["shape", "strides", "dtype"],
)
def test_running_statistics_that_do_not_fit_are_refused(wrong: Tensor, which: int) -> None:
    running = [torch.zeros(8), torch.zeros(8)]
    running[which] = wrong
    with pytest.raises(InputError, match=r"BatchNorm's running .* must be a contiguous float32 \[C=8\] on cpu"):
        batch_norm.batch_statistics(torch.ones(4, 2, 8, 3, 3), 1e-5, 0.1, *running)
