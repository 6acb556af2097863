"""Finds loads through the GPU's read-only path, ld.global.nc, of memory that the same kernel may write.

PTX leaves undefined what such a load returns. The compiler takes the path for pointers that are declared
``const ... __restrict__``, and also for a pointer chosen at run time between such a one and an output.
"""

import re
from collections import defaultdict

from gac.ops.cuda import compiler
from gac.ops.cuda.compiler import Kernel

_ARCHITECTURE_OF_NO_GPU = 91  # the compiler stops at PTX, which can be read


def read_only_loads_of_outputs(kernel: Kernel) -> list[str]:
    """Return the ld.global.nc of a kernel whose address may come from a pointer that a store's may come from as well.

    An address may come from every pointer parameter that reaches its register through any chain of instructions, in
    whatever order they run.
    """
    compiled = compiler.compile_kernel(kernel, _ARCHITECTURE_OF_NO_GPU)
    body = compiled.binary.decode().partition(f".entry {compiled.name}(")[2]
    assert body, f"{kernel.instance} is not in its PTX"
    body = body.partition("\n}")[0]
    # Numbers, such as a frame's size, are in addresses of inputs and outputs alike.
    pointers = {i for i, declared in enumerate(kernel.parameters) if _holds_pointers(declared.rstrip("?"))}
    sources: dict[str, set[str]] = defaultdict(set)
    flows: list[tuple[str, list[str]]] = []
    for instruction in re.findall(r"^\s*(?:@!?%\w+ )?(\w[^;]*);", body, re.MULTILINE):
        loaded = re.match(r"ld\.param\S*\s+(\{[^}]*\}|%\w+), \[\w+_param_(\d+)([^\]]*)\]", instruction)
        if loaded is not None:
            if int(loaded[2]) in pointers:
                for register in re.findall(r"%\w+", loaded[1]):
                    # A struct's members lie at offsets.
                    sources[register].add(f"{loaded[2]}{loaded[3]}")
            continue
        operation, _, operands = instruction.partition("\t" if "\t" in instruction else " ")
        # What memory holds is no address here: no kernel takes pointers to pointers.
        if operation.startswith(("ld.", "st.", "bra", "setp", "bar")):
            continue
        registers = re.findall(r"%rd\d+", operands)
        if len(registers) > 1:
            flows.append((registers[0], registers[1:]))
    changed = True
    while changed:
        changed = False
        for target, origins in flows:
            new = set().union(*(sources[each] for each in origins)) - sources[target]
            sources[target] |= new
            changed = changed or bool(new)

    def accesses(pattern: str) -> list[tuple[str, set[str]]]:
        found = re.findall(rf"({pattern}\S*[^\[;]*\[(%rd\d+)[^;]*);", body)
        return [(text, sources[register]) for text, register in found]

    stores = accesses(r"st\.global")
    assert stores, f"{kernel.instance} stores nothing"
    assert all(origins for _, origins in stores), f"an address of {kernel.instance} comes from no pointer"
    written = set().union(*(origins for _, origins in stores))
    return [text for text, origins in accesses(r"ld\.global\.nc") if origins & written]


def _holds_pointers(declared: str) -> bool:
    return "*" in declared or (declared[0].isupper() and any("*" in each for each in compiler.struct_fields(declared)))
