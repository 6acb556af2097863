"""Random augmentation of whole batches on their device, and torchvision's policies by name.

Every augmentation is a function of the images and of the generator's seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from gac.data.seeding import Stream, derive_seed

if TYPE_CHECKING:
    from torchvision.transforms import v2

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""Takes uint8 images [B, C, H, W], or event frames [B, T, C, H, W], and a freshly seeded generator on their device.

Returns new ones of the same shape. All frames of a sample are augmented alike.
"""

POLICIES = ("autoaugment_cifar10", "autoaugment_imagenet", "randaugment", "trivialaugment")
"""Torchvision's policies by the values of data.augment."""


def make_policy(name: str) -> "v2.Transform":
    """Return one of :data:`POLICIES`."""
    # Not imported above, here and below: it takes as long as torch.
    from torchvision.transforms import v2

    match name:
        case "autoaugment_cifar10":
            return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        case "autoaugment_imagenet":
            return v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)
        case "randaugment":
            return v2.RandAugment()
        case "trivialaugment":
            return v2.TrivialAugmentWide()
        case _:
            raise AssertionError(f"{name} is not one of torchvision's policies")


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Cut a window of the original size out of every image's black-padded copy, then mirror it where ``flip`` is True.

    Shapes: images [B, C, H, W]; top and left int64 [B], the window's corner in the padded image, in [0, 2 *
    padding]; flip bool [B]; the result has the shape and dtype of images. Equal to torchvision's
    ``hflip(crop(pad(image, padding), top, left, H, W))`` of each image. The host reads no value and so never
    waits for the device.
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

    The flip is drawn after the crop, so switching it off leaves the crops unchanged.
    """

    padding: int
    horizontal_flip: bool

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images with numbers from ``generator``, which lives on the images' device."""
        batch, device = len(images), images.device
        top, left = torch.randint(2 * self.padding + 1, (2, batch), generator=generator, device=device)
        if self.horizontal_flip:
            flip = torch.randint(2, (batch,), generator=generator, device=device).bool()
        else:
            flip = torch.zeros(batch, dtype=torch.bool, device=device)
        # A sample's frames as the channels of one image.
        return crop_and_flip(images.flatten(1, -3), top, left, flip, self.padding).view(images.shape)


@dataclass(frozen=True)
class Roll:
    """Shift each image by up to ``pixels`` in both directions; what leaves it on one side comes back on the other."""

    pixels: int

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images with numbers from ``generator``, which lives on the images' device."""
        shifts = torch.randint(
            -self.pixels, self.pixels + 1, (2, len(images)), generator=generator, device=images.device
        )
        for axis, shift in zip((-2, -1), shifts, strict=True):
            size = images.shape[axis]
            taken = (torch.arange(size, device=images.device) - shift[:, None]) % size  # [B, size]
            shape = [1] * images.dim()
            shape[0], shape[axis] = taken.shape
            images = images.gather(axis, taken.view(shape).expand(images.shape))
        return images


class Policy:
    """One of :data:`POLICIES`, drawn once for every ``group`` images of a batch, as torchvision draws for a tensor."""

    def __init__(self, name: str, group: int) -> None:
        self.group = group
        self._transform = make_policy(name)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        # torchvision draws from the CPU's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(generator.initial_seed(), Stream.POLICY))
            return torch.cat([self._transform(group) for group in images.split(self.group)])


@dataclass(frozen=True)
class Cutout:
    """Cutout (DeVries and Taylor, 2017): a square of each image, ``side`` pixels wide, is filled with ``color``.

    Its centre is any pixel of the image, so part of the square may lie outside. ``color`` has one byte per channel.
    """

    side: int
    color: Sequence[int]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images with numbers from ``generator``, which lives on the images' device."""
        covered = torch.ones((), dtype=torch.bool, device=images.device)
        for axis in (-2, -1):
            size = images.shape[axis]
            first = torch.randint(size, (len(images), 1), generator=generator, device=images.device) - self.side // 2
            distance = torch.arange(size, device=images.device) - first  # [B, size]
            shape = [1] * images.dim()
            shape[0], shape[axis] = distance.shape
            covered = covered & ((distance >= 0) & (distance < self.side)).view(shape)
        color = torch.tensor(self.color, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        return torch.where(covered, color, images)


class Erasing:
    """Torchvision's RandomErasing with a rectangle for each image, drawn on the host.

    Args:
        probability: Probability that an image is erased.
        color: What the rectangle is filled with, one byte per channel.
    """

    def __init__(self, probability: float, color: Sequence[int]) -> None:
        from torchvision.transforms import v2

        self.probability = probability
        self.color = torch.tensor(color, dtype=torch.uint8).view(-1, 1, 1)
        self._rectangle = v2.RandomErasing()

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images, color = images.clone(), self.color.to(images.device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(generator.initial_seed(), Stream.ERASING))
            for chosen in (torch.rand(len(images)) < self.probability).nonzero().flatten().tolist():
                rectangle = self._rectangle.make_params([images[chosen]])
                if rectangle["v"] is not None:  # None: none of ten rectangles drawn was small enough
                    rows = slice(rectangle["i"], rectangle["i"] + rectangle["h"])
                    columns = slice(rectangle["j"], rectangle["j"] + rectangle["w"])
                    images[chosen, ..., rows, columns] = color
        return images


@dataclass(frozen=True)
class Compose:
    """Several augmentations applied in order."""

    steps: Sequence[Augmentation]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        for step in self.steps:
            images = step(images, generator)
        return images


def mean_color(mean: Sequence[float]) -> list[int]:
    """Return the bytes of a colour whose channels are given in units where white is 1."""
    return [round(255 * channel) for channel in mean]
