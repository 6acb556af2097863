"""What is exported: a checkpoint's network, what it must be told about its images, and images to try it on."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gac.checkpoint import build_network, find_released, is_ours, list_pretrained, read_checkpoint, read_config
from gac.config import Config
from gac.data import DataInfo, build_data
from gac.data.interface import TestLoader
from gac.errors import InputError
from gac.evaluation.report import as_trained, class_names, open_evaluation
from gac.execution.device import network_input
from gac.execution.distributed import SINGLE_PROCESS
from gac.files import user_path
from gac.models.ms_resnet import MSResNet
from gac.version import __version__

FORMAT = "gac-export-1"
_BATCH = 32


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint's network in evaluation mode on the CPU, and up to ``images`` test images, evenly spread.

    ``config`` is the training run's, ``info`` says how its images were normalised, ``class_names`` are the network's,
    ``sha256`` is the file's.
    """

    network: MSResNet
    config: Config
    info: DataInfo
    class_names: list[str]
    sha256: str
    images: int
    _test: TestLoader | None
    _labels: list[int] | None

    def metadata(self) -> dict[str, Any]:
        """Return, as plain values, what a user of the exported file has to know.

        The network takes (pixels - mean) / std of pixels in [0, 1], ``image_size`` being height and width; ``frames``
        is the number of event frames of a sample, None for images.
        """
        info = self.info
        return {
            "format": FORMAT,
            "network": self.config.model.name,
            "coding": self.network.coding_name,
            "T": self.network.T,
            "classes": self.class_names,
            "channels": info.channels,
            "image_size": [info.height, info.width],
            "frames": info.frames,
            "mean": list(info.mean),
            "std": list(info.std),
            "data": info.name,
            "checkpoint_sha256": self.sha256,
            "gac": __version__,
        }

    def example(self) -> Tensor:
        """Return two samples of the shape that the network takes: [B, C, H, W], or [T, B, C, H, W] of event frames."""
        frames = () if self.info.frames is None else (self.info.frames,)
        generator = torch.Generator().manual_seed(0)
        shape = (*frames, 2, self.info.channels, self.info.height, self.info.width)
        return torch.rand(shape, generator=generator)

    @property
    def tried_on(self) -> str:
        """Which images :meth:`test_images` yields, in words."""
        size = self._test.size
        count = -(-size // self._distance)
        return f"{'all' if count == size else f'{count} of the'} {size} test images of {self.info.name}"

    @property
    def _distance(self) -> int:
        return -(-self._test.size // self.images)

    def test_images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield test images as the network takes them, and their labels, in small batches."""
        batches = self._test.epoch(0)
        if self._labels is not None:
            batches = as_trained(batches, torch.tensor(self._labels))
        passed = 0
        for images, labels in batches:
            chosen = slice(-passed % self._distance, None, self._distance)
            passed += len(labels)
            for part, of_part in zip(images[chosen].split(_BATCH), labels[chosen].split(_BATCH), strict=True):
                if len(of_part):
                    yield network_input(part, torch.contiguous_format), of_part

    def training_images(self, count: int) -> Iterator[Tensor]:
        """Yield the first ``count`` images of the run's first epoch, augmented as in training, in small batches."""
        train = self.config.train
        data = build_data(
            self.config.data,
            device="cpu",
            batch_size=train.batch_size,
            eval_batch_size=train.eval_batch_size,
            seed=train.seed,
            normalize=self.config.model.takes_normalized_images,
            splits=("train",),
            trained_on=self.info,
            frames=self.network.T,
        )
        for images, _ in data.train.epoch(0):
            for part in images[:count].split(_BATCH):
                yield network_input(part, torch.contiguous_format)
            count -= len(images)
            if count <= 0:
                return


def open_source(checkpoint: str, images: int, root: str | None = None) -> Source:
    """Return what a checkpoint of this package holds for an export, and the data set that it was trained on.

    Args:
        checkpoint: A file of train.py, weights of this package (``*.safetensors``), or the name of a trained network
            that travels in it (``gac.list_pretrained()``).
        images: How many test images the export is tried on; for 0 the data set is not opened.
        root: Where the data set lies, by default where it lay in training; only for one that lies anywhere.

    Raises:
        InputError: For a file that cannot be used or does not say what its network was trained on, and for a data set
            that cannot be opened or has other classes.
    """
    is_name = checkpoint in list_pretrained()
    path = find_released(checkpoint).file() if is_name else user_path(checkpoint, "checkpoint")
    digest = hashlib.sha256()
    payload = read_checkpoint(path, digest)
    if not is_ours(payload) or "data" not in payload:
        raise InputError(
            f"checkpoint {path}: does not say the classes and the normalisation of its images, which the exported file"
            " must hold: expected a file of train.py, or one of this package's weights"
        )
    try:
        config = read_config(payload)
        info = DataInfo.from_dict(payload["data"])
        network = build_network(payload)
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from error
    config = replace(config, device="cpu", model=replace(config.model, backend="auto"))
    if root is not None:
        if not config.data.reads_root:
            raise InputError(
                f"--root {root} is not read, as the network was trained on {config.data.name}: leave it out"
            )
        config = replace(config, data=replace(config.data, root=root))
    if not config.model.takes_normalized_images:
        info = replace(info, mean=(0.0,) * info.channels, std=(1.0,) * info.channels)
    test = labels = None
    if images:
        _, network, data, labels, names = open_evaluation(path, payload, config, {}, SINGLE_PROCESS, None, False)
        test = data.test
    else:
        names = class_names(network, info)
    return Source(network.eval(), config, info, names, digest.hexdigest(), images, test, labels)
