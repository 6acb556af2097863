"""What a CUDA graph does, on the CPU: operations recorded once and repeated, with no Python between them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CaptureByRecording:
    """Stands for :class:`gac.execution.cuda_graph.CaptureOnDevice`: replays repeat operations on the same tensors.

    As in a graph, numbers of the host are those of the recording, and reading a tensor on the host is an error. As
    graphs share their memory, everything that any of the functions made is garbage (NaN, -1) when a replay begins. The
    recording itself runs the function once; the first replay does no more than return its result.

    Attributes:
        captured: Functions recorded so far.
        replays: Replays so far.
    """

    def __init__(self) -> None:
        self.captured = 0
        self.replays = 0
        self._recordings: list[_Recording] = []

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """See :class:`gac.execution.cuda_graph.Capture`."""
        return function()

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.captured += 1
        recording = _Recording()
        with recording:
            result = function()
        self._recordings.append(recording)
        done = False

        def replay() -> Any:
            nonlocal done
            self.replays += 1
            if done:
                for each in self._recordings:
                    each.spoil()
                recording.repeat()
            done = True
            return result

        return replay


class _Recording(TorchDispatchMode):
    """The operations that run while it is entered, with the tensors that they took and made."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable, tuple, dict[str, Any], list[tuple[int, Tensor]]]] = []
        # By their memory.
        self._constants: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, operation: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        taken = {_memory(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        # What the host makes a tensor of, as torch.tensor(1.0) does, was never on the device.
        of_host = operation is torch.ops.aten.lift_fresh.default or (taken and taken <= self._constants.keys())
        if operation is torch.ops.aten._local_scalar_dense.default and not of_host:
            raise RuntimeError("a value cannot be read on the host while a graph is captured")
        returned = operation(*args, **kwargs)
        tensors = [(place, each) for place, each in enumerate(tree_leaves(returned)) if isinstance(each, Tensor)]
        if of_host:
            self._constants.update((_memory(each), each) for _, each in tensors)
        else:
            # Views and what was written in place lie in memory that the operation took.
            made = [(place, each) for place, each in tensors if _memory(each) not in taken]
            self._calls.append((operation, args, kwargs, made))
        return returned

    def spoil(self) -> None:
        for *_, made in self._calls:
            for _, tensor in made:
                tensor.untyped_storage().fill_(255)

    def repeat(self) -> None:
        # In which tensors may be written whether they were made in it or not.
        with torch.inference_mode():
            for operation, args, kwargs, made in self._calls:
                returned = tree_leaves(operation(*args, **kwargs))
                for place, tensor in made:
                    tensor.copy_(returned[place])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
