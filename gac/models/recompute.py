"""Activation checkpointing: activations are computed again in the backward pass instead of being kept for it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gac.ops import overlap
from gac.ops.watchers import watched, watched_as_before


def recomputed(function: Callable[..., Any], modules: Sequence[nn.Module], *inputs: Tensor) -> Any:
    """Return ``function(*inputs)``, which runs ``modules``, and keep only the inputs for the backward pass.

    The second computation yields gradients and has no other effect: it begins with the neuron states and the modes
    (training or evaluation) that the first one began with, and restores the states and buffers (BatchNorm's running
    statistics) that the first one left, and the modes. Hooks on inner modules are called both times. The function must
    not draw random numbers.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    again = _WithoutTrace(modules, watched(inputs[0]))
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        # No random numbers are drawn, and a CUDA graph could not capture reading the generator's state.
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), again),
    )


class _WithoutTrace:
    """A context that repeats the modules' computation from the states they had when it was made, without a trace."""

    def __init__(self, modules: Sequence[nn.Module], is_watched: bool) -> None:
        self._is_watched = is_watched
        self._pass = overlap.current()
        self._modules = nn.ModuleList(modules)
        self._buffers = list(self._modules.buffers())
        self._states_before = base.extract_memories(self._modules)
        self._modes_before = self._modes()

    def _modes(self) -> list[bool]:
        return [module.training for module in self._modules.modules()]

    def _set_modes(self, modes: list[bool]) -> None:
        for module, training in zip(self._modules.modules(), modes, strict=True):
            module.training = training

    def __enter__(self) -> None:
        self._kept_buffers = [buffer.clone() for buffer in self._buffers]
        self._kept_states = base.extract_memories(self._modules)
        base.load_memories(self._modules, self._states_before)
        self._kept_modes = self._modes()
        self._set_modes(self._modes_before)
        self._as_before = ExitStack()
        self._as_before.enter_context(watched_as_before(self._is_watched))
        self._as_before.enter_context(overlap.within(self._pass))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._as_before.__exit__(kind, error, traceback)
        base.load_memories(self._modules, self._kept_states)
        self._set_modes(self._kept_modes)
        with torch.no_grad():
            for buffer, kept in zip(self._buffers, self._kept_buffers, strict=True):
                buffer.copy_(kept)
        del self._kept_buffers, self._kept_states, self._kept_modes
