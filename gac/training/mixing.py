"""CutMix and mixup of training batches."""

import torch
from torch import Tensor, nn

from gac.config import TrainConfig
from gac.execution.distributed import SINGLE_PROCESS, Ranks, collective


class Mixing:
    """CutMix and mixup as configured, with random numbers from PyTorch's global generator on the host.

    If both are on, each batch goes to one of them with equal probability. CutMix then mixes it with the probability
    ``cutmix_probability``, drawn once for the epoch or for each batch.
    """

    def __init__(self, config: TrainConfig, num_classes: int, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.config = config
        self.ranks = ranks
        self._cutmix = self._mixup = None
        if config.cutmix == "off" and config.mixup_alpha <= 0:
            return
        # Not imported above: it takes as long as torch.
        from torchvision.transforms import v2

        self._cutmix = v2.CutMix(alpha=config.cutmix_beta, num_classes=num_classes)
        self._mixup = v2.MixUp(alpha=config.mixup_alpha, num_classes=num_classes) if config.mixup_alpha > 0 else None

    def draw_for_epoch(self, epoch: int) -> bool | None:
        """Return whether CutMix mixes the batches of an epoch (from 0), or None if that is drawn for each batch."""
        if self._off(epoch):
            return False
        return self._draw() if self.config.cutmix == "epoch" else None

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, cutmix_epoch: bool | None) -> tuple[Tensor, Tensor]:
        """Return mixed images and their targets, probabilities [B, K], or images and labels unchanged.

        Args:
            images: Images [B, C, H, W], or event frames [B, T, C, H, W], which are mixed alike at all time steps.
            labels: Their labels, int64 [B].
            epoch: Number of the epoch, from 0.
            cutmix_epoch: What :meth:`draw_for_epoch` returned for it.
        """
        if self._off(epoch):
            return images, labels
        if self._mixup is not None and (self.config.cutmix == "off" or _draw(0.5)):
            return self._mix(self._mixup, images, labels)
        if cutmix_epoch or (self.config.cutmix == "batch" and self._draw()):
            return self._mix(self._cutmix, images, labels)
        return images, labels

    def _off(self, epoch: int) -> bool:
        return epoch >= self.config.epochs - self.config.mix_off_epochs

    def _draw(self) -> bool:
        return _draw(self.config.cutmix_probability)

    def _mix(self, transform: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix each image with the one before it in the batch of all ranks.

        All ranks draw the same numbers in ``transform``, as they depend only on the image size.
        """
        if images.dim() == 5:
            # torchvision takes images: a sample's frames as the channels of one.
            mixed, targets = self._mix(transform, images.flatten(1, 2), labels)
            return mixed.unflatten(1, images.shape[1:3]), targets
        if self.ranks.size == 1:
            return transform(images, labels)
        images = torch.cat((self._from_previous_rank(images[-1:]), images))
        labels = torch.cat((self._from_previous_rank(labels[-1:]), labels))
        images, targets = transform(images, labels)
        return images[1:], targets[1:]

    def _from_previous_rank(self, tensor: Tensor) -> Tensor:
        tensors = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.ranks.size)]
        with collective():
            torch.distributed.all_gather(tensors, tensor.contiguous())
        return tensors[self.ranks.rank - 1]


def _draw(probability: float) -> bool:
    return torch.rand(()).item() < probability
