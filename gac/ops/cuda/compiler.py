"""The kernels' source, and NVRTC (through CuPy), which compiles it at run time."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gac.ops import kernel_cache
from gac.ops.kernel_source import KERNEL_FOLDER, source_text

ELEMENTS = {torch.float32: "float", torch.float16: "Float16", torch.bfloat16: "BFloat16"}
"""What the kernels call a tensor's elements (``kernels/element.cuh``), for each dtype that they take."""

# No -ftz and no fast math: subnormal potentials count, as they do in the reference.
COMPILE_OPTIONS = ("-std=c++17",)


@dataclass(frozen=True)
class Kernel:
    """One instantiation of a kernel template.

    Args:
        file: Source file in ``gac/ops/kernels``, such as "lif.cu".
        instance: C++ name, such as "lif_forward<float, 6, true, 4, Reset::hard, true>".
        parameters: C++ type of each parameter: "float", "int", "long long", a pointer such as "const float*", or a
            struct of these such as "LIF". A "?" after a pointer or struct allows None (all bytes zero).
    """

    file: str
    instance: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class CompiledKernel:
    """What NVRTC made of a kernel: binary (cubin, or PTX), mangled name, and the compiler's log."""

    binary: bytes
    name: str
    log: str


@functools.lru_cache(maxsize=None, typed=True)
def make_kernel(file: str, name: str, *template: torch.dtype | bool | int | str) -> Kernel:
    """Return a kernel, or its instance for a template's arguments; the parameters' types are read from the source.

    A dtype in the place of ``Element`` is that of a tensor.
    """
    element, arguments = "", []
    for argument in template:
        if isinstance(argument, torch.dtype):
            argument = element = ELEMENTS[argument]
        arguments.append(str(argument).lower() if isinstance(argument, bool) else str(argument))
    parameters = tuple(re.sub(r"\bElement\b", element, declared) for declared in signature(file, name))
    return Kernel(file, f"{name}<{', '.join(arguments)}>" if template else name, parameters)


_PARAMETER = re.compile(r"(?P<type>(?:const )?[\w ]+?\*?) ?(?:__restrict__ )?(?P<nullable>NULLABLE )?\b\w+")


@functools.cache
def signature(file: str, name: str) -> tuple[str, ...]:
    """Return the types of a kernel's parameters as in :class:`Kernel`: with a "?" where the source says NULLABLE."""
    source = (KERNEL_FOLDER / file).read_text()
    kernel = re.search(rf"__global__ void (?:__launch_bounds__\([^()]*\) )?{name}\(([^()]*)\)", source)
    parameters = [_PARAMETER.fullmatch(" ".join(each.split())) for each in kernel[1].split(",")]
    return tuple(each["type"] + ("?" if each["nullable"] else "") for each in parameters)


@functools.cache
def struct_fields(name: str) -> tuple[str, ...]:
    """Return the types of the members of a struct that kernels take, in their order."""
    headers = "\n".join(path.read_text() for path in sorted(KERNEL_FOLDER.glob("*.cuh")))
    body = re.search(rf"^struct {name} {{\n(.*?)^}};", headers, re.MULTILINE | re.DOTALL)
    return tuple(re.findall(r"^    ((?:const )?\w[\w ]*\*?) \w+;", body[1], re.MULTILINE))


def compile_kernel(kernel: Kernel, capability: int, options: Sequence[str] = ()) -> CompiledKernel:
    """Compile a kernel with NVRTC for a compute capability such as 90; needs CuPy but no GPU.

    For a GPU that is newer than NVRTC the binary is PTX, which the driver finishes.

    Raises:
        RuntimeError: With the compiler's log, if the source does not compile.
    """
    from cupy.cuda import nvrtc

    supported = nvrtc.getSupportedArchs()
    if capability in supported:
        # CuPy takes the last byte for the end of a string; it is the binary's own, a zero.
        target, read_binary = f"-arch=sm_{capability}", lambda program: nvrtc.getCUBIN(program) + b"\0"
    else:
        known = max((arch for arch in supported if arch <= capability), default=None)
        if known is None:
            raise RuntimeError(
                f"NVRTC compiles for compute capability {min(supported) / 10} and above, not {capability / 10}"
            )
        target, read_binary = f"-arch=compute_{known}", nvrtc.getPTX
    # Not cupy.RawModule: it always adds -ftz=true, which flushes subnormal numbers to zero.
    program = nvrtc.createProgram(source_text(kernel.file), kernel.file, [], [])
    try:
        nvrtc.addNameExpression(program, kernel.instance)
        try:
            nvrtc.compileProgram(program, [*COMPILE_OPTIONS, target, *options])
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"{kernel.instance} does not compile ({target}):\n{log}") from error
        name = nvrtc.getLoweredName(program, kernel.instance)
        return CompiledKernel(read_binary(program), name, nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def compile_once(kernel: Kernel, capability: int) -> tuple[bytes, str]:
    """Return a kernel's binary and mangled name from the disk (:mod:`gac.ops.kernel_cache`), or compile it.

    Raises:
        RuntimeError: With the compiler's log, if the source does not compile.
    """
    from cupy.cuda import nvrtc

    key = kernel_cache.key_of(
        source_text(kernel.file), kernel.instance, capability, COMPILE_OPTIONS, nvrtc.getVersion()
    )
    cached = kernel_cache.load(key)
    if cached is not None:
        name, _, binary = cached.partition(b"\n")
        return binary, name.decode()
    compiled = compile_kernel(kernel, capability)
    kernel_cache.store(key, compiled.name.encode() + b"\n" + compiled.binary)
    return compiled.binary, compiled.name
