"""PyTorch operators that run the kernels: definition, implementation, and the derivative.

An operator takes only tensors, numbers and strings. Only this file takes a neuron apart for it and puts it together
again: to everyone else it is one argument, the last.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled

from gac.ops.neuron import LIFParameters
from gac.ops.watchers import watched_eagerly

_NEURON_ARGUMENTS = LIFParameters.SCHEMA.count(",") + 1
_with_neuron: set[str] = set()
_implementations: dict[str, Callable[[str, tuple], Any]] = {}


def define(name: str, schema: str) -> None:
    """Define an operator such as "gac::norm_lif"; its last argument may be "LIF neuron"."""
    flat = schema.replace("LIF neuron)", f"{LIFParameters.SCHEMA})")
    if flat != schema:
        _with_neuron.add(name)
    torch.library.define(name, flat, tags=(torch.Tag.pt2_compliant_tag,))


def _flatten(arguments: tuple) -> tuple:
    *others, last = arguments
    return (*others, *last.flatten()) if isinstance(last, LIFParameters) else arguments


def _unflatten(name: str, arguments: tuple) -> tuple:
    if name not in _with_neuron:
        return arguments
    return *arguments[:-_NEURON_ARGUMENTS], LIFParameters.unflatten(*arguments[-_NEURON_ARGUMENTS:])


def _own(name: str, arguments: tuple) -> tuple:
    """Return the arguments with a neuron whose surrogate no live module has."""
    if getattr(arguments[-1], "is_own", False):
        return arguments
    return _unflatten(name, _flatten(arguments))


def call(name: str, *arguments: object) -> Any:
    """Return what an operator such as "gac::norm_lif" gives for its arguments.

    Where nothing but the kernels has to see the call, PyTorch's dispatcher is not asked: it takes as long again as the
    rest on the host.
    """
    if torch.is_grad_enabled() or not _plain(arguments):
        return _dispatch(name, arguments)
    return _run(name, _own(name, arguments))


def _dispatch(name: str, arguments: tuple) -> Any:
    return getattr(torch.ops.gac, name.removeprefix("gac::")).default(*_flatten(arguments))


def _run(name: str, arguments: tuple) -> Any:
    # A profiler shows operators by their names.
    return (_dispatch if _profiler_enabled() else _implementations[name])(name, arguments)


_PLAIN_TYPES = frozenset((Tensor, nn.Parameter, LIFParameters, float, int, bool, str, type(None)))


def _plain(arguments: tuple) -> bool:
    """Return whether the dispatcher would do nothing with these arguments but call the implementation."""
    if torch.compiler.is_compiling() or not _PLAIN_TYPES.issuperset(map(type, arguments)):
        return False
    first = arguments[0]
    if first is None:
        first = next(each for each in arguments if each is not None)
    return (first.is_cuda or first.is_cpu) and not watched_eagerly(first)


def outputs(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as what tells the outputs' shapes, dtypes and strides of an operator."""

    def register(function: Callable) -> Callable:
        torch.library.register_fake(name, lambda *arguments: function(*_unflatten(name, arguments)))
        return function

    return register


def implement(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as what runs an operator such as "gac::norm_lif", on CUDA devices and the CPU."""

    def register(function: Callable) -> Callable:
        torch.library.impl(name, ("cuda", "cpu"), lambda *arguments: function(*_unflatten(name, arguments)))
        _implementations[name] = lambda _, arguments: function(*arguments)
        return function

    return register


def differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> Callable[..., Any]:
    """Give an operator such as "gac::norm_lif" its derivative, and return the function that calls it.

    ``setup_context`` and ``backward`` are what torch.library.register_autograd takes, except that ``backward`` returns
    gradients of the first inputs only: the others have none. Differentiating twice fails with a clear message;
    torch.func's transforms do not take the function.
    """

    def forward(ctx: torch.autograd.function.FunctionCtx, *arguments: object) -> Any:
        # The surrogate of a live module may be another one by the time of the backward pass.
        arguments = _own(name, arguments)
        output = _run(name, arguments)
        setup_context(ctx, arguments, output)
        return output

    def setup_flat_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Any) -> None:
        setup_context(ctx, _unflatten(name, inputs), output)

    def backward_once(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            with torch.no_grad():
                results = backward(ctx, *gradients)
            fresh = (None if each is None else each.detach().requires_grad_() for each in results)
            results = _NoSecondDerivative.apply(name, *fresh)
        else:
            results = backward(ctx, *gradients)
        return *results, *(None for _ in ctx.needs_input_grad[len(results) :])

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
    function = type(name.removeprefix("gac::"), (torch.autograd.Function,), methods)
    torch.library.register_autograd(name, backward_once, setup_context=setup_flat_context)

    def run(*arguments: object) -> Any:
        # A compiler or whoever watches is to see the operator. Elsewhere a plain autograd.Function does the same as the
        # one that torch.library generates for it, in a fraction of the time on the host.
        if torch.is_grad_enabled() and _plain(arguments):
            return function.apply(*arguments)
        return call(name, *arguments)

    return run


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients as they are, of which a derivative fails with a clear message instead of being zero."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, name: str, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return gradients

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor | None) -> None:
        raise NotImplementedError(f"{ctx.name} has no second derivative: the kernels have none of second order")
