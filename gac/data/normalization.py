"""Normalisation of stored bytes to what a network sees, and the statistics for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 4096  # images; bounds the temporary copy of one channel


class Normalization:
    """uint8 [..., C, H, W] -> float32 (pixels / 255 - mean) / std.

    The operations and their order are those of torchvision's ToTensor and Normalize, so the results are equal
    bit for bit. ``mean`` and ``std`` have one number per channel, in units where white is 1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images [..., C, H, W], in units where white is 1.

    Computed from the histogram of the 256 values: exact counts, no rounding that depends on the order.
    """
    histogram = torch.zeros(images.shape[-3], 256, dtype=torch.int64)
    for chunk in images.flatten(0, -4).split(_CHUNK):
        for channel, counts in enumerate(histogram):
            counts += torch.bincount(chunk[:, channel].reshape(-1), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    share = histogram / histogram.sum(dim=1, keepdim=True, dtype=torch.float64)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(dim=1)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())
