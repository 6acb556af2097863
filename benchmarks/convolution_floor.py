"""The floor under a training step: the residual blocks' convolutions and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.implementations import LAYOUTS, REFERENCE
from benchmarks.network_size import NetworkSize
from benchmarks.recording import record_inputs
from gac.execution.device import DTYPES

FLOOR = "convolution-floor"
"""Its name beside those of the implementations."""


@dataclass(frozen=True)
class _Convolution:
    input: Tensor
    weight: Tensor
    grad_output: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def forward(self) -> Tensor:
        return F.conv2d(self.input, self.weight, None, self.stride, self.padding)

    def backward(self) -> tuple[Tensor | None, ...]:
        """Return the data gradient and the weight gradient."""
        call = (self.stride, self.padding, (1, 1), False, (0, 0), 1, (True, True, False))
        return torch.ops.aten.convolution_backward(self.grad_output, self.input, self.weight, None, *call)


class ConvolutionFloor:
    """The convolutions of all residual blocks on T x B frames, weights already in the precision's dtype.

    A training step is the forward pass, the data gradient and the weight gradient of each; the first block's data
    gradient counts, since the gate before it is trained. Every convolution gets what it gets in the network from two
    random images, repeated for the batch: spikes cost less power than noise, which limits the clock of a GPU.
    """

    def __init__(
        self,
        size: NetworkSize,
        T: int,
        batch: int,
        precision: str,
        layout: str,
        weights: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        network = REFERENCE.build(size, T)
        network.load_state_dict(weights)
        self._modules = [module for module in network.stages.modules() if isinstance(module, nn.Conv2d)]
        self._inputs = record_inputs(network, self._modules, size.image_size)
        self._T, self._batch, self._layout = T, batch, LAYOUTS[layout]
        self._place = {"device": device, "dtype": DTYPES.get(precision, torch.float32)}

    @cached_property
    def _convolutions(self) -> list[_Convolution]:
        """The convolutions with their tensors on the device, made when a turn begins."""
        T, batch, place = self._T, self._batch, self._place
        grad_outputs: dict[torch.Size, Tensor] = {}
        convolutions = []
        for module, frames in zip(self._modules, self._inputs, strict=True):
            x = frames.to(**place).repeat(batch, 1, 1, 1)[: T * batch].contiguous(memory_format=self._layout)
            weight = module.weight.detach().to(**place, memory_format=self._layout)
            shape = F.conv2d(x[:1], weight, None, module.stride, module.padding).shape
            shape = torch.Size((len(x), *shape[1:]))
            if shape not in grad_outputs:
                # Shared by convolutions with equal outputs: they are read, never written.
                grad_outputs[shape] = torch.randn(shape, **place).contiguous(memory_format=self._layout)
            convolutions.append(_Convolution(x, weight, grad_outputs[shape], module.stride, module.padding))
        return convolutions

    @torch.inference_mode()
    def train_step(self) -> None:
        """Run every convolution forward, then both gradients of each, last first."""
        for convolution in self._convolutions:
            convolution.forward()
        for convolution in reversed(self._convolutions):
            convolution.backward()

    @torch.inference_mode()
    def eval_step(self) -> None:
        """Run every convolution forward."""
        for convolution in self._convolutions:
            convolution.forward()

    def start_evaluation(self) -> None:
        """Nothing differs."""

    def rest(self) -> None:
        """Free the convolutions' tensors, which the implementations that take their turns now may need."""
        self.__dict__.pop("_convolutions", None)

    def diverged(self) -> bool:
        """Return False: nothing is learned."""
        return False
