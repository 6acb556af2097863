"""PyTorch operators that run CUDA kernels: registration, and the derivative."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPERATORS: dict[str, Callable] = {}
"""The operators' implementations by name; the tests register them for the CPU as well."""


def implement(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as what runs an operator such as "gac::norm_lif" on CUDA devices."""

    def register(function: Callable) -> Callable:
        torch.library.impl(name, "cuda", function)
        OPERATORS[name] = function
        return function

    return register


def differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> Callable[..., Any]:
    """Give an operator such as "gac::norm_lif" its derivative, and return the function that calls it.

    ``setup_context`` and ``backward`` are what torch.library.register_autograd takes. Differentiating twice fails with
    a clear message; torch.func's transforms do not take the function.
    """
    short_name = name.removeprefix("gac::")
    operator = getattr(torch.ops.gac, short_name).default

    def forward(ctx: torch.autograd.function.FunctionCtx, *arguments: object) -> Any:
        output = operator(*arguments)
        setup_context(ctx, arguments, output)
        return output

    def backward_once(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        fresh = (None if each is None else each.detach().requires_grad_() for each in results)
        return _NoSecondDerivative.apply(name, *fresh)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
    function = type(short_name, (torch.autograd.Function,), methods)
    torch.library.register_autograd(name, backward_once, setup_context=setup_context)

    def call(*arguments: object) -> Any:
        # A compiler is to see the operator. Elsewhere a plain autograd.Function does the same as the one that
        # torch.library generates for it, in a fraction of the time on the host.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return operator(*arguments)
        return function.apply(*arguments)

    return call


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
        raise NotImplementedError(f"{ctx.name} has no second derivative: the CUDA kernels have none of second order")
