"""Resetting the neurons of a network at every call: what SpikingJelly's functions do, in a fraction of the time."""

from collections.abc import Iterable

import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.neuron.base_node import BaseNode
from torch import Tensor, nn


def collect(net: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules of ``net`` that have a ``reset``, as ``functional.collect_reset_modules`` does."""
    # A compiler makes constants of what it finds, and knows nn.Module.modules.
    if torch.compiler.is_compiling():
        return functional.collect_reset_modules(net)
    found, seen, remaining = [], set(), [net]
    while remaining:
        module = remaining.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        members = module.__dict__
        children = members["_modules"]
        remaining.extend(children.values())
        kind = type(module)
        # Asking a module of torch for what it does not have raises and catches an error each time.
        if (
            hasattr(kind, "reset")
            or "reset" in members
            or "reset" in children
            or kind.__getattr__ is not nn.Module.__getattr__
        ) and callable(getattr(module, "reset", None)):
            found.append(module)
    return tuple(found)


def reset(modules: Iterable[nn.Module]) -> None:
    """Reset the modules, as ``functional.reset_collected_modules`` does, but for those that are reset already."""
    if not torch.compiler.is_compiling():
        modules = tuple(module for module in modules if not _is_reset(module))
    functional.reset_collected_modules(modules)


def _is_reset(module: nn.Module) -> bool:
    members = module.__dict__
    if type(module).reset is not BaseNode.reset or "reset" in members or members.get("v_seq", module) is not None:
        return False
    start = members["_memories_rv"]
    return all(value is start[name] and not isinstance(value, Tensor) for name, value in members["_memories"].items())
