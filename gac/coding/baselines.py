"""The codings that the paper compares its own with, from SpikingJelly's encoders."""

import torch
from spikingjelly.activation_based import base, encoding
from torch import Tensor, nn

from gac.errors import InputError

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
        if coding == "latency" and T < 2:
            raise InputError("latency coding needs T >= 2: in one time step every pixel would spike")
        self.coding = coding
        self.T = T

    def extra_repr(self) -> str:
        return f"coding={self.coding}, T={self.T}"

    def forward(self, images: Tensor) -> Tensor:
        low, high = torch.aminmax(images)
        if low < 0 or high > 1:
            raise InputError(
                f"{self.coding} coding takes intensities in [0, 1], got [{low.item():.3g}, {high.item():.3g}]: "
                "give it images that are not standardised"
            )
        if self.coding == "phase":
            images = images * (1 - 2.0**-self.T)
        # An encoder keeps the spike train of its call: each call has its own.
        encoder = _ENCODERS[self.coding](self.T, step_mode="m")
        return encoder(images.expand(self.T, *images.shape)).to(images.dtype)
