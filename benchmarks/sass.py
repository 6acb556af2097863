"""Show what a disassembler says of the fused kernels: python -m benchmarks.sass (--help lists all options).

NVRTC compiles the kernels that gac/ops/catalogue.py launches for GPUs that need not be there, nvdisasm takes the
binaries apart, and what a kernel must not lose is compared with STATED: accesses to memory, bytes that a thread has
under way, registers that let enough blocks run at once, and no fused multiply-add in what decides about a spike. The
table is Markdown. It says nothing of time: only a GPU does.
"""

import functools
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common import DTYPES, MeasurementError
from gac.command_line import Parser, finish
from gac.errors import InputError
from gac.neuron import PRESETS
from gac.ops import backend
from gac.ops.catalogue import OPERATIONS, Layer
from gac.ops.cuda import compiler, launch
from gac.ops.cuda.compiler import Kernel

NVDISASM = "nvidia-cuda-nvdisasm"
TIME_STEPS = (4, 6)
HALVES = ("float16", "bfloat16")
# As many as the first stage of the published networks has; more of them launch the same kernels.
CHANNELS = 64


class Stated(NamedTuple):
    """What a kernel must not lose, at T = 4 and 6 in half precision on every GPU of MULTIPROCESSORS.

    Attributes:
        in_flight: The bytes that a thread asks memory for before it needs the first of them; at least.
        accesses: The bytes of each access to memory in the loop over rows, or in the kernel where it has no loop.
        blocks: How many a multiprocessor can run at once; at least.
        spikes: Whether comparisons decide about spikes, which are the reference's bit for bit.
    """

    in_flight: int
    accesses: set[int]
    blocks: int
    spikes: bool


STATED = {
    ("lif", "lif_forward"): Stated(96, {16}, 9, spikes=True),
    ("lif", "lif_backward"): Stated(144, {16}, 3, spikes=True),
    ("batch_statistics", "batch_moments_partials"): Stated(128, {16}, 4, spikes=False),
    ("batch_statistics", "batch_moments_total"): Stated(48, {4}, 1, spikes=False),
    ("norm_lif", "batch_statistics_total"): Stated(48, {4}, 1, spikes=False),
    ("norm_lif", "norm_lif_forward"): Stated(48, {16}, 5, spikes=True),
    ("norm_lif", "norm_lif_backward_sums"): Stated(48, {8}, 4, spikes=True),
    ("norm_lif", "total_of_partials"): Stated(16, {4}, 1, spikes=False),
    ("norm_lif", "norm_lif_backward_input"): Stated(40, {8}, 4, spikes=True),
    ("residual_lif", "residual_lif_forward"): Stated(96, {16}, 4, spikes=True),
    ("residual_lif", "residual_lif_backward_sums"): Stated(56, {8}, 4, spikes=True),
    ("residual_lif", "residual_lif_backward_inputs"): Stated(128, {16}, 4, spikes=False),
    ("residual_norm_lif", "residual_lif_forward"): Stated(80, {16}, 4, spikes=True),
    ("residual_norm_lif", "residual_lif_backward_sums"): Stated(72, {8}, 3, spikes=True),
    ("residual_norm_lif", "residual_lif_backward_inputs"): Stated(128, {16}, 3, spikes=False),
    ("residual_lif_pool", "residual_lif_pool_forward"): Stated(96, {16}, 3, spikes=True),
    ("residual_lif_pool", "residual_lif_pool_backward_sums"): Stated(64, {8}, 3, spikes=True),
    ("gate_lif", "gate_lif_forward"): Stated(16, {16}, 4, spikes=True),
    ("gate_lif", "gate_lif_backward"): Stated(40, {8}, 3, spikes=True),
}
"""By operation of the catalogue and kernel; a kernel of several operations stands with the first."""


class Multiprocessor(NamedTuple):
    """What a multiprocessor holds at once: threads, and bytes of shared memory."""

    threads: int
    shared: int


# CUDA C++ Programming Guide, technical specifications for each compute capability.
MULTIPROCESSORS = {
    80: Multiprocessor(2048, 164 * 1024),
    89: Multiprocessor(1536, 100 * 1024),
    90: Multiprocessor(2048, 228 * 1024),
    100: Multiprocessor(2048, 228 * 1024),
    120: Multiprocessor(1536, 100 * 1024),
}
_REGISTERS = 16384  # of each quarter of a multiprocessor, on all of these; a warp gets them in units of 8 a thread
_QUARTERS, _WARP, _REGISTER_UNIT = 4, 32, 8
_SYSTEM_SHARED = 1024  # of each block; on all but these part of what the binary declares
_DECLARED_WITHOUT_SYSTEM = (80, 89)


