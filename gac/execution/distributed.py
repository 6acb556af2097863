"""The processes of a run: torchrun starts one for each device, and without it there is one."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gac.config import Config
from gac.data.interface import Shard
from gac.errors import InputError

Result = TypeVar("Result")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another one, to begin with or in a step, before it gives up."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them; what one process has to say to the others goes through here.

    Methods are collective: every rank must call them, in the same order. In a run of one process they cost nothing.

    Args:
        rank: Number of this process in the run, from 0.
        size: Number of processes.
        local_rank: Number of this process on its machine, from 0.
        launched: Whether torchrun started it, be it alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launched: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and shows progress."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This rank's part of every batch."""
        return Shard(self.rank, self.size)

    def largest(self, *values: float) -> list[float]:
        """Return the largest of each value over the ranks; the host alone is involved."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: Result) -> list[Result]:
        """Return the ``value`` of every rank, in the ranks' order."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def together(self, function: Callable[[], Result], in_turn: bool = False) -> Result:
        """Return ``function()``, which itself calls no collective; an InputError of one rank ends all of them.

        Rank 0 raises it, so that it is said once; the others exit with status 2. With ``in_turn`` rank 0 goes first,
        then the first rank of each machine, then all others: what one downloads, the next finds.
        """
        if self.size == 1:
            return function()
        turn = (self.rank > 0) + (self.local_rank > 0) if in_turn else 0
        for now in range(3 if in_turn else 1):
            message = None
            if now == turn:
                try:
                    result = function()
                except InputError as error:
                    message = str(error)
            self._end_if_any(self.gather(message))
        return result

    def check_equal(self, values: Mapping[str, object]) -> None:
        """Raise InputError, as :meth:`together` does, unless every rank has the same ``values``."""
        expected, *others = self.gather(values)
        differing = (
            f"rank {rank} has {name} {found[name]} and rank 0 {expected[name]}: start all processes with the same"
            " options, on the same data"
            for rank, found in enumerate(others, 1)
            for name in expected
            if found[name] != expected[name]
        )
        self._end_if_any([next(differing, None)])

    def _end_if_any(self, messages: list[str | None]) -> None:
        failed = {rank: message for rank, message in enumerate(messages) if message is not None}
        if not failed:
            return
        if not self.is_main:
            raise SystemExit(2)
        rank, message = next(iter(failed.items()))
        raise InputError(message if rank == 0 else f"rank {rank}: {message}")

    def from_first(self, function: Callable[[], Result]) -> Result:
        """Return what ``function()`` returns on rank 0, the only one to call it.

        If it raises an exception there, the other ranks exit: with status 2 for an InputError, else with 1.
        """
        if self.size == 1:
            return function()
        result, status = None, 0
        if self.is_main:
            try:
                result = function()
            except Exception as error:
                self._broadcast(None, 2 if isinstance(error, InputError) else 1)
                raise
        result, status = self._broadcast(result, status)
        if status:
            raise SystemExit(status)
        return result

    def _broadcast(self, *values: object) -> list:
        values = list(values)
        torch.distributed.broadcast_object_list(values, src=0)
        return values

    def parallel(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Return what to call instead of ``network`` for its gradients to be the ranks' mean; ``network`` if alone."""
        if self.size == 1:
            return network
        with warnings.catch_warnings():
            # Older versions of PyTorch do not know the new name of broadcast_buffers.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(
                network,
                device_ids=[device] if device.type == "cuda" else None,
                # Training reads none of the buffers: before they are read, first_buffers copies them.
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    @torch.no_grad()
    def first_buffers(self, network: nn.Module) -> None:
        """Give ``network`` rank 0's buffers, which are BatchNorm's running statistics."""
        if self.size > 1:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def mix(self, mixing: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and targets after ``mixing`` of each image of the batch of all ranks with the one before it.

        Args:
            mixing: torchvision's CutMix or MixUp, whose draws depend on the image size alone: all ranks draw the same.
            images: This rank's part of the batch, [B, C, H, W].
            labels: Its labels, int64 [B].
        """
        if self.size == 1:
            return mixing(images, labels)
        images = torch.cat((self._from_previous(images[-1:]), images))
        labels = torch.cat((self._from_previous(labels[-1:]), labels))
        images, targets = mixing(images, labels)
        return images[1:], targets[1:]

    def _from_previous(self, tensor: Tensor) -> Tensor:
        tensors = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(tensors, tensor.contiguous())
        return tensors[self.rank - 1]


SINGLE_PROCESS = Ranks()
"""A run's only process."""


def without_synchronization(network: nn.Module) -> AbstractContextManager:
    """Return a context in which a forward and a backward pass only add to this rank's gradients."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed as another process did not take part in it."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the other processes that torchrun started, for as long as the context is open.

    A single process joins nothing. Tensors on the CPU go through Gloo, those on CUDA devices through NCCL. Raises
    InputError for several processes that something else than torchrun has started, and for a torchrun that could not
    restart them.
    """
    ranks = _from_environment()
    if ranks.size == 1:
        yield ranks
        return
    _check_restarts()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=TIMEOUT)
    yield ranks
    # After an error the end of the process does that. Were it done before, the others would fail for want of this one
    # while it still ends, and torchrun could take one of them for the cause.
    torch.distributed.destroy_process_group()


def _from_environment() -> Ranks:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if missing := [name for name in names if name not in os.environ]:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} missing in the environment:"
                " start several processes with torchrun, which sets all of them, or a single one without WORLD_SIZE"
            )
        return SINGLE_PROCESS
    return Ranks(*(int(os.environ[name]) for name in names), launched=True)


def _check_restarts() -> None:
    # Restarted processes would find the addresses of those before them in the store that torchrun shares with them, and
    # wait for them in vain: https://github.com/pytorch/pytorch/issues/135712
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise InputError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment, or restarted"
            " processes may look for those that have ended: set it, or leave --max-restarts out"
        )


# What each process of a run may have its own of; everything else must be the same.
_OWN_OF_EACH_RANK = ("data.root", "data.workers")


def shared_fields(config: Config) -> dict[str, object]:
    """Return the configuration's fields, by their full names, that all ranks of a run must have alike."""
    return {name: value for name, value in config.flat().items() if name not in _OWN_OF_EACH_RANK}
