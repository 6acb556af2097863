"""Batches that are copied to a device, or made on it, while it computes."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound=tuple)


def copy_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches, named tuples, with their tensors on ``device``.

    On a CUDA device the next batch is copied while the work on the current one is queued or running: from pinned
    memory, on a separate stream, without blocking the host. So two batches are on the device at a time, and each is
    taken from ``batches`` before the previous one is yielded.
    """
    if device.type == "cpu":
        yield from batches
        return
    if device.type != "cuda":
        for batch in batches:
            yield _on(device, batch)
        return
    stream = torch.cuda.Stream(device)
    present = None
    for batch in batches:
        following = _Copy(batch, stream)
        if present is not None:
            yield present.take()
        present = following
    if present is not None:
        yield present.take()


def make_beside(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches, tuples of tensors on ``device``, that ``batches`` makes on a separate stream.

    On a CUDA device some transforms (torchvision's affine ones) wait for the work queued on their stream. On
    the computation's stream that would be the training step on the previous batch.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    remaining = iter(batches)
    while True:
        with torch.cuda.stream(stream):
            batch = next(remaining, None)
        if batch is None:
            return
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in batch:
            tensor.record_stream(current)
        yield batch


def _on(device: torch.device, batch: Batch, non_blocking: bool = False) -> Batch:
    return batch._make(
        item.to(device, non_blocking=non_blocking) if isinstance(item, Tensor) else item for item in batch
    )


class _Copy:
    """A batch that is being copied to the device of ``stream``."""

    def __init__(self, batch: tuple, stream: torch.cuda.Stream) -> None:
        self._device = stream.device
        with torch.cuda.stream(stream):
            self._batch = _on(self._device, batch, non_blocking=True)
            self._done = stream.record_event()

    def take(self) -> tuple:
        """Make the current stream wait for the copy, and return the batch."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._done)
        for item in self._batch:
            if isinstance(item, Tensor):
                # Its memory belongs to the copying stream, which must not reuse it before the current one is done.
                item.record_stream(current)
        return self._batch
