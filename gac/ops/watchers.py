"""Whether something watches or rewrites operations: a tracer, an exporter, a counter, a transform."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from gac.errors import InputError

_as_before: ContextVar[bool | None] = ContextVar("_as_before", default=None)


def watched(x: Tensor) -> bool:
    """Return whether operations on ``x`` are recorded, counted or rewritten, by anything but torch.compile.

    True under torch.jit.trace, torch.export and what builds on them, under any TorchDispatchMode or TorchFunctionMode
    (but for torch.set_default_device), in torch.func's transforms and forward-mode differentiation, and for tensors of
    a subclass. What runs then has to be the readable specification: operations that write into given memory, and
    kernels, hide what they compute.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return watched_eagerly(x)


def watched_eagerly(x: Tensor) -> bool:
    """Return what :func:`watched` does outside torch.compile, for who has asked for that already."""
    before = _as_before.get()
    if before is not None:
        return before
    return (
        type(x) not in (Tensor, nn.Parameter)
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or (torch._C._len_torch_function_stack() > 0 and _function_modes())
    )


def _function_modes() -> bool:
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(not isinstance(mode, DeviceContext) for mode in modes)


@contextmanager
def watched_as_before(value: bool) -> Iterator[None]:
    """Let :func:`watched` return what it did when a computation that is being repeated ran first."""
    token = _as_before.set(value)
    try:
        yield
    finally:
        _as_before.reset(token)


def constant_when_compiled(function: Callable) -> Callable:
    """Let torch.compile call ``function`` and take its result for a constant of the graph; torch's
    assume_constant_result, which imports the compiler and so takes half the time of ``import gac``."""
    function._dynamo_marked_constant = True
    return function


def refuse_symbolic(x: object) -> None:
    """Raise InputError for what torch.fx.symbolic_trace passes in place of a tensor: it has neither shape nor dtype."""
    if isinstance(x, torch.fx.Proxy):
        raise InputError(
            "torch.fx.symbolic_trace cannot follow this module, as its input's shape and dtype decide what it does: "
            "use torch.export.export or make_fx, which take an example input, or a Tracer that keeps the module whole"
        )
