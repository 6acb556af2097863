"""What a network learns from outputs rather than from labels: from its own mean over time, or from a trained teacher.

Sources: knowledge distillation, Hinton et al. 2015; the mean of the outputs over time as the teacher of each time step,
Yu et al., ICML 2025 (arXiv:2501.15925).
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gac.checkpoint import build_network, is_ours, read_checkpoint
from gac.config import TrainConfig
from gac.data import DataInfo
from gac.errors import InputError
from gac.models.ms_resnet import MSResNet


@dataclass(frozen=True)
class Teacher:
    """A trained network in evaluation mode, and the sha256 of its checkpoint."""

    network: MSResNet
    sha256: str


class Distillation:
    """The terms that train.self_distillation and train.teacher add to the loss.

    Each is weight x temperature^2 x the Kullback-Leibler divergence of the network's class probabilities from the
    target's, all logits being divided by the temperature; no gradient goes through the target. With self-distillation
    the target is the mean of the outputs over time and each time step learns from it. A teacher's target is its mean
    output over time, from which the network learns as train.loss says: with its mean, or at each time step (tet).
    """

    def __init__(self, config: TrainConfig, teacher: Teacher | None = None) -> None:
        self.config = config
        self.teacher = teacher

    def __call__(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return what is added to the loss, a scalar.

        Args:
            logits: Outputs [T, B, K] in float32.
            images: What the network was called with.
        """
        config, added = self.config, logits.new_zeros(())
        if config.self_distillation > 0:
            added = added + config.self_distillation * self._divergence(logits, logits.mean(0).detach())
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher.network(images).float().mean(0)
            students = logits if config.loss == "tet" else logits.mean(0, keepdim=True)
            added = added + config.teacher_weight * self._divergence(students, target)
        return added

    def _divergence(self, students: Tensor, target: Tensor) -> Tensor:
        temperature = self.config.distillation_temperature
        expected = (target / temperature).log_softmax(-1).expand(students.shape)
        found = (students / temperature).log_softmax(-1)
        return temperature**2 * F.kl_div(found, expected, reduction="none", log_target=True).sum(-1).mean()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: which teacher it was."""
        return {"teacher": None if self.teacher is None else self.teacher.sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise InputError unless the teacher is the one that the run began with."""
        if state != self.state_dict():
            raise InputError(
                f"train.teacher {self.config.teacher} is not the file that the run began with (sha256"
                f" {state['teacher']}): give that one"
            )


def make_distillation(
    config: TrainConfig, info: DataInfo, device: torch.device, memory_format: torch.memory_format
) -> Distillation | None:
    """Return what the configuration adds to the loss, or None if that is nothing.

    Raises:
        InputError: For a teacher that cannot be read, or that was not trained on images and classes like these.
    """
    if config.teacher is None:
        return Distillation(config) if config.self_distillation > 0 else None
    digest = hashlib.sha256()
    payload = read_checkpoint(config.teacher, digest)
    try:
        network = _matching_network(payload, info)
    except InputError as error:
        raise InputError(f"train.teacher {config.teacher}: {error}") from error
    network.requires_grad_(False).eval().to(device, memory_format=memory_format)
    return Distillation(config, Teacher(network, digest.hexdigest()))


def _matching_network(payload: dict, info: DataInfo) -> MSResNet:
    if not is_ours(payload) or "data" not in payload:
        raise InputError("it does not say what it was trained on: expected a checkpoint of train.py")
    trained_on = DataInfo.from_dict(payload["data"])
    if info.labels_of(trained_on) is not None:
        raise InputError(f"its classes are those of data set {info.name} in another order")
    if trained_on.channels != info.channels or trained_on.frames != info.frames:
        raise InputError(
            f"it was trained on {trained_on.shape} with {trained_on.channels} channels, and data set {info.name} has"
            f" {info.shape} with {info.channels}"
        )
    if (trained_on.mean, trained_on.std) != (info.mean, info.std):
        raise InputError(
            f"its images were normalised with mean {list(trained_on.mean)} and std {list(trained_on.std)}, those of"
            f" this run with {list(info.mean)} and {list(info.std)}: train it on the same data set, and with a coding"
            " that takes the same images"
        )
    # Its initial weights, which are replaced, are not drawn from the run's random numbers.
    with torch.random.fork_rng(devices=[]):
        return build_network(payload)
