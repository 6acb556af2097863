"""Gate and both of its LIF layers in one pass: the kernels against the reference (see tests/ops/fused.py)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from gac.errors import InputError
from gac.ops import gate_lif, lif
from gac.ops.neuron import LIFParameters
from ops import fused
from ops.fused import CIFAR, DEFAULT, DTYPES, IMAGENET, Case

# A gate is below 1, the first threshold of the CIFAR neuron: it cannot fire at T = 1.
CASES = [
    Case(1, "fp32", "imagenet", (3, 8, 3, 4)),
    Case(2, "bf16", "soft", (2, 8, 3, 5)),
    Case(4, "fp16", "imagenet", (2, 16, 4, 3)),
    Case(4, "fp32", "nonzero", (2, 7, 3, 5)),  # an image is no whole number of vectors
    Case(6, "bf16", "cifar", (2, 7, 3, 3)),
    Case(6, "fp16", "cifar", (1, 24, 5, 5)),
    Case(6, "fp32", "cifar", (1, 64, 5, 7)),  # several blocks for an image, the last with idle threads
    Case(6, "fp32", "cifar", (5, 8, 1, 1)),  # more images than blocks at once
    Case(8, "fp16", "cifar", (2, 8, 3, 3)),
    Case(16, "fp32", "soft", (1, 1, 4, 4)),
]


def gate(function: Callable, neuron: LIFParameters) -> fused.Operation:
    """Return ``function`` (gate_lif or its reference) as one of x, temporal and spatial attention."""
    return lambda x, temporal, spatial: function(x, temporal, spatial, neuron)


def leaves_of(case: Case, device: str, layout: str = "channels_last") -> tuple[Tensor, Tensor, Tensor]:
    x, spatial = (
        fused.laid_out(fused.normal(case.shape, seed, 1.0, 2.0).to(device, case.dtype), layout)[0] for seed in (0, 1)
    )
    return x, fused.normal(case.shape[:2], 2, 1.0).to(device), spatial


def gate_error(dtype: torch.dtype, scores: Tensor) -> Tensor:
    """Return the relative error that a gate may have before it is rounded to ``dtype``, as the kernels compute it.

    In units in the last place of float32: of the score half of one, which changes the exponential by |score| times as
    much; of the sum half of one; of the exponential and the division what NVIDIA states. In float32 expf 2 and half of
    one (CUDA C++ Programming Guide, mathematical functions); else, by PTX's manual, ex2.approx 2 and rcp.approx 1, and
    log2(e) and its product with the score are rounded, each to half of one.
    """
    score = scores.abs()
    exponential, division = (2, 0.5) if dtype == torch.float32 else (2 + score, 1)
    return torch.finfo(torch.float32).eps * (0.5 * score + exponential + 0.5 + division)


def exact_gates(leaves: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return float64 gates [T, B, C, H, W] and what the kernels' ones may be away from them."""
    x, temporal, spatial = leaves
    scores = temporal.double()[:, :, None, None, None] * spatial.double()
    gates = scores.sigmoid()
    return gates, gates * gate_error(x.dtype, scores)


def errors_of_gradients(
    leaves: tuple[Tensor, ...], neuron: LIFParameters, gradients: list[Tensor | None]
) -> tuple[float, Tensor, Tensor]:
    """Return what the errors of gates g add up to in the gradients of x, temporal and spatial attention.

    The gradient of a score has g (1 - g), whose error is at most that of g. As much again is for the neuron behind the
    gate, whose surrogate gradient sees the error. Those of x are far below what rounding is allowed.
    """
    _, temporal, spatial = (leaf.double() for leaf in leaves)
    outputs = gate_lif.reference(*(leaf.double().requires_grad_() for leaf in leaves), neuron)
    given = [(output, grad.double()) for output, grad in zip(outputs, gradients, strict=True) if grad is not None]
    (grad,) = torch.autograd.grad([output for output, _ in given], outputs[:1], [grad for _, grad in given])
    error = 2 * grad.abs() * (outputs[0] != 0) * exact_gates(leaves)[1]
    of_temporal = (error * spatial.abs()).sum((2, 3, 4))
    return 0.0, of_temporal, (error * temporal.abs()[:, :, None, None, None]).sum(0)


