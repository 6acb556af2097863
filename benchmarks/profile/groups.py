"""The groups that kernels (on a GPU) and operators (on a CPU) are counted in: a rule of names."""

import re
from functools import cache

from gac.ops.cuda.compiler import KERNEL_FOLDER

IDLE = "idle"
"""No kernel runs (on a GPU), or none of torch's operators (on a CPU)."""
OTHER = "other"

# The first pattern that is found in the name decides, whatever its case.
KERNEL_RULES = (
    ("BatchNorm", r"batch_?norm|\bbn_|bn_[fb]w"),
    # Before the convolutions, whose names have layouts too: these are what channels_last is to avoid.
    ("layout conversions", r"nchw_?to_?nhwc|nhwc_?to_?nchw"),
    ("matrix products", r"xmma_gemm(?!.*(fprop|[dw]grad))"),
    ("convolutions", r"conv(?!ert)|cudnn|xmma|implicit_gemm|winograd|[fdw]grad|fprop|nchw|nhwc"),
    ("neurons (SpikingJelly)", r"^_?(forward|backward)_kernel|lif"),
    ("optimiser and loss scaling", r"multi_tensor_apply|sgd|amp_"),
    ("loss", r"softmax|nll_loss"),
    ("matrix products", r"gemm|gemv|nvjet|splitk|cublas"),
    ("copies and casts", r"memcpy|memset|copy|catarray|fill"),
    ("reductions", r"reduce"),
    ("element by element", r"elementwise|vectorized"),
)
OPERATOR_RULES = (
    ("BatchNorm", r"batch_?norm"),
    ("convolutions", r"conv"),
    ("neurons (SpikingJelly)", r"lif|surrogatespike"),
    ("neurons (step by step)", r"trianglespike|rectanglespike"),
    ("optimiser and loss scaling", r"optimizer|sgd"),
    ("loss", r"softmax|nll_loss|cross_entropy"),
    ("matrix products", r"\b(mm|addmm|linear|matmul|bmm)\b"),
    ("copies and casts", r"copy|::(to|contiguous|clone|cat|stack|repeat|zeros?|zero_|fill_|empty.*)$"),
    ("reductions", r"::(sum|mean|max|amax)\b"),
    ("element by element", r"::(add|sub|rsub|mul|div|neg|abs|ge|gt|lt|eq|clamp|sigmoid|where|relu|threshold)"),
)


def kernel_group(name: str) -> str:
    """Return the group of a GPU kernel: its own name for this package's, else by KERNEL_RULES."""
    ours = re.match(r"(?:void )?(\w+)\s*(?:<|\(|$)", name)
    if ours is not None and ours[1] in our_kernels():
        return ours[1]
    return _first_match(name, KERNEL_RULES) or OTHER


def operator_group(name: str, ancestors: list[str]) -> str:
    """Return the group of an operator on a CPU, by OPERATOR_RULES: the operators it is a part of decide before it.

    ``ancestors`` are the names of those, the outermost last.
    """
    for each in (*reversed(ancestors), name):
        # What the backward pass calls a node is the class behind it.
        group = _first_match(each, OPERATOR_RULES)
        if group is not None:
            return group
    return OTHER


@cache
def our_kernels() -> frozenset[str]:
    """Return the names of this package's kernels, read off their sources."""
    declaration = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(")
    return frozenset(name for path in KERNEL_FOLDER.glob("*.cu") for name in declaration.findall(path.read_text()))


def _first_match(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    return next((group for group, pattern in rules if re.search(pattern, name, re.IGNORECASE)), None)
