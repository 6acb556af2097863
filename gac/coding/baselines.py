"""The codings that the paper compares its own with, from SpikingJelly's encoders."""

import warnings

import torch
from spikingjelly.activation_based import base, encoding
from torch import Tensor, nn

from gac.errors import InputError, check_size
from gac.ops.watchers import refuse_symbolic, watched

_ENCODERS = {
    "rate": lambda T, step_mode: encoding.PoissonEncoder(step_mode),
    "latency": encoding.LatencyEncoder,
    "phase": encoding.WeightedPhaseEncoder,
}


class BaselineCoding(nn.Module, base.MultiStepModule):
    """Turn an image into a spike train of T time steps with one of SpikingJelly's encoders.

    rate: Poisson, a pixel of intensity p spikes with probability p at each step. latency: one spike per pixel, the
    earlier the brighter (linear). phase: weighted phase, the first T binary digits of the intensity times
    1 - 2^-T (the encoder's range ends there); the spikes are passed on as 0 and 1 without their weights.

    Input: images [B, C, H, W] with intensities in [0, 1] (not standardised), which every call checks: on a GPU the
    host waits for the result. Output: [T, B, C, H, W] of 0 and 1.

    Raises:
        InputError: For an unknown coding and latency with T = 1; in forward for intensities outside [0, 1].
    """

    def __init__(self, coding: str, T: int) -> None:
        super().__init__()
        self.step_mode = "m"
        if coding not in _ENCODERS:
            raise InputError(f"coding must be one of {', '.join(_ENCODERS)}, got {coding!r}")
        self.coding = coding
        self.T = T

    @property
    def T(self) -> int:
        """Number of time steps, at least 2 for latency coding."""
        return self.__dict__["T"]

    @T.setter
    def T(self, value: int) -> None:
        value = check_size("T", value)
        if self.coding == "latency" and value < 2:
            raise InputError("latency coding needs T >= 2: in one time step every pixel would spike")
        self.__dict__["T"] = value

    def extra_repr(self) -> str:
        return f"coding={self.coding}, T={self.T}"

    def forward(self, images: Tensor) -> Tensor:
        refuse_symbolic(images)
        if self.coding == "phase" and torch.compiler.is_exporting():
            raise InputError(
                "phase coding cannot be exported: SpikingJelly's encoder reads values on the host; use torch.jit.trace"
            )
        low, high = torch.aminmax(images)
        # Of NaN neither is true.
        inside = (low >= 0) & (high <= 1)
        if torch.compiler.is_compiling() or watched(images):
            # As an operation: what a recording is run on later has to be checked too.
            if torch.jit.is_tracing():
                warnings.warn("torch.jit.trace drops the check that intensities lie in [0, 1]", stacklevel=2)
            torch._assert_async(inside, f"{self.coding} coding takes intensities in [0, 1]")
        elif not inside:
            raise InputError(
                f"{self.coding} coding takes intensities in [0, 1], got [{low.item():.3g}, {high.item():.3g}]: "
                "give it images that are not standardised"
            )
        if self.coding == "phase":
            images = images * (1 - 2.0**-self.T)
        # An encoder keeps the spike train of its call: each call has its own.
        encoder = _ENCODERS[self.coding](self.T, step_mode="m")
        return encoder(images.expand(self.T, *images.shape)).to(images.dtype)
