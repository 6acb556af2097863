"""Weight gradients of convolutions on a second CUDA stream, beside the next kernels of the backward pass.

Nothing before the optimiser reads a weight gradient, and the kernels between two convolutions leave arithmetic units
idle while they wait for memory.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class Executor(Protocol):
    """What computes the weight gradients."""

    def submit(self, work: Callable[[], None]) -> None:
        """Run ``work`` after what the current stream has been given so far, and before the next :meth:`join` ends."""

    def join(self) -> None:
        """Let what the current stream is given from now on run after all that was submitted."""


class SecondStream:
    """An executor that works on a stream of its own, also while a CUDA graph is captured.

    The tensors that a stream reads must not be freed before: the allocator knows only of the stream on which a tensor
    was made. They live in the ``work``, which is kept until the current stream has been told to wait for its end. What
    the second stream made may be freed at any time, as it waits for the current one before it makes anything else.
    """

    AHEAD = 4
    """Convolutions whose weight gradients the current stream may be ahead of. With all of them the activations that
    are freed one after another in the backward pass, or are computed again, would all be there at its end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._running: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        if len(self._running) == self.AHEAD:
            current.wait_event(self._running.popleft()[0])
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        self._running.append((self._stream.record_event(), work))

    def join(self) -> None:
        try:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        finally:
            self._running.clear()


def select_executor(wanted: bool, device: torch.device) -> Executor | None:
    """Return what computes weight gradients beside a backward pass: None if not ``wanted``, and on the CPU."""
    return SecondStream(device) if wanted and device.type == "cuda" else None


class Pass:
    """A forward and a backward pass whose weight gradients an executor computes; see :func:`overlapped`.

    Attributes:
        submitted: Weight gradients that the executor got.
    """

    def __init__(self, weights: Iterable[nn.Parameter], executor: Executor) -> None:
        self._weights = dict.fromkeys(filter(_takes, weights))
        self._executor = executor
        self._converted: dict[torch.dtype, dict[Tensor, Tensor]] = {}
        self._found: list[tuple[Tensor, Tensor]] = []
        self._open = True
        self.submitted = 0

    def __contains__(self, weight: Tensor) -> bool:
        return weight in self._weights

    def converted(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight in ``dtype``; the first call converts all of them at once, where autocast would each."""
        if weight.dtype == dtype:
            return weight.detach()
        if dtype not in self._converted:
            with torch.no_grad():
                copies = [torch.empty_like(each, dtype=dtype) for each in self._weights]
                torch._foreach_copy_(copies, [*self._weights])
            self._converted[dtype] = dict(zip(self._weights, copies, strict=True))
        return self._converted[dtype][weight]

    def submit(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Have the gradient of a weight computed, and kept until :meth:`deliver`."""
        if not self._open:
            raise RuntimeError("a backward pass through overlapped convolutions has to end before overlapped() does")
        self.submitted += 1
        self._executor.submit(lambda: self._found.append((weight, gradient())))

    def close(self) -> None:
        """Let the current stream wait for the gradients."""
        self._open = False
        self._executor.join()

    def deliver(self) -> None:
        """Do with the gradients as autograd does: each becomes its weight's, or is added to what that has."""
        weights, gradients = [weight for weight, _ in self._found], [gradient for _, gradient in self._found]
        if not all(_alike(gradient, weight) for weight, gradient in self._found):
            copies = [torch.empty_like(weight, requires_grad=False) for weight in weights]
            torch._foreach_copy_(copies, gradients)
            gradients = copies
        self._found.clear()
        sums: dict[Tensor, Tensor] = {}
        for weight, gradient in zip(weights, gradients, strict=True):
            sums[weight] = gradient if weight not in sums else sums[weight] + gradient
        for weight, gradient in sums.items():
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


_current: ContextVar[Pass | None] = ContextVar("_current", default=None)


def current() -> Pass | None:
    """Return the pass that :func:`overlapped` has begun in this thread, if any."""
    return _current.get()


@contextmanager
def within(value: Pass | None) -> Iterator[None]:
    """Let a computation that is being repeated, maybe in another thread, belong to the pass that it ran in first."""
    token = _current.set(value)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def overlapped(weights: Iterable[nn.Parameter], executor: Executor) -> Iterator[Pass]:
    """Let an executor compute what a backward pass finds of the gradients of convolutions' weights.

    Forward and backward pass are within the context. The gradients are there when it ends, as those of autograd. They
    are of :func:`conv2d` with those of ``weights`` that are float32 and have no hooks, which autograd would call.
    Every backward pass in the context leaves them, also one that ``torch.autograd.grad`` runs for another tensor.
    """
    begun = Pass(weights, executor)
    try:
        with within(begun):
            yield begun
    except BaseException:
        # The streams of a capture that failed take nothing more; what failed first is to be known.
        with suppress(RuntimeError):
            begun.close()
        raise
    begun.close()
    begun.deliver()


def is_overlapped(weight: Tensor) -> bool:
    """Return whether the gradient of :func:`conv2d` for a weight would be computed beside the backward pass."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    begun = _current.get()
    return begun is not None and weight in begun


def conv2d(x: Tensor, weight: nn.Parameter, stride: int | tuple[int, int] = 1, padding: int = 0) -> Tensor:
    """Return torch's convolution of x [N, C, H, W] with a weight [K, C, kernel height, kernel width], also in autocast.

    The gradient of the weight is computed beside the backward pass if :func:`is_overlapped`. Else this is ``F.conv2d``.
    """
    if not is_overlapped(weight):
        return F.conv2d(x, weight, stride=stride, padding=padding)
    begun, kind, dtype = _current.get(), x.device.type, weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
    return _Convolution.apply(x, weight, begun.converted(weight, dtype), stride, padding, begun)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        converted: Tensor,
        stride: int | tuple[int, int],
        padding: int,
        begun: Pass,
    ) -> Tensor:
        ctx.weight, ctx.begun = weight, begun
        ctx.sizes = [stride] * 2 if isinstance(stride, int) else stride, [padding] * 2, [1, 1], False, [0, 0], 1
        ctx.save_for_backward(x, converted)
        return F.conv2d(x, converted, stride=stride, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, converted = ctx.saved_tensors
        sizes = ctx.sizes

        @torch.no_grad()
        def gradients(of_x: bool, of_weight: bool) -> tuple[Tensor | None, ...]:
            wanted = [of_x, of_weight, False]
            return torch.ops.aten.convolution_backward(gradient, x, converted, None, *sizes, wanted)

        grad_x = gradients(True, False)[0] if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            # Behind the input gradient, with which it would compete, beside the kernels that follow.
            ctx.begun.submit(ctx.weight, lambda: gradients(False, True)[1])
        return grad_x, None, None, None, None, None


def _alike(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors of one shape have one dtype and one order in memory, as fused optimisers need."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.dtype == b.dtype and all(size == 1 or of_a == of_b for size, of_a, of_b in strides)


def _takes(weight: nn.Parameter) -> bool:
    hooked = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return weight.dtype == torch.float32 and not hooked
