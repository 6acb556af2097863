"""What holds for all fused operators together: chained, compiled, in several processes, on large tensors."""

import ctypes
import functools
import itertools
import mmap
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.sass import figures, recorded
from cuda_on_cpu.launcher import ORDERS, KernelsOnCpu, parameters, run_under_sanitizers
from gac.ops import batch_norm, c_kernels, gate_lif, norm_lif, residual_lif, residual_lif_pool
from gac.ops.catalogue import OPERATIONS, Layer
from gac.ops.cuda import compiler, launch
from gac.ops.cuda.compiler import Kernel
from gac.ops.neuron import LIFParameters
from ops import fused
from ops.fused import CIFAR, IMAGENET
from ops.fused_network import gradients_of_network, leaves_of_network, network, run_network
from ops.read_only_loads import read_only_loads_of_outputs


def test_compiles_without_graph_breaks(device: str) -> None:
    # Inductor fuses the multiplications and additions between the operators, which eager mode rounds one by one.
    backend, tolerance = ("aot_eager", 0.0) if device == "cpu" else ("inductor", 1e-3)
    leaves = leaves_of_network(device)
    torch._dynamo.reset()
    results = []
    for function in (network, torch.compile(network, fullgraph=True, backend=backend)):
        running = torch.zeros(8, device=device), torch.ones(8, device=device)
        results.append([*run_network(leaves, function, running=running), *running])
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    assert [result.stride() for result in results[1]] == [result.stride() for result in results[0]]


# Vectors of channels with idle threads in a block, and one channel a thread. Under sanitizers, where compiling takes
# long, few time steps.
SANITIZED = "GAC_TEST_SANITIZE" in os.environ
WIDTHS = {"few-steps": (2, 48, "fp16")} if SANITIZED else {"vectors": (6, 48, "fp32"), "scalars": (6, 7, "bf16")}
widths = pytest.mark.parametrize(("T", "C", "dtype"), WIDTHS.values(), ids=WIDTHS)


@widths
def test_all_results_are_written(T: int, C: int, dtype: str, kernels_on_cpu: KernelsOnCpu) -> None:
    results = run_network(leaves_of_network("cpu", T=T, C=C, dtype=fused.DTYPES[dtype]))
    fused.assert_has_spikes_and_silence(results[0])
    assert all(result.isfinite().all() for result in results)


@widths
def test_repeats_bit_for_bit_in_every_order(T: int, C: int, dtype: str, kernels_on_cpu: KernelsOnCpu) -> None:
    leaves = leaves_of_network("cpu", T=T, C=C, dtype=fused.DTYPES[dtype])
    results = []
    for order in (*ORDERS, "shuffled"):
        kernels_on_cpu.order = order
        results.append(run_network(leaves))
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# --- Addresses

BYTES = {"float": 4, "Float16": 2, "BFloat16": 2, "long long": 8}


class AddressesOnly:
    """A CPU launcher that runs nothing, but checks that vectors of the width which was chosen fit all addresses."""

    def __init__(self) -> None:
        self.widths: dict[str, int] = {}

    def __call__(self, kernel: Kernel, grid: tuple, block: tuple, packed: launch.Packed) -> None:
        name, _, arguments = kernel.instance.removesuffix(">").partition("<")
        names = c_kernels._template_parameters(kernel.file, name)
        width = int(dict(zip(names, arguments.split(", "), strict=True)).get("kWidth", 1))
        self.widths[name] = width
        for declared, memory in zip(kernel.parameters, parameters(kernel, packed), strict=True):
            kind = declared.removesuffix("?")
            members = compiler.struct_fields(kind) if kind in ("Norm", "LIF") else [kind]
            pointers = [member for member in members if member.endswith("*")]
            addresses = struct.unpack(f"{len(pointers)}Q", memory[: 8 * len(pointers)])
            for pointer, address in zip(pointers, addresses, strict=True):
                size = BYTES[pointer.removeprefix("const ").removesuffix("*")]
                assert address % min(16, width * size) == 0, f"{kernel.instance}: {declared}"


def off_by_one(tensor: Tensor) -> Tensor:
    """Return a copy that is not where vectors are, one value behind the beginning of its memory."""
    memory = tensor.detach().new_empty(tensor.numel() + 1)
    moved = memory.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor.detach())
    return moved.requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "batch_statistics"])
