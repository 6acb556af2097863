"""The LIF operator: reference against the recorded original, CUDA kernels against the reference.

The kernels run on the GPU where there is one, and in any case on the CPU (tests/cuda_on_cpu), where freshly
allocated memory is NaN: a cell that a kernel leaves unwritten fails the comparison.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from cuda_on_cpu.launcher import ORDERS, KernelsOnCpu, run_under_sanitizers
from gac.errors import InputError
from gac.ops import backend, lif, operators
from gac.ops.cuda import compiler, launch
from gac.ops.cuda.compiler import Kernel
from gac.ops.neuron import LIFParameters
from ops.read_only_loads import read_only_loads_of_outputs

GOLDENS = Path(__file__).parents[1] / "goldens" / "lif_cases.npz"

CIFAR = LIFParameters(2.0, False, 1.0, 0.0, False, surrogate.PiecewiseQuadratic(alpha=1.0))
IMAGENET = LIFParameters(4 / 3, False, 0.5, 0.0, True, surrogate.Rect(alpha=1.0))
PRESETS = {"cifar": CIFAR, "imagenet": IMAGENET}

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative to the largest gradient: rounding of the order of operations (fp32) or of the stored result.
GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make_input(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str, seed: int = 0) -> Tensor:
    """Half multiples of 1/8, which meet thresholds and window ends exactly, and half ordinary numbers."""
    generator = torch.Generator().manual_seed(seed)
    dyadic = torch.randint(-8, 17, shape, generator=generator) / 8
    ordinary = torch.randn(shape, generator=generator) + 0.3
    x = torch.where(torch.rand(shape, generator=generator) < 0.5, dyadic, ordinary).to(device, dtype)
    if layout == "channels_last":
        return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


def run(function, x: Tensor, v: Tensor | float, neuron: LIFParameters, with_grad_v: bool) -> list[Tensor]:
    """Return spikes, final potential and the gradients of x and, if it is a tensor, of v."""
    inputs = [t.detach().requires_grad_() for t in (x, v) if isinstance(t, Tensor)]
    spikes, v_final = function(inputs[0], inputs[1] if isinstance(v, Tensor) else v, neuron)
    generator = torch.Generator().manual_seed(1)
    # Gradients arrive in the contiguous layout, whatever that of x is.
    grad_spikes = torch.randn(spikes.shape, generator=generator).to(spikes)
    grad_v = torch.randn(v_final.shape, generator=generator).to(v_final)
    outputs = (spikes, v_final) if with_grad_v else (spikes,)
    gradients = torch.autograd.grad(outputs, inputs, (grad_spikes, grad_v)[: len(outputs)])
    return [spikes, v_final, *gradients]


def assert_kernels_equal_reference(
    x: Tensor, v: Tensor | float, neuron: LIFParameters, with_grad_v: bool = True
) -> None:
    expected = run(lif.reference, x, v, neuron, with_grad_v)
    got = run(lif.lif, x, v, neuron, with_grad_v)
    assert 0.02 < expected[0].float().mean() < 0.98, "the case should have spikes and silence"
    torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=0)
    tolerance = GRADIENT_TOLERANCE[x.dtype]
    for gradient, reference_gradient in zip(got[2:], expected[2:], strict=True):
        scale = reference_gradient.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(gradient, reference_gradient, rtol=tolerance, atol=tolerance * scale)


# --- The specification


def golden(family: str, case: str) -> dict[str, Tensor]:
    arrays = np.load(GOLDENS)
    return {
        name: torch.from_numpy(arrays[f"{family}.{case}.{name}"]) for name in ("x", "spikes", "grad_out", "grad_in")
    }


def assert_golden(function, family: str, case: str, device: str) -> None:
    recorded = golden(family, case)
    x = recorded["x"].to(device).requires_grad_()
    spikes, _ = function(x, 0.0, PRESETS[family])
    (grad_in,) = torch.autograd.grad(spikes, x, recorded["grad_out"].to(device))
    assert torch.equal(spikes.cpu().to(torch.uint8), recorded["spikes"])
    torch.testing.assert_close(grad_in.cpu(), recorded["grad_in"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["T6", "T1", "T2", "grid", "edge"])
@pytest.mark.parametrize("family", PRESETS)
class TestGoldens:
    def test_reference_is_the_original(self, family: str, case: str) -> None:
        assert_golden(lif.reference, family, case, "cpu")

    def test_kernels_are_the_original(self, family: str, case: str, device: str) -> None:
        assert_golden(lif.lif, family, case, device)


@pytest.mark.parametrize("decay_input", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
def test_reference_is_spikingjelly_except_for_ties(decay_input: bool, v_reset: float | None) -> None:
    from spikingjelly.activation_based import neuron

    node = neuron.LIFNode(3.0, decay_input, 1.0, v_reset, surrogate.ATan(), step_mode="m")
    x = torch.randn(5, 2, 50, dtype=torch.float64) * 2 + 0.5
    theirs = x.clone().requires_grad_()
    ours = x.clone().requires_grad_()
    parameters = LIFParameters(3.0, decay_input, 1.0, v_reset, False, surrogate.ATan())
    expected = node(theirs)
    spikes, v = lif.reference(ours, v_reset or 0.0, parameters)
    assert torch.equal(spikes, expected)
    torch.testing.assert_close(v, node.v)
    weights = torch.randn_like(x)
    (expected * weights).sum().backward()
    (spikes * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_spike_at_the_threshold_but_its_gradient(device: str) -> None:
    above = np.nextafter(np.float32(1), np.float32(2))
    x = torch.tensor([[1.0, above]], device=device)
    for function in (lif.reference, lif.lif):
        leaf = x.clone().requires_grad_()
        spikes, _ = function(leaf, 0.0, CIFAR)
        assert spikes.tolist() == [[0.0, 1.0]]
        (gradient,) = torch.autograd.grad(spikes.sum(), leaf)
        assert gradient[0, 0] == 1.0  # the triangle's peak


def test_state_dtype_of_the_reference() -> None:
    for dtype, state in [(torch.float16, torch.float32), (torch.float64, torch.float64)]:
        spikes, v = lif.reference(torch.ones(2, 3, dtype=dtype), 0.0, CIFAR)
        assert (spikes.dtype, v.dtype) == (dtype, state)


# --- The kernels against the reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 4, 6, 8, 16, 17, 33])
def test_every_length_dtype_and_layout(T: int, dtype: str, device: str) -> None:
    for layout in ("contiguous", "channels_last", "transposed"):
        x = make_input((T, 2, 8, 4, 6), DTYPES[dtype], layout, device)
        assert_kernels_equal_reference(x, 0.0, CIFAR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 6, 17])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_odd_sizes_take_narrower_vectors(T: int, dtype: str, layout: str, device: str) -> None:
    for shape in [(T, 1, 3, 5, 7), (T, 3, 1, 7, 11), (T, 1, 3, 2, 5), (T, 1, 3, 2, 2)]:
        x = make_input(shape, DTYPES[dtype], layout, device)
        v = make_input(shape, torch.float32, layout, device, seed=2)[0]
        assert_kernels_equal_reference(x, v, CIFAR)


@pytest.mark.parametrize("kind", ["PiecewiseQuadratic", "Rect", "Sigmoid", "ATan"])
@pytest.mark.parametrize("detach_reset", [False, True], ids=["reset", "detached"])
@pytest.mark.parametrize("v_reset", [0.0, -0.25, None], ids=["zero", "nonzero", "soft"])
def test_every_neuron(v_reset: float | None, detach_reset: bool, kind: str, device: str) -> None:
    shape = (6, 2, 8, 4, 4)
    x = make_input(shape, torch.float32, "contiguous", device)
    v_init = make_input(shape, torch.float32, "contiguous", device, seed=2)[0]
    for tau, decay_input in [(2.0, False), (3.0, True)]:
        neuron = LIFParameters(tau, decay_input, 0.5, v_reset, detach_reset, getattr(surrogate, kind)(alpha=1.5))
        for v in (v_reset or 0.0, 0.375, v_init):
            for with_grad_v in (False, True):
                assert_kernels_equal_reference(x, v, neuron, with_grad_v)


def test_imagenet_preset(device: str, half: str) -> None:
    assert_kernels_equal_reference(make_input((4, 2, 8, 4, 4), DTYPES[half], "channels_last", device), 0.0, IMAGENET)


@pytest.mark.parametrize(
    "neuron",
    [
        LIFParameters(3.0, False, 1.0, None, False, surrogate.ATan()),
        LIFParameters(3.0, True, 0.3, 0.1, False, surrogate.ATan()),
    ],
    ids=["soft", "gain-and-bias"],
)
def test_long_sequence_with_a_state(neuron: LIFParameters, device: str) -> None:
    x = make_input((40, 2, 16), torch.float32, "contiguous", device)
    assert_kernels_equal_reference(x, make_input((40, 2, 16), torch.float32, "contiguous", device, 2)[0], neuron)


def test_spikes_are_bit_equal_where_products_round(device: str) -> None:
    # With tau = 3 a fused multiply-add would decide some of these differently.
    neuron = LIFParameters(3.0, True, 0.3, 0.1, False, surrogate.ATan())
    x = torch.randn(6, 200_000, generator=torch.Generator().manual_seed(0)).to(device)
    expected = lif.reference(x, 0.0, neuron)
    torch.testing.assert_close(lif.lif(x, 0.0, neuron), expected, rtol=0, atol=0)


def test_subnormal_potentials_count(device: str) -> None:
    neuron = LIFParameters(2.0, False, 0.0, None, False, surrogate.ATan())
    x = torch.tensor([[1e-40, -1e-40, 0.0]], device=device)
    assert lif.lif(x, 0.0, neuron)[0].tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_threads_does_not_matter(order: str, kernels_on_cpu: KernelsOnCpu) -> None:
    kernels_on_cpu.order = order
    x = make_input((6, 3, 8, 8, 8), torch.float32, "contiguous", "cpu")
    assert_kernels_equal_reference(x, 0.0, CIFAR)


def test_continuing_from_the_final_state_is_one_long_sequence(device: str) -> None:
    x = make_input((12, 2, 8, 4, 4), torch.float32, "contiguous", device).requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(device)
    whole, v_whole = lif.lif(x, 0.0, CIFAR)
    first, v = lif.lif(x[:6], 0.0, CIFAR)
    second, v = lif.lif(x[6:], v, CIFAR)
    parts = torch.cat([first, second])
    assert torch.equal(parts, whole)
    assert torch.equal(v, v_whole)
    (expected,) = torch.autograd.grad(whole, x, weights)
    (gradient,) = torch.autograd.grad(parts, x, weights)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


# --- Memory layout


def test_results_have_the_layout_of_the_input(device: str, half: str) -> None:
    for shape in [(4, 2, 8, 4, 6), (4, 1, 8, 4, 6), (1, 2, 8, 4, 6)]:
        for layout in ("contiguous", "channels_last"):
            x = make_input(shape, DTYPES[half], layout, device).requires_grad_()
            spikes, v = lif.lif(x, 0.0, CIFAR)
            (gradient,) = torch.autograd.grad(spikes.float().sum() + v.sum(), x)
            for t in range(shape[0]):
                for result in (spikes[t], v, gradient[t]):
                    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
                    assert result.is_contiguous(memory_format=wanted)
            assert spikes.stride(0) == spikes[0].numel()


def test_batch_first_channels_last_stays_channels_last(device: str) -> None:
    batch_first = make_input((2, 4, 8, 4, 6), torch.float32, "channels_last", device)
    x = batch_first.transpose(0, 1)
    spikes, _ = lif.lif(x, 0.0, CIFAR)
    assert spikes.stride() == (2 * 8 * 4 * 6, 8 * 4 * 6, 1, 6 * 8, 8)
    assert_kernels_equal_reference(x, 0.0, CIFAR)


def test_image_expanded_over_time(device: str) -> None:
    image = make_input((1, 2, 8, 4, 4), torch.float32, "contiguous", device)
    assert_kernels_equal_reference(image.expand(6, 2, 8, 4, 4), 0.0, CIFAR)
    per_channel = make_input((6, 1, 8, 1, 1), torch.float32, "contiguous", device)
    x = per_channel.expand(6, 2, 8, 4, 4)
    assert_kernels_equal_reference(x, 0.0, CIFAR)
    assert lif.lif(x, 0.0, CIFAR)[0][0].is_contiguous(memory_format=torch.channels_last)


def test_expanded_gradient(device: str) -> None:
    x = make_input((6, 2, 8, 4, 4), torch.float32, "channels_last", device)
    gradients = []
    for function in (lif.reference, lif.lif):
        leaf = x.clone().requires_grad_()
        function(leaf, 0.0, CIFAR)[0].sum().backward()  # the gradient of a sum has strides of 0
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


def test_unaligned_memory(device: str) -> None:
    memory = make_input((6 * 256 + 1,), torch.float32, "contiguous", device)
    assert_kernels_equal_reference(memory[1:].view(6, 256), 0.0, CIFAR)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (3, 2, 2, 2, 2, 2, 2)], ids=str)
def test_any_rank(shape: tuple[int, ...], device: str) -> None:
    assert_kernels_equal_reference(make_input(shape, torch.float32, "contiguous", device, seed=4) + 0.5, 0.0, CIFAR)


# --- Autograd, autocast, compilation


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("with_state", [False, True])
def test_opcheck(layout: str, with_state: bool, device: str, half: str) -> None:
    x = make_input((4, 2, 4, 4, 4), DTYPES[half], layout, device).requires_grad_()
    v_init = torch.rand(2, 4, 4, 4, device=device, requires_grad=True) if with_state else None
    neuron = CIFAR.flatten()
    torch.library.opcheck(torch.ops.gac.lif_forward.default, (x, v_init, 0.0, *neuron))
    grad_spikes = torch.randn(x.shape).to(device, DTYPES[half])
    inputs = x.detach(), None if v_init is None else v_init.detach(), 0.0
    for wanted in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(torch.ops.gac.lif_backward.default, (grad_spikes, None, *inputs, *wanted, *neuron))


@pytest.mark.parametrize("compile_backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_without_graph_breaks(compile_backend: str, device: str) -> None:
    def network(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert backend.choose_backend("auto", x) in ("cupy", "c", "torch")
        spikes, v = lif.lif(2 * x, v, CIFAR)
        return spikes * 3, v

    compiled = torch.compile(network, fullgraph=True, backend=compile_backend)
    results = []
    for function in (network, compiled):
        x = make_input((6, 2, 8, 4, 4), torch.float32, "channels_last", device).requires_grad_()
        v = torch.full((2, 8, 4, 4), 0.25, device=device, requires_grad=True)
        spikes, v_final = function(x, v)
        results.append((spikes, v_final, *torch.autograd.grad(spikes.sum() + v_final.sum(), (x, v))))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert results[1][0].stride() == results[0][0].stride()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_casts_nothing(dtype: str, device: str) -> None:
    for function in (lif.reference, lif.lif):
        for x_dtype in (torch.float32, DTYPES[dtype]):
            x = make_input((4, 2, 8), x_dtype, "contiguous", device)
            expected = function(x, 0.0, CIFAR)
            with torch.autocast(device, DTYPES[dtype]):
                spikes, v = function(x, 0.0, CIFAR)
            assert (spikes.dtype, v.dtype) == (x_dtype, torch.float32)
            assert torch.equal(spikes, expected[0])
            assert torch.equal(v, expected[1])


def test_saves_only_its_inputs(device: str) -> None:
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = make_input((4, 2, 8), torch.float32, "contiguous", device).requires_grad_()
    v = torch.zeros(2, 8, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lif.lif(x, 0.0, CIFAR)
        assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]
        saved.clear()
        lif.lif(x, v, CIFAR)
        assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr(), v.data_ptr()]


def test_gradients_that_nobody_needs(device: str) -> None:
    x = make_input((4, 2, 8), torch.float32, "contiguous", device)
    v = torch.full((2, 8), 0.25, device=device)
    expected = run(lif.lif, x, v, CIFAR, True)[2:]
    for needs_x, needs_v in [(True, False), (False, True)]:
        x_leaf, v_leaf = x.clone().requires_grad_(needs_x), v.clone().requires_grad_(needs_v)
        spikes, v_final = lif.lif(x_leaf, v_leaf, CIFAR)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator).to(t) for t in (spikes, v_final)]
        torch.autograd.backward((spikes, v_final), grads)
        assert (x_leaf.grad is None, v_leaf.grad is None) == (not needs_x, not needs_v)
        torch.testing.assert_close(x_leaf.grad if needs_x else v_leaf.grad, expected[0 if needs_x else 1])
        # They take no memory either.
        gradients = operators.call("gac::lif_backward", spikes.detach(), None, x, v, 0.0, needs_x, needs_v, CIFAR)
        assert [gradient.numel() for gradient in gradients] == [x.numel() * needs_x, v.numel() * needs_v]


def test_gradient_from_the_final_state_alone(device: str) -> None:
    gradients = []
    for function in (lif.reference, lif.lif):
        x = make_input((4, 2, 8), torch.float32, "contiguous", device).requires_grad_()
        _, v = function(x, 0.0, CIFAR)
        gradients += torch.autograd.grad(v.square().sum(), x)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


def test_second_derivative_is_refused(device: str) -> None:
    x = make_input((4, 2, 8), torch.float32, "contiguous", device).requires_grad_()
    (gradient,) = torch.autograd.grad(lif.lif(x, 0.0, CIFAR)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="none of second order"):
        gradient.sum().backward()


def test_kernel_without_a_final_state(device: str) -> None:
    x = make_input((4, 16), torch.float32, "contiguous", device)
    expected, _ = lif.reference(x, 0.0, CIFAR)
    spikes = torch.full_like(x, torch.nan)
    kernel = lif.forward_kernel(torch.float32, 4, 4, "Reset::hard, true")
    launch.launch(kernel, (1,), (128,), (x, None, 0.0, CIFAR.struct, spikes, None, 16, 4))
    assert torch.equal(spikes, expected)


# --- Bad input


@pytest.mark.parametrize("function", [lif.reference, lif.lif], ids=["reference", "kernels"])
@pytest.mark.parametrize(
    ("x", "v", "message"),
    [
        (torch.ones(()), 0.0, r"non-empty \[T, B, ...\], got shape \[\]"),
        (torch.ones(0, 2, 3), 0.0, r"got shape \[0, 2, 3\]"),
        (torch.ones(4, 0, 3), 0.0, r"got shape \[4, 0, 3\]"),
        (torch.ones(4, 2, dtype=torch.int32), 0.0, "floating point, got torch.int32"),
        (torch.ones(4, 2), torch.zeros(3), r"must be \[2\], torch.float32, on cpu for this input, got \[3\]"),
        (torch.ones(4, 2).half(), torch.zeros(2).half(), r"got \[2\], torch.float16"),
    ],
)
def test_bad_input(function, x: Tensor, v: Tensor | float, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        function(x, v, CIFAR)
    assert "\n" not in str(error.value)


def test_float64_is_refused_by_the_kernels() -> None:
    with pytest.raises(InputError, match=r"got torch\.float64; use backend='torch'"):
        lif.lif(torch.ones(4, 2, dtype=torch.float64), 0.0, CIFAR)


def test_unsupported_surrogate() -> None:
    with pytest.raises(InputError, match="not Erf; use another surrogate or backend='torch'"):
        lif.lif(torch.ones(4, 2), 0.0, replace(CIFAR, surrogate=surrogate.Erf()))


# --- Compilation for GPUs, and sanitizers


ONE_LOAD_FROM_EITHER = (
    """if (kWholeSequence || chunk == 0)
            load_floats(v_init, v_start, neuron, v);
        else
            load_floats(v_boundary + (chunk - 1) * frame_size, v_start, neuron, v);""",
    "load_floats(chunk == 0 ? v_init : v_boundary + (chunk - 1) * frame_size, v_start, neuron, v);",
)


def kernels_to_compile(capability: int) -> list[Kernel]:
    """Return both directions at T = 6 and longer, and for one capability at other T, one by one, and all options."""
    variants = [(torch.float16, 6, 8), (torch.float32, 17, 2)]
    if capability == 90:
        variants += [
            (dtype, T, lif.vector_width(dtype, T)) for dtype in (torch.float32, torch.float16) for T in (8, 16)
        ]
        variants += [(torch.float16, 17, 4), (torch.float16, 1, 8), (torch.bfloat16, 6, 8), (torch.float32, 17, 1)]
    kernels = []
    for dtype, T, width in variants:
        kernels.append(lif.forward_kernel(dtype, T, width, "Reset::hard, true"))
        kernels.append(lif.backward_kernel(dtype, T, width, "Reset::hard, true, false, PiecewiseQuadratic"))
    if capability == 90:
        kernels.append(lif.forward_kernel(torch.float32, 6, 4, "Reset::soft, true"))
        for kind in ("PiecewiseQuadratic", "Rect", "Sigmoid", "ATan"):
            for neuron in ("Reset::hard, true, true", "Reset::soft, false, false"):
                kernels.append(lif.backward_kernel(torch.float32, 6, 4, f"{neuron}, {kind}"))
    return kernels


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_kernels_compile_for_gpus_without_spills(capability: int) -> None:
    nvrtc = pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC").cuda.nvrtc
    if capability not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not compile for compute capability {capability / 10}")
    for kernel in kernels_to_compile(capability):
        compiled = compiler.compile_kernel(kernel, capability, ["--ptxas-options=-v"])
        spills = re.findall(r"(\d+) bytes spill", compiled.log)
        registers = int(re.search(r"Used (\d+) registers", compiled.log)[1])
        assert len(spills) == 2
        assert spills == ["0", "0"], kernel.instance
        assert registers * 128 <= 65536


def test_vectors_travel_in_16_byte_accesses() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    kernel = lif.forward_kernel(torch.float16, 6, 8, "Reset::hard, true")
    # No GPU has capability 9.1: the compiler stops at PTX, which can be read.
    ptx = compiler.compile_kernel(kernel, 91).binary.decode()
    assert len(re.findall(r"ld\.global\.nc\.v4\.[bu]32", ptx)) == 6
    # Eight neurons' final potentials take two.
    assert ptx.count("st.global.v4.b32") == 6 + 2


def test_nothing_written_is_read_through_the_read_only_path() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    for kernel in kernels_to_compile(90):
        assert read_only_loads_of_outputs(kernel) == [], kernel.instance


def test_a_pointer_chosen_between_input_and_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    source = compiler.source_text
    monkeypatch.setattr(compiler, "source_text", lambda *names: source(*names).replace(*ONE_LOAD_FROM_EITHER))
    kernel = lif.backward_kernel(torch.float32, 17, 2, "Reset::hard, true, false, PiecewiseQuadratic")
    assert read_only_loads_of_outputs(kernel) != []


def test_kernels_under_sanitizers(compiled_kernels: KernelsOnCpu) -> None:
    chosen = "(unaligned and cpu) or (every_length and cpu-6-fp16) or (odd_sizes and cpu-contiguous-17-bf16)"
    assert "3 passed" in run_under_sanitizers(__file__, chosen)


# --- Only on a GPU


@pytest.mark.gpu
class TestDevice:
    def test_on_another_stream(self) -> None:
        stream = torch.cuda.Stream()
        x = torch.randn(6, 64, 128, 32, 32).pin_memory()
        with torch.cuda.stream(stream):
            # Not synchronised: right only if the kernel is queued behind the copy.
            spikes, _ = lif.lif(x.to("cuda", non_blocking=True), 0.0, CIFAR)
        stream.synchronize()
        assert torch.equal(spikes.cpu(), lif.reference(x, 0.0, CIFAR)[0])

    @pytest.mark.several_gpus
    def test_on_another_device(self) -> None:
        assert_kernels_equal_reference(make_input((6, 2, 8, 4, 4), torch.float16, "contiguous", "cuda:1"), 0.0, CIFAR)
        assert torch.cuda.current_device() == 0

    def test_graph_capture(self) -> None:
        x = make_input((6, 2, 8, 4, 4), torch.float16, "channels_last", "cuda").requires_grad_()
        weights = torch.randn_like(x)

        def forward_and_backward() -> tuple[Tensor, Tensor]:
            spikes, _ = lif.lif(x, 0.0, CIFAR)
            return spikes, *torch.autograd.grad(spikes, x, weights)

        side_stream = torch.cuda.Stream()
        with torch.cuda.stream(side_stream):
            forward_and_backward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward_and_backward()
        with torch.no_grad():
            x.copy_(make_input(x.shape, torch.float16, "channels_last", "cuda", seed=9))
        graph.replay()
        torch.testing.assert_close(captured, forward_and_backward(), rtol=0, atol=0)

    def test_repeats_bit_for_bit(self) -> None:
        x = make_input((6, 8, 64, 16, 16), torch.float16, "channels_last", "cuda")
        torch.testing.assert_close(run(lif.lif, x, 0.0, CIFAR, True), run(lif.lif, x, 0.0, CIFAR, True), rtol=0, atol=0)
