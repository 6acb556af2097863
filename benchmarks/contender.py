"""A network in training, as every benchmark runs it."""

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor

from benchmarks.implementations import LAYOUTS, Implementation
from benchmarks.network_size import NetworkSize
from gac.execution.device import autocast

PRECISIONS = ("fp32", "fp16", "bf16")
"""float32, and autocast to half precision."""


class Workload(Protocol):
    """What is timed: the steps of a :class:`Contender` or of something to compare it with."""

    def train_step(self) -> object:
        """Do the work of a training step."""

    def start_evaluation(self) -> None:
        """Change from training to evaluation."""

    def eval_step(self) -> object:
        """Do the work of an evaluation step."""

    def rest(self) -> None:
        """Free what the last step left behind."""

    def diverged(self) -> bool:
        """Return whether the training steps led to nonsense, which may run at another speed."""


class Contender:
    """A network with what it needs to be trained, on random images and labels."""

    def __init__(
        self,
        implementation: Implementation,
        size: NetworkSize,
        T: int,
        batch: int,
        precision: str,
        layout: str,
        weights: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        network = implementation.build(size, T)
        network.load_state_dict(implementation.translate(weights))
        self.network = network.to(device, memory_format=LAYOUTS[layout])
        shape = (batch, 3, size.image_size, size.image_size)
        self.images = torch.randn(shape, device=device).contiguous(memory_format=LAYOUTS[layout])
        self.labels = torch.randint(size.num_classes, (batch,), device=device)
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-5, fused=device.type == "cuda"
        )
        for parameter in network.parameters():
            # See gac/training/optim.py: a first step that overflows would leave them uninitialised.
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._loss: Tensor | None = None
        self._time_dimension = 1 if implementation.batch_first else 0
        self._device = device
        self._amp = "off" if precision == "fp32" else precision

    def train_step(self) -> Tensor:
        """Train on the batch and return its loss."""
        self.optimizer.zero_grad()
        with autocast(self._device, self._amp):
            logits = self.network(self.images)
            loss = F.cross_entropy(logits.float().mean(self._time_dimension), self.labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._loss = loss.detach()
        return self._loss

    def start_evaluation(self) -> None:
        """Let BatchNorm use its running statistics."""
        self.network.eval()

    def diverged(self) -> bool:
        """Return whether the last training step's loss is not finite."""
        return self._loss is not None and not self._loss.isfinite().item()

    def rest(self) -> None:
        """Free what the last step left behind: gradients, and membrane potentials that hold a graph."""
        self.optimizer.zero_grad()
        functional.reset_net(self.network)

    @torch.inference_mode()
    def eval_step(self) -> Tensor:
        """Return the logits of the batch."""
        with autocast(self._device, self._amp):
            return self.network(self.images)