def assert_kernels_equal_reference(
    leaves: tuple[Tensor, ...], neuron: LIFParameters, without: int | None = None
) -> None:
    """``without``: the output that gets no gradient."""
    x = leaves[0]
    kernels = gate(gate_lif.gate_lif, neuron)
    membrane, spikes = kernels(*leaves)
    expected, _ = gate_lif.reference(*leaves, neuron)
    for output in (membrane, spikes):
        assert output.dtype == x.dtype
        assert fused.is_channels_last(output)
    # The encoder's spikes are exact; a gate is within its error, and rounded.
    assert torch.equal(membrane == 0, expected == 0)
    gates, errors = exact_gates(leaves)
    dtype = torch.finfo(x.dtype)
    rounding = dtype.eps / 2 * (gates + errors) + dtype.tiny * dtype.eps / 2
    assert ((membrane.double() - gates).abs() <= errors + rounding)[membrane != 0].all()
    fused.assert_has_spikes_and_silence(spikes)
    assert torch.equal(spikes, lif.reference(membrane, neuron.v_start, neuron)[0])
    gradients = fused.incoming_gradients(membrane, spikes)
    if without is not None:
        gradients[without] = None
    reference = fused.seeing_stored(gate(gate_lif.reference, neuron), x.dtype)
    allowed = errors_of_gradients(leaves, neuron, gradients)
    fused.assert_gradients_equal(kernels, reference, leaves, gradients, allowed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_length_dtype_and_neuron(case: Case, device: str) -> None:
    assert_kernels_equal_reference(leaves_of(case, device), case.neuron)


@pytest.mark.parametrize("without", [0, 1], ids=["only-spikes", "only-membrane"])
def test_gradient_of_one_output(without: int, device: str) -> None:
    assert_kernels_equal_reference(leaves_of(DEFAULT, device), CIFAR, without)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_every_memory_layout(layout: str, device: str) -> None:
    x, temporal, spatial = leaves_of(DEFAULT, device, layout)
    batch_first = temporal.T.contiguous().T
    assert not batch_first.is_contiguous()
    assert_kernels_equal_reference((x, batch_first, spatial), CIFAR)


def test_unaligned_memory(device: str) -> None:
    x, temporal, spatial = leaves_of(DEFAULT, device)
    memory = torch.cat([x.new_zeros(1), x.movedim(1, -1).flatten()])[1:]
    unaligned = memory.view(x.movedim(1, -1).shape).movedim(-1, 1)
    assert unaligned.data_ptr() % 16 != 0
    assert_kernels_equal_reference((unaligned, temporal, spatial), CIFAR)


def test_temporal_attention_in_half_precision(device: str) -> None:
    x, temporal, spatial = leaves_of(DEFAULT, device)
    gradients = fused.incoming_gradients(*gate_lif.gate_lif(x, temporal, spatial, CIFAR))
    kernels, half = gate(gate_lif.gate_lif, CIFAR), temporal.half()
    outputs, found = fused.run(kernels, (x, half, spatial), gradients)
    expected_outputs, expected = fused.run(kernels, (x, half.float(), spatial), gradients)
    torch.testing.assert_close(outputs, expected_outputs, rtol=0, atol=0)
    assert torch.equal(found[1], expected[1].half())


@pytest.mark.parametrize("neuron", [CIFAR, IMAGENET], ids=["cifar", "imagenet"])
def test_ties_at_thresholds(neuron: LIFParameters, device: str) -> None:
    # The encoder's input meets its threshold; a score of 0 makes the gate 1/2, which meets that of ImageNet.
    shape = (2, 8, 3, 4)
    x, spatial = (fused.dyadic(shape, device, torch.float32, seed) for seed in (0, 1))
    temporal = torch.tensor([[0.0, 1.0]] * 6, device=device)
    assert_kernels_equal_reference((x, temporal, spatial), neuron)
    for output in (0, 1) if neuron is IMAGENET else (0,):
        fused.assert_ties(
            lambda neuron, output=output: gate_lif.gate_lif(x, temporal, spatial, neuron)[output] != 0,
            neuron,
        )


def test_gate_at_the_ends_of_its_range(device: str) -> None:
    shape = (1, 8, 1, 1)
    x, spatial = torch.full(shape, 2.0, device=device), torch.ones(shape, device=device)
    temporal = torch.tensor([[0.0], [200.0], [-200.0]], device=device)
    leaves = x, temporal, spatial
    grad_membrane = torch.ones(3, *shape, device=device)
    (membrane, _), gradients = fused.run(gate(gate_lif.gate_lif, CIFAR), leaves, [grad_membrane, None])
    assert membrane[:, 0, 0, 0, 0].tolist() == [0.5, 1.0, 0.0]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_keeps_nothing_but_its_inputs(device: str) -> None:
    leaves = [leaf.requires_grad_() for leaf in leaves_of(DEFAULT, device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gate_lif.gate_lif(*leaves, CIFAR)
    assert [tensor.data_ptr() for tensor in kept] == [leaf.data_ptr() for leaf in leaves]


def test_gradients_do_not_share_memory(device: str) -> None:
    fused.assert_gradients_do_not_share_memory(gate(gate_lif.gate_lif, CIFAR), leaves_of(DEFAULT, device))


def test_opcheck(device: str, half: str) -> None:
    case = replace(DEFAULT, dtype_name=half)
    leaves = leaves_of(case, device, "contiguous")
    constants = CIFAR.flatten()
    with_gradient = [leaf.clone().requires_grad_() for leaf in leaves]
    torch.library.opcheck(torch.ops.gac.gate_lif.default, (*with_gradient, *constants))
    grad_membrane, grad_spikes = fused.incoming_gradients(*gate_lif.gate_lif(*leaves, CIFAR))
    for incoming in [(grad_membrane, grad_spikes), (None, grad_spikes), (grad_membrane, None)]:
        torch.library.opcheck(torch.ops.gac.gate_lif_backward.default, (*incoming, *leaves, *constants))


def test_second_derivative_is_refused(device: str) -> None:
    fused.assert_no_second_derivative(gate(gate_lif.gate_lif, CIFAR), leaves_of(DEFAULT, device))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_casts_nothing(dtype: str, device: str) -> None:
    fused.assert_autocast_casts_nothing(
        gate(gate_lif.gate_lif, CIFAR), leaves_of(DEFAULT, device), device, DTYPES[dtype]
    )


# --- Bad input

FRAME, SCORES = torch.ones(2, 8, 3, 3), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("x", "temporal", "spatial", "message"),
    [
        (FRAME, SCORES[:0], FRAME, r"input of the gate must be a non-empty .* got shape \[0, 2, 8, 3, 3\]"),
        (FRAME[:0], SCORES[:, :0], FRAME[:0], r"must be a non-empty .* got shape \[4, 0, 8, 3, 3\]"),
        (FRAME[0], SCORES, FRAME[0], r"images \[B, C, H, W\] and .* got \[8, 3, 3\] on cpu"),
        (FRAME, torch.ones(17, 2), FRAME, "take up to 16 time steps, got 17"),
        (FRAME, SCORES[:, :1], FRAME, r"temporal attention \[T, B\] .* on cpu and \[4, 1\] on cpu"),
        (FRAME, SCORES[..., None], FRAME, r"temporal attention \[T, B\] .* on cpu and \[4, 2, 1\] on cpu"),
        (FRAME, SCORES, FRAME[:1], r"spatial-channel attention must be \[2, 8, 3, 3\], .* got \[1, 8, 3, 3\]"),
        (FRAME, SCORES, FRAME.half(), r"must be .* torch.float32, on cpu like the image, got .* torch.float16"),
        (FRAME.double(), SCORES, FRAME.double(), r"got torch\.float64; use backend='torch'"),
    ],
    ids=["no-time", "no-image", "rank", "T", "temporal-B", "temporal-rank", "spatial", "spatial-dtype", "float64"],
)
def test_bad_input(x: Tensor, temporal: Tensor, spatial: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        gate_lif.gate_lif(x, temporal, spatial, CIFAR)
    assert "\n" not in str(error.value)


def test_temporal_attention_without_a_time_dimension() -> None:
    with pytest.raises(InputError, match=r"temporal attention \[T, B\] .* and \[\] on cpu"):
        gate_lif.gate_lif(FRAME, torch.tensor(1.0), FRAME, CIFAR)


def test_unsupported_surrogate() -> None:
    with pytest.raises(InputError, match="not Erf; use another surrogate or backend='torch'"):
        gate_lif.gate_lif(FRAME, SCORES, FRAME, replace(CIFAR, surrogate=surrogate.Erf()))
