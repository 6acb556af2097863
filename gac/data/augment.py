"""Random crop and horizontal flip of a whole batch, each image with its own offset and coin."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Cut a window of the original size out of every image's black-padded copy, then mirror it where asked.

    Shapes: images [B, C, H, W]; top and left int64 [B], the window's corner in the padded image, in [0, 2 *
    padding]; flip bool [B]; the result has the shape and dtype of images. Equal to torchvision's
    ``hflip(crop(pad(image, padding), top, left, H, W))`` of each image. The host reads no value, so a CUDA
    stream is never waited for.
    """
    batch, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    column = torch.arange(width, device=images.device)
    column = torch.where(flip[:, None], width - 1 - column, column) + left[:, None]  # [B, W]
    row = torch.arange(height, device=images.device) + top[:, None]  # [B, H]
    image = torch.arange(batch, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return padded[image, channel, row[:, None, :, None], column[:, None, None, :]]


@dataclass(frozen=True)
class CropAndFlip:
    """Torchvision's RandomCrop(size, padding) and RandomHorizontalFlip, drawn for a batch at once.

    The flip is drawn after the crop, so switching it off leaves the crops as they were.
    """

    padding: int
    horizontal_flip: bool

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images [B, C, H, W] with numbers from ``generator``, which lives on the images' device."""
        batch, device = len(images), images.device
        top, left = torch.randint(2 * self.padding + 1, (2, batch), generator=generator, device=device)
        if self.horizontal_flip:
            flip = torch.randint(2, (batch,), generator=generator, device=device).bool()
        else:
            flip = torch.zeros(batch, dtype=torch.bool, device=device)
        return crop_and_flip(images, top, left, flip, self.padding)