class Launched(NamedTuple):
    """A kernel, the first operation of the catalogue that launches it, and the threads of its blocks."""

    operation: str
    kernel: Kernel
    threads: int

    @property
    def key(self) -> tuple[str, str]:
        """Its key in STATED."""
        return self.operation, self.kernel.instance.partition("<")[0]


@dataclass(frozen=True)
class Figures:
    """What a kernel's binary says, of its longest loop or, without a loop, of all of it.

    Attributes:
        registers: Of each thread, in the whole kernel.
        blocks: How many a multiprocessor can run at once by their registers, threads and shared memory.
        in_flight: The most bytes that a thread has asked memory for before it needs the first of them.
        accesses: Bytes of each kind of access to global memory.
        moved: Bytes that a thread loads and stores.
        instructions: In the loop, on all of its branches.
        local: Loads and stores of local memory in the whole kernel, where registers are spilled to.
        comparisons: Comparisons of floating-point numbers in the whole kernel by <, <=, > or >=.
        fused_comparisons: Those of numbers that a fused multiply-add went into.
    """

    registers: int
    blocks: int
    in_flight: int
    accesses: frozenset[int]
    moved: int
    instructions: int
    local: int
    comparisons: int
    fused_comparisons: int


def recorded(call: Callable[[], object]) -> list[tuple[Kernel, int]]:
    """Return kernel and threads of a block of every launch for the CPU in a call, each once; none of them runs."""
    launches = {}
    before = launch._cpu_launcher
    launch.set_cpu_launcher(lambda kernel, grid, block, values: launches.update({(kernel, block[0]): None}))
    try:
        call()
    finally:
        launch.set_cpu_launcher(before)
    return list(launches)