def test_vectors_fit_every_address(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, checked = OPERATIONS[name], AddressesOnly()
    layer = Layer((2, 2, 16, 3, 3), dtype, CIFAR, torch.device("cpu"), kernels=True)
    monkeypatch.setattr(launch, "_cpu_launcher", checked)
    statistics, inputs = batch_norm.batch_statistics, operation.inputs(layer)

    def run(which: int | None) -> None:
        """Run both passes with one tensor that is not where vectors are: an input, a statistic, or a gradient."""
        count = itertools.count()

        def perhaps_moved(*tensors: Tensor) -> list[Tensor]:
            return [off_by_one(tensor) if next(count) == which else tensor for tensor in tensors]

        leaves = perhaps_moved(*inputs)
        if name == "gate_lif":
            leaves[1] = inputs[1]  # temporal attention, which is read one by one
        with mock.patch.object(batch_norm, "batch_statistics", lambda *of: perhaps_moved(*statistics(*of))):
            outputs = operation.run(layer, *leaves)
        torch.autograd.grad(outputs, leaves, perhaps_moved(*map(torch.ones_like, outputs)))

    run(None)
    assert all(width > 1 for kernel, width in checked.widths.items() if "total" not in kernel)
    # At most two BatchNorms with two statistics each, and two outputs.
    for which in range(len(inputs) + 6):
        run(which)


# --- Two processes


def run_rank(rank: int, kernel_folder: Path, folder: Path) -> None:
    """Run the network on one image of two, as one of two processes, and save the results."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    launch.set_cpu_launcher(KernelsOnCpu(kernel_folder))
    running = torch.zeros(8), torch.ones(8)
    images = slice(rank, rank + 1)
    results = run_network(leaves_of_network("cpu"), images=images, synchronized=True, running=running)
    torch.save([*results, *running], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_the_whole_batch(kernels_on_cpu: KernelsOnCpu, tmp_path: Path) -> None:
    running = torch.zeros(8), torch.ones(8)
    expected = [*run_network(leaves_of_network("cpu"), running=running), *running]
    torch.multiprocessing.spawn(run_rank, (kernels_on_cpu._folder, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, (whole, *parts) in enumerate(zip(expected, *ranks, strict=True)):
        if number < 5:  # outputs [T, B, ...], and the gradients of x [B, ...], temporal [T, B] and spatial [B, ...]
            together = torch.cat(parts, 0 if number in (2, 4) else 1)
        elif number < 11:  # the gradients of weights and biases, which DistributedDataParallel adds up
            together = sum(parts)
        else:
            together = parts[0]
            assert torch.equal(parts[1], together)
        torch.testing.assert_close(together, whole, rtol=0, atol=1e-5 * whole.abs().max().item())


# --- Tensors of more than 2^31 elements

# Only the last block of a kernel, that of the largest addresses. The grid that the block sees is the whole one.
_LAST_BLOCK = """
#include "{file}"
template <auto kKernel>
struct LastBlock;
template <typename... Parameters, void (*kKernel)(Parameters...)>
struct LastBlock<kKernel> {{
    static void run(Parameters... parameters) {{
        gridDim.x = {blocks}u;
        blockIdx.x = {block}u;
        kKernel(parameters...);
    }}
}};
"""


class LastBlockOnly:
    """A CPU launcher that runs of each kernel the block with the last rows, and of second stages what that left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kernels = KernelsOnCpu(folder, kernel_folder=folder)
        self.launched: list[str] = []

    def __call__(self, kernel: Kernel, grid: tuple, block: tuple, packed: launch.Packed) -> None:
        self.launched.append(kernel.instance.split("<")[0])
        blocks = grid[0]
        if "total" in kernel.instance:
            first, *_, count, channels = (ctypes.c_void_p * len(kernel.parameters)).from_buffer(packed)
            partials = ctypes.c_uint64.from_address(first)
            count, channels = ctypes.c_int.from_address(count), ctypes.c_int.from_address(channels)
            quantities = 3 if kernel.instance.startswith("batch_") else grid[1]
            partials.value += 4 * (count.value - 1) * quantities * channels.value
            count.value = 1
            self._kernels(kernel, grid, block, packed)
            return
        # Second passes begin with the last rows.
        block_index = 0 if "backward_input" in kernel.instance else blocks - 1
        file = f"last_block_{blocks}_{block_index}_{kernel.file}"
        (self._folder / file).write_text(_LAST_BLOCK.format(file=kernel.file, blocks=blocks, block=block_index))
        last = Kernel(file, f"LastBlock<{kernel.instance}>::run", kernel.parameters)
        self._kernels(last, (1, *grid[1:]), block, packed)


PIXELS = 128  # of an image: with 8 channels for a thread, what a block takes at a time
IMAGES = 2**21 + 1


def mostly_unmapped(shape: tuple[int, ...], last_image: Tensor) -> Tensor:
    """Return [..., B, C, H, W] in channels_last, zero but for its last image; untouched pages take no memory."""
    *outer, C, H, W = shape
    memory = mmap.mmap(-1, np.prod(shape).item() * 2)
    x = torch.frombuffer(memory, dtype=torch.float16).view(*outer, H, W, C).movedim(-1, -3)
    x[..., -1, :, :, :] = last_image
    return x


class TestLargeTensors:
    """The last image of tensors of more than 2^31 elements a frame gives what it gives by itself."""

    T, C = 2, 8

    @pytest.fixture(autouse=True)
    def _last_block_only(self, kernels_on_cpu: KernelsOnCpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # torch.empty must not write all of what it returns.
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        monkeypatch.setattr(launch, "_BLOCKS_IN_TESTS", 2**30)
        self.all_blocks = kernels_on_cpu
        self.last_block = LastBlockOnly(tmp_path)

    def small_and_large(self, seed: int, T: tuple[int, ...] = (2,)) -> tuple[Tensor, Tensor]:
        image = fused.laid_out(fused.normal((*T, 1, self.C, PIXELS, 1), seed, 0.5, 2.0).half(), "channels_last")
        return image, mostly_unmapped((*T, IMAGES, self.C, PIXELS, 1), image[..., 0, :, :, :])

    def compare(self, function: fused.Operation, leaves: list, gradients: list, batch: list[int]) -> None:
        """``leaves`` and ``gradients``: pairs of a small and a large one; ``batch``: their dimensions of images."""
        results = []
        for size, launcher in enumerate((self.all_blocks, self.last_block)):
            launch.set_cpu_launcher(launcher)
            outputs, found = fused.run(function, [pair[size] for pair in leaves], [pair[size] for pair in gradients])
            results.append([*outputs, *found])
        for small, large, dim in zip(*results, batch, strict=True):
            if dim is not None:
                large = large.narrow(dim, -1, 1)
            assert small.abs().max() > 0
            assert torch.equal(large, small)

    def test_norm_lif(self) -> None:
        parameters = [(parameter, parameter) for parameter in fused.parameters_of_norm(self.C, "cpu")]
        self.compare(
            lambda y, weight, bias: [norm_lif.norm_lif(y, fused.fixed_statistics(y, weight, bias), IMAGENET)],
            [self.small_and_large(0), *parameters],
            [self.small_and_large(1)],
            [1, 1, None, None],
        )

    def compare_sum(self, function: Callable, gradients: list) -> None:
        parameters = [(parameter, parameter) for parameter in fused.parameters_of_norm(self.C, "cpu")]
        of_shortcut = [(parameter, parameter) for parameter in fused.parameters_of_norm(self.C, "cpu", seed=1)]

        def operation(y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor, *parameters: Tensor) -> tuple:
            statistics = fused.fixed_statistics(y, weight, bias), fused.fixed_statistics(y, *parameters)
            outputs = function(y, statistics[0], shortcut, statistics[1], IMAGENET)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        self.compare(
            operation,
            [self.small_and_large(0), *parameters, self.small_and_large(1), *of_shortcut],
            gradients,
            [*(1 for _ in gradients), 1, None, None, 1, None, None],
        )

    def test_residual_lif(self) -> None:
        self.compare_sum(residual_lif.residual_lif, [self.small_and_large(2), self.small_and_large(3)])

    def test_residual_lif_pool(self) -> None:
        grad = fused.normal((2, 1, self.C), 2).half()
        self.compare_sum(residual_lif_pool.residual_lif_pool, [(grad, grad.expand(2, IMAGES, self.C))])

    def test_gate_lif(self) -> None:
        temporal = fused.normal((2, 1), 2, 1.0)
        self.compare(
            lambda *leaves: gate_lif.gate_lif(*leaves, IMAGENET),
            [self.small_and_large(0, ()), (temporal, temporal.repeat(1, IMAGES)), self.small_and_large(1, ())],
            [self.small_and_large(2), self.small_and_large(3)],
            [1, 1, 0, 1, 0],
        )

    def test_batch_moments(self) -> None:
        small, large = self.small_and_large(0)
        launch.set_cpu_launcher(self.last_block)
        moments = batch_norm.batch_moments(large)
        launch.set_cpu_launcher(self.all_blocks)
        # The last rows of all are the last image at the last time step.
        torch.testing.assert_close(moments, batch_norm.batch_moments(small[-1:]))


# --- Compilation for GPUs, and sanitizers


def launched_kernels(T: int, dtype: torch.dtype, neuron: LIFParameters = CIFAR) -> list[tuple[Kernel, int]]:
    """Return kernel and threads of a block of what the network launches, each once; none of them runs."""
    leaves = leaves_of_network("cpu", T=T, C=16, dtype=dtype)
    return recorded(functools.partial(run_network, leaves, neuron=neuron))


def backward_kernels_of_many_steps() -> list[tuple[Kernel, int]]:
    """Return the kernels that need most registers, at other T than the benchmark's (tests/benchmarks/test_sass.py)."""
    kernels = launched_kernels(16, torch.float32) + launched_kernels(8, torch.float32, IMAGENET)
    return [launch for launch in kernels if "backward" in launch[0].instance]


def test_many_steps_compile_without_spills(kernels_on_cpu: KernelsOnCpu) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    # One capability needs about as many registers as another.
    for kernel, threads in backward_kernels_of_many_steps():
        found = figures(kernel, threads, 90)
        assert found.local == 0, kernel.instance
        assert found.blocks >= 1, kernel.instance


def test_frames_are_written_in_16_byte_accesses(kernels_on_cpu: KernelsOnCpu) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    # Sixteen bytes of each frame: membranes and spikes, only spikes, or without a following neuron only membranes.
    frames = {"gate_lif_forward": {12}, "norm_lif_forward": {6}, "residual_lif_forward": {6, 12}}
    stores = {name: set() for name in frames}
    for kernel, _ in launched_kernels(6, torch.float16):
        name = kernel.instance.partition("<")[0]
        if name in frames:
            # No GPU has capability 9.1: the compiler stops at PTX, which can be read.
            ptx = compiler.compile_kernel(kernel, 91).binary.decode()
            assert not re.search(r"st\.global\.[^v]", ptx), kernel.instance
            stores[name].add(ptx.count("st.global.v4.b32"))
    assert stores == frames


def test_nothing_written_is_read_through_the_read_only_path(kernels_on_cpu: KernelsOnCpu) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed; it brings NVRTC")
    for kernel, _ in launched_kernels(6, torch.float16) + backward_kernels_of_many_steps():
        assert read_only_loads_of_outputs(kernel) == [], kernel.instance


def test_kernels_under_sanitizers(compiled_kernels: KernelsOnCpu) -> None:
    assert "1 passed" in run_under_sanitizers(__file__, "test_all_results_are_written")


# --- Only on a GPU


@pytest.mark.gpu
class TestDevice:
    def test_graph_capture(self) -> None:
        leaves = leaves_of_network("cuda", C=64, dtype=torch.float16)
        # Made before: what comes from the host cannot be captured.
        gradients = gradients_of_network(*leaves)
        run_network(leaves, gradients=gradients)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run_network(leaves, gradients=gradients)
        leaves[0].copy_(leaves[0].flip(0))
        graph.replay()
        torch.testing.assert_close(captured, run_network(leaves), rtol=0, atol=0)

    def test_repeats_bit_for_bit(self) -> None:
        leaves = leaves_of_network("cuda", B=64, C=128, dtype=torch.float16)
        torch.testing.assert_close(run_network(leaves), run_network(leaves), rtol=0, atol=0)
