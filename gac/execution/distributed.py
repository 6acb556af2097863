"""The processes of a run: torchrun starts one per device; without torchrun there is one."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import nn

from gac.config import Config
from gac.data.interface import Shard
from gac.errors import InputError

Result = TypeVar("Result")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another one, when it starts or in a step, before it gives up."""
PATIENCE = timedelta(days=1)
"""The same while one process downloads, converts or reports for all of them, which may take hours."""


class LostConnection(RuntimeError):
    """A collective failed because another process did not take part in it."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Methods are collective: every rank must call them, in the same order. In a run of one process they cost nothing.
    Raises LostConnection if another process has ended or hangs.

    Args:
        rank: Number of this process in the run, from 0.
        size: Number of processes.
        local_rank: Number of this process on its machine, from 0.
        launched: Whether torchrun started it, even as the only process.
        patient: The group of all processes in which they wait for PATIENCE.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launched: bool = False
    patient: torch.distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and shows progress."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This rank's part of every batch."""
        return Shard(self.rank, self.size)

    def largest(self, *values: float) -> list[float]:
        """Return the largest of each value over the ranks, without waiting for a device."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with collective():
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    def sum(self, *counts: int) -> list[int]:
        """Return the sum of each count over the ranks."""
        return [sum(each) for each in zip(*self.gather(counts), strict=True)]

    def gather(self, value: Result, patient: bool = False) -> list[Result]:
        """Return the ``value`` of every rank, in the ranks' order, for which the others are ``patient`` or not."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        with collective():
            torch.distributed.all_gather_object(values, value, group=self.patient if patient else None)
        return values

    def together(self, function: Callable[[], Result], in_turn: bool = False) -> Result:
        """Return ``function()``, which calls no collective itself; an InputError on one rank ends all of them.

        Only rank 0 raises it, so that it is reported once; the others exit with status 2. With ``in_turn`` rank 0 goes
        first, then the first rank of each machine, then all others: what one downloads, the next finds.
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
            self._end_if_any(self.gather(message, patient=in_turn))
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

    def on_main(self, function: Callable[[], Result], patient: bool = False) -> Result:
        """Call ``function()`` on rank 0 only, and return its result on every rank; all are ``patient`` or not.

        If it raises an exception, the other ranks exit: with status 2 for an InputError, else with 1.
        """
        if self.size == 1:
            return function()
        result, status = None, 0
        if self.is_main:
            try:
                result = function()
            except Exception as error:
                self._broadcast(patient, None, 2 if isinstance(error, InputError) else 1)
                raise
        result, status = self._broadcast(patient, result, status)
        if status:
            raise SystemExit(status)
        return result

    def _broadcast(self, patient: bool, *values: object) -> list:
        values = list(values)
        with collective():
            torch.distributed.broadcast_object_list(values, src=0, group=self.patient if patient else None)
        return values

    @torch.no_grad()
    def broadcast_buffers(self, network: nn.Module) -> None:
        """Give ``network`` the buffers of rank 0, which are BatchNorm's running statistics."""
        if self.size > 1:
            with collective():
                for buffer in network.buffers():
                    torch.distributed.broadcast(buffer, src=0)


SINGLE_PROCESS = Ranks()
"""The only process of a run."""


@contextmanager
def collective() -> Iterator[None]:
    """Raise LostConnection in place of the error with which Gloo ends a collective in the block.

    Gloo has no exception type of its own, so that any plain RuntimeError counts as its error. NCCL raises DistError.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
        raise LostConnection(str(error)) from error


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process did not take part in it."""
    return isinstance(error, LostConnection | torch.distributed.DistError)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the other processes that torchrun started, for as long as the context is open.

    A single process joins nothing. Tensors on the CPU go through Gloo, those on CUDA devices through NCCL. Raises
    InputError for several processes that torchrun did not start, and for a torchrun that could not restart them.
    """
    ranks = _from_environment()
    if ranks.size == 1:
        yield ranks
        return
    _check_restarts()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=TIMEOUT)
    yield replace(ranks, patient=torch.distributed.new_group(timeout=PATIENCE, backend="gloo"))
    # Not after an error: the others would fail while this process is still ending, and torchrun could take one of them
    # for the cause. The end of the process leaves the group too.
    torch.distributed.destroy_process_group()


# Where other launchers tell each process their number. Slurm's SLURM_NTASKS is in the environment of a batch script as
# well, which is a single process.
_OTHER_LAUNCHERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}


def _from_environment() -> Ranks:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if missing := [name for name in names if name not in os.environ]:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} missing in the environment:"
                " start several processes with torchrun, which sets all of them, or a single one without WORLD_SIZE"
            )
        for launcher, tasks in _OTHER_LAUNCHERS.items():
            if "WORLD_SIZE" not in os.environ and int(os.environ.get(tasks, 1)) > 1:
                raise InputError(
                    f"{launcher} started {os.environ[tasks]} processes that do not know each other ({tasks}, and no"
                    " RANK in the environment): let it start one torchrun on each machine, which starts the processes"
                    " there (docs/training.md), or set WORLD_SIZE=1 if each is to run by itself"
                )
        return SINGLE_PROCESS
    return Ranks(*(int(os.environ[name]) for name in names), launched=True)


def _check_restarts() -> None:
    # Restarted processes would find the addresses of their predecessors in the store that torchrun shares with them,
    # and wait for those in vain: https://github.com/pytorch/pytorch/issues/135712
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise InputError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment, or restarted"
            " processes may look for those that have ended: set it, or leave --max-restarts out"
        )


# The fields that may differ between the processes of a run.
_OWN_OF_EACH_RANK = ("data.root", "data.workers")


def shared_fields(config: Config) -> dict[str, object]:
    """Return the fields of the configuration, by their full names, that must be the same on all ranks."""
    return {name: value for name, value in config.flat().items() if name not in _OWN_OF_EACH_RANK}