def launched_kernels(T: int, dtype: torch.dtype) -> list[Launched]:
    """Return the kernels that the operations of the catalogue launch in both passes, each once."""
    layer = Layer((T, 1, CHANNELS, 4, 4), dtype, PRESETS["cifar"], torch.device("cpu"), kernels=True)

    def both_passes(name: str) -> None:
        operation = OPERATIONS[name]
        outputs = [output for output in operation.run(layer, *operation.inputs(layer)) if output.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    found: dict[Kernel, Launched] = {}
    for name in OPERATIONS:
        for kernel, threads in recorded(functools.partial(both_passes, name)):
            found.setdefault(kernel, Launched(name, kernel, threads))
    return list(found.values())


@functools.cache
def disassembler() -> str:
    """Return the path of nvdisasm, from its wheel or a CUDA toolkit. Raises InputError where there is none."""
    try:
        files = importlib.metadata.files(NVDISASM) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [str(file.locate()) for file in files if file.stem == "nvdisasm"]
    tool = found[0] if found else shutil.which("nvdisasm")
    if tool is None:
        raise InputError(f"nvdisasm is not installed; pip install {NVDISASM}")
    return tool


def disassemble(kernel: Kernel, capability: int) -> tuple[str, str]:
    """Return nvdisasm's text of a kernel's binary for a compute capability such as 90, and its mangled name.

    Raises InputError where NVRTC does not make binaries for that.
    """
    binary, name = compiler.compile_once(kernel, capability)
    if not binary.startswith(b"\x7fELF"):
        raise InputError(f"this NVRTC makes no binaries for sm_{capability}; --capabilities chooses others")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        # Without the targets of indirect jumps, which take a third of the time; the kernels have none.
        command = [disassembler(), "--no-dataflow", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text, name


@functools.cache
def figures(kernel: Kernel, threads: int, capability: int) -> Figures:
    """Return the figures of a kernel for a compute capability, run in blocks of so many threads."""
    text, name = disassemble(kernel, capability)
    registers = int(_attribute(text, "REGCOUNT", name), 16)
    code = Code.parse(_section(text, f".text.{name}"))
    loop = code.longest_loop()
    comparisons, fused = comparisons_in(code)
    sizes = [_bytes_of(each) for each in loop if _operation(each).startswith(("LDG", "STG"))]
    return Figures(
        registers=registers,
        blocks=_resident_blocks(registers, _shared_bytes(text, name, capability), threads, capability),
        in_flight=bytes_in_flight(loop),
        accesses=frozenset(sizes),
        moved=sum(sizes),
        instructions=len(loop),
        local=sum(_operation(each).startswith(("LDL", "STL")) for each in code.instructions),
        comparisons=comparisons,
        fused_comparisons=fused,
    )


def _section(text: str, name: str) -> str:
    """Return a section's text, empty if there is none of this name."""
    parts = re.split(r"^//-{5,} (\S+) +-+$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(name, "")


def _attribute(text: str, attribute: str, name: str) -> str:
    pattern = rf"EIATTR_{attribute}\n(?:(?!EIATTR)[\s\S])*?index@\({re.escape(name)}\)\s+/\*\w+\*/\s+\.word\s+(0x\w+)"
    return re.search(pattern, text)[1]


def _shared_bytes(text: str, name: str, capability: int) -> int:
    declared = sum(map(int, re.findall(r"\.zero\s+(\d+)", _section(text, f".nv.shared.{name}"))))
    return declared + (_SYSTEM_SHARED if capability in _DECLARED_WITHOUT_SYSTEM or not declared else 0)


def _resident_blocks(registers: int, shared: int, threads: int, capability: int) -> int:
    has = MULTIPROCESSORS[capability]
    warps_of_quarter = _REGISTERS // (_WARP * _REGISTER_UNIT * -(-registers // _REGISTER_UNIT))
    by_registers = _QUARTERS * warps_of_quarter // (threads // _WARP)
    return min(by_registers, has.threads // threads, has.shared // shared)


class Code(NamedTuple):
    """The instructions of a kernel, and where its labels are among them."""

    instructions: list[str]
    labels: dict[str, int]

    @classmethod
    def parse(cls, section: str) -> "Code":
        """Read the text of a kernel's section."""
        code = cls([], {})
        for line in section.splitlines():
            if label := re.match(r"(\.L\w+):", line):
                code.labels[label[1]] = len(code.instructions)
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", line):
                code.instructions.append(found[1])
        return code

    def target(self, position: int) -> int | None:
        """Return where the instruction at a position branches to, if it does."""
        branch = re.search(r"\bBRA\b.*`\((\.L\w+)\)", self.instructions[position])
        return self.labels[branch[1]] if branch else None

    def longest_loop(self) -> list[str]:
        """Return the instructions of the longest loop or, without a loop, all of them."""
        ends = {i: self.target(i) for i in range(len(self.instructions))}
        # A branch to itself ends every kernel.
        loops = [(start, end + 1) for end, start in ends.items() if start is not None and start < end]
        if not loops:
            return self.instructions
        return self.instructions[slice(*max(loops, key=lambda loop: loop[1] - loop[0]))]

    def successors(self, position: int) -> list[int]:
        """Return the positions that may run after this one; what is called is passed over."""
        instruction, target = self.instructions[position], self.target(position)
        always = not instruction.startswith("@")
        if always and _operation(instruction) in ("EXIT", "RET.REL.NODEC", "RET.ABS.NODEC"):
            return []
        if always and target is not None and len(_operands(instruction)) == 1:
            return [target]
        return [each for each in (position + 1, target) if each is not None and each < len(self.instructions)]


def _operation(instruction: str) -> str:
    return re.match(r"(?:@!?\w+ )?(\S+)", instruction)[1]


def _operands(instruction: str) -> list[str]:
    return re.sub(r"^(?:@!?\w+ )?\S+", "", instruction).split(",")


def _registers(text: str, count: int = 1) -> set[str]:
    """Return the registers named in a text, and for each of them those after it that belong to a wider value."""
    found = re.findall(r"\b(U?R)(\d+)\b", text)
    return {f"{kind}{int(number) + i}" for kind, number in found for i in range(count)}


_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _bytes_of(access: str) -> int:
    return next((_BYTES[part] for part in _operation(access).split(".") if part in _BYTES), 4)


def bytes_in_flight(code: Sequence[str]) -> int:
    """Return the most bytes that loads have asked for, in the order of the code, before one of them is needed."""
    pending: set[str] = set()
    most = under_way = 0
    for instruction in code:
        operands = _operands(instruction)
        is_load = _operation(instruction).startswith("LDG")
        if _registers(",".join(operands[1:] if is_load else operands)) & pending:
            pending, under_way = set(), 0
        if is_load:
            size = _bytes_of(instruction)
            pending |= _registers(operands[0], -(-size // 4))
            under_way += size
            most = max(most, under_way)
    return most


# Not those with infinity, which look for NaN.
_COMPARISON = re.compile(r"(?:@!?\w+ )?FSETP?\b\S*\.(?:LT|LE|GT|GE)U?\b(?!.*INF)")


def comparisons_in(code: Code) -> tuple[int, int]:
    """Return how many comparisons of numbers there are, and into how many of them a fused multiply-add may have gone.

    It has where its result, or what was computed from that, stays in a register on some way through the code to the
    comparison.
    """
    fused_before: dict[int, frozenset[str]] = {}
    reached = [(0, frozenset[str]())]
    while reached:
        position, fused = reached.pop()
        known = fused_before.get(position)
        if known is not None and fused <= known:
            continue
        fused_before[position] = fused | (known or frozenset())
        fused_after = _fused_after(code.instructions[position], fused_before[position])
        reached += [(successor, fused_after) for successor in code.successors(position)]
    compared = [
        (_registers(code.instructions[position]), fused)
        for position, fused in fused_before.items()
        if _COMPARISON.match(code.instructions[position])
    ]
    return len(compared), sum(bool(registers & fused) for registers, fused in compared)


def _fused_after(instruction: str, fused: frozenset[str]) -> frozenset[str]:
    """Return the registers that hold what comes from a fused multiply-add after an instruction."""
    operation, (target, *others) = _operation(instruction), _operands(instruction)
    sources = ",".join(others)
    if operation.startswith(("ST", "RED", "BRA", "EXIT", "BAR")):
        return fused
    in_pairs = re.match(r"F(?:ADD|MUL|FMA)2", operation)
    # HFMA2 of zeros is how a constant gets into a register.
    is_fused = re.match(r"U?[FD]FMA|HFMA2", operation) and not re.match(r" *-?RZ, *-?RZ", sources)
    written = _registers(target, 2 if in_pairs or ".WIDE" in operation or ".64" in operation else 1)
    if operation.startswith("LD"):
        written, is_fused, sources = _registers(target, -(-_bytes_of(instruction) // 4)), None, ""
    if is_fused or _registers(sources, 2 if in_pairs else 1) & fused:
        return fused | written
    return fused if instruction.startswith("@") else fused - written


def losses(launched: Launched, found: Figures) -> list[str]:
    """Return what of STATED a kernel has lost, one line each."""
    stated = STATED[launched.key]
    checks = {
        f"{found.in_flight} bytes in flight, not {stated.in_flight}": found.in_flight >= stated.in_flight,
        f"accesses of {sorted(found.accesses)} bytes, not {sorted(stated.accesses)}": found.accesses <= stated.accesses,
        f"{found.registers} registers let {found.blocks} blocks run, not {stated.blocks}": found.blocks
        >= stated.blocks,
        f"{found.local} accesses to local memory": found.local == 0,
    }
    if stated.spikes:
        checks["no comparison decides about a spike"] = found.comparisons > 0
        checks[f"{found.fused_comparisons} of {found.comparisons} comparisons depend on a fused multiply-add"] = (
            found.fused_comparisons == 0
        )
    return [line for line, holds in checks.items() if not holds]


def markdown(found: dict[Launched, dict[int, Figures]]) -> list[str]:
    """Return the lines of a table of the worst figures of each kernel of STATED, over what was measured."""
    capabilities = sorted({capability for each in found.values() for capability in each})
    titles = ["Operation", "Kernel", "Access, bytes", "Stated", *(f"sm_{capability}" for capability in capabilities)]
    lines = ["| " + " | ".join([*titles, "Instructions a byte"]) + " |", "| --- " * (len(titles) + 1) + "|"]
    for key, stated in STATED.items():
        rows = {launched: each for launched, each in found.items() if launched.key == key}
        if not rows:
            continue
        cells = [*(f"`{name}`" for name in key), ", ".join(map(str, sorted(stated.accesses)))]
        cells.append(f"{stated.in_flight} / {stated.blocks}")
        for capability in capabilities:
            here = [each[capability] for each in rows.values()]
            least = min(each.in_flight for each in here), min(each.blocks for each in here)
            cells.append(f"{least[0]} / {least[1]} ({max(each.registers for each in here)})")
        rates = [figure.instructions / figure.moved for each in rows.values() for figure in each.values()]
        cells.append(f"{min(rates):.1f} to {max(rates):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _measure_and_print(options: Namespace) -> None:
    toolchain = backend.toolchain_status()
    if not toolchain.ok:
        raise InputError(f"the kernels cannot be compiled: {toolchain.reason}; {toolchain.hint}")
    disassembler()
    found: dict[Launched, dict[int, Figures]] = {}
    lost = []
    for T, dtype in product(options.time_steps, options.dtype):
        for launched in launched_kernels(T, DTYPES[dtype]):
            found[launched] = {each: figures(*launched[1:], each) for each in options.capabilities}
            for capability, figure in found[launched].items():
                lost += [f"{launched.kernel.instance}, sm_{capability}: {line}" for line in losses(launched, figure)]
    print(*markdown(found), sep="\n")
    steps, dtypes = " and ".join(map(str, options.time_steps)), " and ".join(options.dtype)
    print(f"\nT = {steps}, {dtypes}; {toolchain.reason}.")
    if lost:
        raise MeasurementError("; ".join(lost))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 1 where a kernel has lost what is stated."""
    parser = Parser("benchmarks.sass", __doc__)
    parser.add(
        "--capabilities",
        "compute capabilities, 90 for 9.0",
        type=int,
        choices=MULTIPROCESSORS,
        default=[*MULTIPROCESSORS],
    )
    parser.add("--time-steps", "numbers of time steps", type=int, choices=TIME_STEPS, default=[*TIME_STEPS])
    parser.add("--dtype", "types of the activations", choices=HALVES, default=[*HALVES])
    return finish(lambda: _measure_and_print(parser.parse_args(arguments)), MeasurementError)


if __name__ == "__main__":
    sys.exit(main())
