"""CutMix and mixup of training batches."""

import torch
from torch import Tensor
from torchvision.transforms import v2

from gac.config import TrainConfig
from gac.execution.distributed import SINGLE_PROCESS, Ranks


class Mixing:
    """CutMix and mixup as the configuration has them, drawn from PyTorch's global generator on the host.

    Where both are on, each batch is left to one of them, with equal probability. CutMix then takes it if its coin,
    tossed for the epoch or for the batch, says so.
    """

    def __init__(self, config: TrainConfig, num_classes: int, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.config = config
        self.ranks = ranks
        self._cutmix = v2.CutMix(alpha=config.cutmix_beta, num_classes=num_classes)
        self._mixup = v2.MixUp(alpha=config.mixup_alpha, num_classes=num_classes) if config.mixup_alpha > 0 else None

    def draw_for_epoch(self, epoch: int) -> bool | None:
        """Return whether CutMix takes the batches of an epoch (from 0), or None if that is decided for each batch."""
        if self._off(epoch):
            return False
        return self._toss() if self.config.cutmix == "epoch" else None

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, cutmix_epoch: bool | None) -> tuple[Tensor, Tensor]:
        """Return images [B, C, H, W] and targets: mixed images and probabilities [B, K], or both as they came.

        Args:
            images: Images [B, C, H, W].
            labels: Their labels, int64 [B].
            epoch: Number of the epoch, from 0.
            cutmix_epoch: What :meth:`draw_for_epoch` returned for it.
        """
        if self._off(epoch):
            return images, labels
        if self._mixup is not None and (self.config.cutmix == "off" or _toss(0.5)):
            return self.ranks.mix(self._mixup, images, labels)
        if cutmix_epoch or (self.config.cutmix == "batch" and self._toss()):
            return self.ranks.mix(self._cutmix, images, labels)
        return images, labels

    def _off(self, epoch: int) -> bool:
        return epoch >= self.config.epochs - self.config.mix_off_epochs

    def _toss(self) -> bool:
        return _toss(self.config.cutmix_probability)


def _toss(probability: float) -> bool:
    return torch.rand(()).item() < probability
