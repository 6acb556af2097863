"""A network whose steps are replays of CUDA graphs, and whether they are the steps."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import ROUNDING_LIMITS, Difference, relative_rms, worst
from benchmarks.contender import Contender
from benchmarks.implementations import Implementation
from benchmarks.network_size import NetworkSize
from gac.execution.cuda_graph import WARM_UP_CALLS, CaptureOnDevice, Replayed
from gac.execution.device import DTYPES

BATCH = 2
# Fewer images have larger gradients than a batch that is trained on: from 65,536 the first steps would overflow.
LOSS_SCALE = 128.0
# A weight's own rounding hides the last digits of its change. A step that is not taken is off by 1.
CHANGE_LIMIT = 0.05


class ReplayedContender(Contender):
    """A contender whose steps are replayed as :class:`gac.execution.cuda_graph.Replayed` does it for train.cuda_graph.

    The first step of a turn warms up, captures and replays; those that follow replay.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._replayed: dict[str, Replayed] = {}

    def train_step(self) -> Tensor:
        """Train on the batch and return its loss, which the next step overwrites."""
        return self._replay("train_step", super().train_step)

    def eval_step(self) -> Tensor:
        """Return the logits of the batch, which the next step overwrites."""
        return self._replay("eval_step", super().eval_step)

    def rest(self) -> None:
        """Free what the last step left behind, and the graphs with their memory."""
        if self._device.type == "cuda":
            # The last replay may not have ended.
            torch.cuda.synchronize(self._device)
        self._replayed.clear()
        super().rest()

    def _replay(self, name: str, step: Callable[[], Tensor]) -> Tensor:
        if name not in self._replayed:
            self._replayed[name] = Replayed(step, CaptureOnDevice(self._device))
            for _ in range(WARM_UP_CALLS):
                self._replayed[name]()
        return self._replayed[name]()


def compare_replayed(
    implementation: Implementation,
    size: NetworkSize,
    T: int,
    precision: str,
    layout: str,
    weights: Mapping[str, Tensor],
    device: torch.device,
) -> list[Difference]:
    """Compare replayed steps with called ones, from weights that their capture has not seen.

    One network trains and evaluates a batch of 2 random images. Loss, gradients, the change of the weights, running
    statistics and logits should be equal to the bit; the limits are those of rounding all the same, in case that a
    library chooses another algorithm while it is captured.
    """
    contender = ReplayedContender(implementation, size, T, BATCH, precision, layout, weights, device)
    contender.scaler.load_state_dict({**contender.scaler.state_dict(), "scale": LOSS_SCALE})
    train_step, eval_step = partial(Contender.train_step, contender), partial(Contender.eval_step, contender)
    with _deterministic_convolutions():
        contender.train_step()
        _move_weights(contender)
        replayed, called = _outcomes(contender, contender.train_step, train_step)
        contender.rest()
        contender.start_evaluation()
        contender.eval_step()
        _move_weights(contender)
        replayed["logits"], called["logits"] = [contender.eval_step()], [eval_step()]
    limits = {name: ROUNDING_LIMITS[DTYPES.get(precision, torch.float32)] for name in called}
    limits["weights' change"] = CHANGE_LIMIT
    return [
        Difference(
            f"replayed: {name}",
            worst(relative_rms(got.double(), wanted) for got, wanted in zip(replayed[name], called[name], strict=True)),
            limit,
        )
        for name, limit in limits.items()
    ]


@torch.no_grad()
def _move_weights(contender: Contender) -> None:
    for parameter in contender.network.parameters():
        parameter *= 1 + 0.1 * torch.rand_like(parameter)


def _outcomes(contender: Contender, *steps: Callable[[], Tensor]) -> list[dict[str, list[Tensor]]]:
    """Return what each of these training steps does from one and the same state."""
    parameters, buffers = list(contender.network.parameters()), list(contender.network.buffers())
    momenta = [contender.optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    state = [*parameters, *buffers, *momenta]
    before = [tensor.detach().clone() for tensor in state]
    outcomes = []
    for step in steps:
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        loss = step()
        outcomes.append(
            {
                "loss": [loss.double()],
                "gradients": [parameter.grad.double() for parameter in parameters],
                "weights' change": [
                    now.detach().double() - then for now, then in zip(parameters, before, strict=False)
                ],
                "running statistics": [buffer.double() for buffer in buffers],
            }
        )
    return outcomes


@contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    # A sum in another order changes a spike, and a changed spike the rest of the network.
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
